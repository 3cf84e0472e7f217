"""Multi-head latent attention as a value, and dense decoders that have it. Imports no jax; the maths: models/latent.py.

DeepSeek-AI 2024, "DeepSeek-V2", arXiv 2405.04434, section 2.1: keys and values of all heads are products of one small
latent, beside a rotated key that all heads share.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshes import UserError
from models.family import NORM, DecoderConfig, Dense, Sizes, Stack, check_positive


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Heads over latents. A head's query and key are `nope_dim` dims without position and `rope_dim` rotated ones."""

    num_heads: int
    kv_latent: int  # dims of the latent of keys and values: all that a cache would hold, beside the rotated key
    q_latent: int | None  # of the queries; None: queries are products of the residual stream (DeepSeek-V2-Lite)
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self):
        check_positive(vars(self))
        if self.rope_dim % 2:
            fix = f"rope_dim = {self.rope_dim + 1}"
            raise UserError(f"rope_dim = {self.rope_dim} is odd.", rule="rotary positions turn pairs of dims", fix=fix)

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return self.nope_dim + self.rope_dim

    @property
    def flops_per_key(self) -> int:
        """Forward and backward, of one query of all heads against one key: its score, and its value."""
        return 6 * self.num_heads * (self.head_dim + self.value_dim)

    def weights(self, dim: int) -> list[tuple[str, str, Sizes, float]]:
        """In order of use; the latents' dims are A where they are summed over and Z where they are made."""
        kv = self._sizes("kv_latent", self.kv_latent, self.nope_dim + self.value_dim)
        rows = [("kv_down_LDZ", "D", kv), ("kv_norm_LA", NORM, kv), ("kv_up_LANH", "A", kv)]
        rows.append(("k_rope_LDH", "D", self._sizes("kv_latent", self.kv_latent, self.rope_dim)))
        rows.append(("o_LNHD", ">NH", self._sizes("kv_latent", self.kv_latent, self.value_dim)))
        if self.q_latent is None:
            rows.append(("q_LDNH", "D", self._sizes("q_latent", 0, self.head_dim)))
        else:
            q = self._sizes("q_latent", self.q_latent, self.head_dim)
            rows += [("q_down_LDZ", "D", q), ("q_norm_LA", NORM, q), ("q_up_LANH", "A", q)]
        return [(name, kind, sizes, 1.0) for name, kind, sizes in rows]

    def _sizes(self, field: str, latent: int, head: int) -> Sizes:
        return {"A": (field, latent), "Z": (field, latent), "N": ("num_heads", self.num_heads), "H": ("head", head)}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A dense decoder with latent attention: otherwise a Llama."""

    heads: Latent
    ffn: int

    def stacks(self) -> tuple[Stack, ...]:
        return (Stack(num_layers=self.num_layers, heads=self.heads, ffn=Dense(ffn=self.ffn)),)
