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

BATCH_FIELDS = dict(tokens="int32", targets="int32", segments="int32", positions="int32", weights="float32")


Extras = dict[str, Any]  # fp32 sums over tokens, which add up over microbatches and batch shards


class Model(Protocol):
    """An nnx.Module. Each nnx.Param carries `letters`, one letter of the alphabet per dim ("LDF"; `_` for a nameless dim).

    Arrays are float32 as stored; the step casts them to the compute dtype before calling, but for those whose nnx.Param
    carries `exact=True`. Layers of one shape are a stack: their parameters have a leading dim L, so that the engine may
    run any slice of them.

    Extras are what layers add up beside the hidden states: "objective" (a scalar that carries gradient and joins the
    sum of -log p before it is divided by the count of targets; absent where a model has none), and others by name, whose
    leading dim is the layers that were run. A dense model has none: {}.
    """

    def __call__(self, tokens_BS: Any, segments_BS: Any | None, positions_BS: Any | None) -> tuple[Any, Extras]:
        """-> h_BSD, the hidden states that the unembedding reads, and all layers' extras. None: one document a row.

        It is `embed`, `through` each of `stacks`, `final`.
        """

    def embed(self, tokens_BS: Any) -> Any:
        """-> x_BRD, the start of the residual stream."""

    def stacks(self) -> tuple[dict[str, Any], ...]:
        """In order of execution: a stack's parameters by name (which ends in the dims), with L this stack's layers."""

    def through(
        self, stack: int, weights: dict[str, Any], x_BRD: Any, segments_BS: Any | None, positions_BS: Any
    ) -> tuple[Any, Extras]:
        """-> x_BRD after the layers in `weights`, any consecutive rows of stack number `stack`, and their extras."""

    def final(self, x_BRD: Any) -> Any:
        """-> h_BSD: the final norm."""

    def unembedding(self) -> Any:
        """-> w_DV in the dtype of the parameters; logits are h_BSD @ w_DV."""

    def after_update(self, params: Any, extras: Extras) -> Any:
        """The parameters to keep, given those that the optimizer made of this model's and the whole batch's extras.

        For what learns outside the gradient; a model without such gives `params` back.
        """

    def metrics(self, extras: Extras) -> dict[str, Any]:
        """Of a whole batch's extras, by name: scalars, or arrays that are recorded as lists."""


class ModelConfig(Protocol):
    """A frozen dataclass of plain data: the architecture. Importing and making one touches no device."""

    vocab_size: int

    def build(self, key: Any) -> Model:
        """A model with float32 parameters drawn from `key`; traceable by jax.eval_shape."""

    def num_params(self) -> int:
        """All parameters, tied ones once."""

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward per token at this length, recomputation not counted, causal attention exact."""

    def layer_flops(self, seq_len: int) -> tuple[list[float], float]:
        """FLOPs per token as above, of each layer in order and of the unembedding: what a pipeline divides."""

    def check(self, axes: Mapping[str, int], seq_len: int, rules: Rules, platform: str = "") -> None:
        """Raises LayoutError where this model, at this length, cannot be laid out by `rules` over axes of these sizes, nor
        run as it requires on devices of this platform ("": unknown)."""
