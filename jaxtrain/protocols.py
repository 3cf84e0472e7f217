"""What the engine asks of a model, in two Protocols. The engine never imports `models`; anything that fits these trains.

A batch is a dict of arrays "BS" (global batch, sequence):
  tokens     int32    the input ids
  targets    int32    the id that follows each token
  segments   int32    document number within the row, from 1; 0 is padding. Tokens of different segments never attend.
  positions  int32    position within the document: restarts at 0 with each segment
  weights    float32  1 where the target counts in the loss, 0 on padding and where the target is another document's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from meshes import Rules

BATCH_FIELDS = ("tokens", "targets", "segments", "positions", "weights")


class Model(Protocol):
    """An nnx.Module. Each nnx.Param carries `letters`, one letter of the alphabet per dim ("LDF"; `_` for a nameless dim).

    Arrays are float32 as stored; the step casts them to the compute dtype before calling.
    """

    def __call__(self, tokens_BS: Any, segments_BS: Any | None, positions_BS: Any | None) -> Any:
        """-> h_BSD, the hidden states that the unembedding reads (final norm applied). None: one document a row."""

    def unembedding(self) -> Any:
        """-> w_DV in the dtype of the parameters; logits are h_BSD @ w_DV."""


class ModelConfig(Protocol):
    """A frozen dataclass of plain data: the architecture. Importing and making one touches no device."""

    vocab_size: int

    def build(self, key: Any) -> Model:
        """A model with float32 parameters drawn from `key`; traceable by jax.eval_shape."""

    def num_params(self) -> int:
        """All parameters, tied ones once."""

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward per token at this length, recomputation not counted, causal attention exact."""

    def check(self, axes: Mapping[str, int], seq_len: int, rules: Rules) -> None:
        """Raises LayoutError where this model, at this length, cannot be laid out by `rules` over axes of these sizes."""
