"""The Llama family: its Config, and its named sizes from 1M to 405B parameters. Importing this imports no jax.

Sizes: Grattafiori et al. 2024, arXiv 2407.21783, table 3, and the published config.json of Llama 3.1 and 3.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from meshes import UserError, closest
from models.family import REMAT, DecoderConfig, Dense, Grouped, Remat, RopeScaling, Stack

__all__ = ["REMAT", "SIZES", "Config", "Remat", "RopeScaling", "size"]


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A Llama: pre-norm decoder with rotary positions, grouped-query attention and SwiGLU. Raises UserError."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int

    def stacks(self) -> tuple[Stack, ...]:
        heads = Grouped(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        return (Stack(num_layers=self.num_layers, heads=heads, ffn=Dense(ffn=self.ffn)),)


def _small(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn: int, vocab_size: int) -> Config:
    shape = dict(dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads, ffn=ffn)
    return Config(vocab_size=vocab_size, head_dim=dim // num_heads, rope_theta=10_000.0, **shape)


def _llama3(dim: int, num_layers: int, num_heads: int, head_dim: int, ffn: int, **rest: Any) -> Config:
    shape = dict(dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=8, head_dim=head_dim, ffn=ffn)
    return Config(vocab_size=128_256, **shape, **rest)


_3_1 = dict(rope_scaling=RopeScaling(factor=8.0))
_3_2 = dict(rope_scaling=RopeScaling(factor=32.0), tied=True)

SIZES: dict[str, Config] = {
    "1m": _small(128, 4, 4, 2, 384, 512),
    "7m": _small(256, 4, 8, 4, 768, 8192),
    "40m": _small(512, 8, 8, 4, 1536, 16_384),
    "125m": _small(768, 12, 12, 4, 2048, 32_000),
    "350m": _small(1024, 24, 16, 4, 2816, 32_000),
    "1b": _llama3(2048, 16, 32, 64, 8192, **_3_2),
    "3b": _llama3(3072, 28, 24, 128, 8192, **_3_2),
    "8b": _llama3(4096, 32, 32, 128, 14_336, **_3_1),
    "70b": _llama3(8192, 80, 64, 128, 28_672, **_3_1),
    "405b": _llama3(16_384, 126, 128, 128, 53_248, **_3_1),
}


def size(name: str, **changes: Any) -> Config:
    """The named size with these fields changed: `size("8b", remat="full")`. Raises UserError."""
    if name not in SIZES:
        raise UserError(f"no Llama of size {name!r}.", fix=closest(name, SIZES))
    return dataclasses.replace(SIZES[name], **changes)
