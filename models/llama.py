"""The Llama family: its Config, and its named sizes from 1M to 405B parameters. Importing this imports no jax.

Sizes: Grattafiori et al. 2024, arXiv 2407.21783, table 3, and the published config.json of Llama 3.1 and 3.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from meshes import DEFAULT, LayoutError, Rules, UserError, closest
from meshes.rules import axes_of
from models.attention import Attention, Auto

Remat = Literal["none", "dots", "projections", "full"]
REMAT: dict[str, str] = {
    "none": "keep everything but gathered weights; the fastest, the most memory",
    "dots": "keep the results of all matrix products, attention's probabilities among them",
    "projections": "keep the results of products with weights; attention is computed again",
    "full": "keep each layer's input only; a third more work, the least memory",
}

# Parameter -> the letters that its product sums over; "": a norm. The name ends in its dims. Tied models lack the last.
PARAMETERS: dict[str, str] = {
    "embed_VD": "D",
    "attn_norm_LD": "",
    "q_LDNH": "D",
    "k_LDKH": "D",
    "v_LDKH": "D",
    "o_LNHD": "NH",
    "ffn_norm_LD": "",
    "gate_LDF": "D",
    "up_LDF": "D",
    "down_LFD": "F",
    "final_norm_D": "",
    "unembed_DV": "D",
}
RESIDUAL = ("o_LNHD", "down_LFD")  # what writes to the residual stream, twice a layer


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's longer context: rotations that turn less than `low_freq_factor` times within `original_max_position`
    positions are slowed by `factor`, those that turn more than `high_freq_factor` times are left, between them a blend.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class Parameter:
    """One array: a letter per dim, its shape, the standard deviation it starts with (0: it starts at 1)."""

    letters: str
    shape: tuple[int, ...]
    std: float


@dataclass(frozen=True, kw_only=True)
class Config:
    """A Llama: pre-norm decoder with rotary positions, grouped-query attention and SwiGLU. Raises UserError."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    tied: bool = False  # the unembedding is the embedding
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    attention: Attention = Auto()
    remat: Remat = "none"  # REMAT says what each keeps for the backward pass
    scan_layers: bool = True  # one compiled layer, run num_layers times; False unrolls, with the same parameters

    def __post_init__(self):
        for name, size in self._sizes().items():
            if size < 1:
                raise UserError(f"{name} = {size} is no size.", rule="at least 1")
        if self.num_heads % self.num_kv_heads:
            raise _unshared(self.num_heads, self.num_kv_heads)
        if self.head_dim % 2:
            fix = f"head_dim = {self.head_dim + 1}"
            raise UserError(f"head_dim = {self.head_dim} is odd.", rule="rotary positions turn pairs of dims", fix=fix)
        if self.remat not in REMAT:
            raise UserError(f"remat = {self.remat!r} is not known.", fix=closest(self.remat, REMAT))

    def build(self, key: Any) -> Any:
        """A Decoder with float32 parameters drawn from `key`; traceable by jax.eval_shape."""
        from models.decoder import Decoder

        return Decoder(self, key)

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter by name."""
        kept = {name: inputs for name, inputs in PARAMETERS.items() if not (self.tied and name == "unembed_DV")}
        return {name: self._parameter(name, inputs) for name, inputs in kept.items()}

    def num_params(self) -> int:
        """All parameters, the tied embedding once."""
        return sum(math.prod(p.shape) for p in self.parameters().values())

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward per token; a token attends to (seq_len + 1) / 2 keys on average.

        6 per weight in a product (unembedding: a product; embedding: a lookup), 12 per key, layer and dim of all heads.
        """
        weights = sum(math.prod(p.shape) for p in self.parameters().values() if p.std)
        weights -= 0 if self.tied else self.vocab_size * self.dim
        return 6 * weights + 12 * self.num_layers * self.num_heads * self.head_dim * (seq_len + 1) / 2

    def check(self, axes: Mapping[str, int], seq_len: int, rules: Rules = DEFAULT) -> None:
        """Raises LayoutError where a size does not divide over mesh axes of these sizes under `rules`."""
        sizes = self._sizes() | {"seq_len": seq_len}
        for mapping, letters in ((rules.params, STORED), (rules.acts, COMPUTED)):
            split = {letter: [a for a in axes_of(mapping, letter) if axes.get(a, 1) > 1] for letter in letters}
            for letter, over in split.items():
                field, shards = letters[letter], math.prod(axes[axis] for axis in over)
                if sizes[field] % shards:
                    together = math.gcd(*(sizes[letters[other]] for other in split if split[other] == over))
                    raise _indivisible(field, sizes[field], {axis: axes[axis] for axis in over}, together)

    def _sizes(self) -> dict[str, int]:
        return {field: getattr(self, field) for field in FIELDS.values()}

    def _parameter(self, name: str, inputs: str) -> Parameter:
        letters = name.rsplit("_", 1)[1]
        dims = {letter: getattr(self, field) for letter, field in FIELDS.items()}
        fan_in = math.prod(dims[letter] for letter in inputs)
        fan_in *= 2 * self.num_layers if name in RESIDUAL else 1
        return Parameter(letters, tuple(dims[letter] for letter in letters), fan_in**-0.5 if inputs else 0.0)


FIELDS = dict(V="vocab_size", D="dim", L="num_layers", N="num_heads", K="num_kv_heads", H="head_dim", F="ffn")
STORED = FIELDS
COMPUTED = FIELDS | dict(S="seq_len", R="seq_len")


def _unshared(heads: int, kv_heads: int) -> UserError:
    near = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - kv_heads))
    return UserError(
        "the query heads do not share the key heads evenly.",
        got=f"num_heads {heads}, num_kv_heads {kv_heads}",
        rule="num_heads is a multiple of num_kv_heads",
        fix=f"num_heads = {max(round(heads / kv_heads), 1) * kv_heads} or num_kv_heads = {near}",
    )


def _indivisible(field: str, size: int, axes: dict[str, int], together: int) -> LayoutError:
    """`together`: what the product of these axes has to divide."""
    over, shards = " x ".join(axes), math.prod(axes.values())
    near = min((n for n in range(1, together + 1) if together % n == 0), key=lambda n: abs(n - shards))
    return LayoutError(
        f"{field} = {size} does not divide over {over}.",
        got=" x ".join(f"{axis} {n}" for axis, n in axes.items()),
        rule=f"{over} divides all that it shards, so it divides {together}",
        fix=f"{over} = {near}",
    )


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
