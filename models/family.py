"""What decoder families share: their common fields, the layers as pairs of values, counts and checks. Imports no jax.

A layer is attention and a feed-forward, each a value that says which weights it has: `Grouped` and `Dense` here,
`Latent` in models/mla.py, `Experts` in models/moe.py. A stack is a run of equal layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from meshes import DEFAULT, Rules, UserError, closest
from meshes.errors import DivisionError
from meshes.fit import check_exchange, check_experts, check_letters, cuts
from meshes.rules import Axes
from models.attention import Attention, Auto, check_cut, check_platform

Remat = Literal["none", "dots", "projections", "full"]
REMAT: dict[str, str] = {
    "none": "keep everything but gathered weights; the fastest, the most memory",
    "dots": "keep the results of all matrix products, attention's probabilities among them",
    "projections": "keep the results of products with weights; attention is computed again",
    "full": "keep each layer's input only; a third more work, the least memory",
}

ACTIVATIONS = ("BRD", "BSD", "BSF", "BSNH", "BSKH", "BSZ", "BSV")  # those of a model that has all their letters

Sizes = dict[str, tuple[str, int]]  # letter -> the field that sizes it, and the size


@dataclass(frozen=True)
class Parameter:
    """One array: its dims by letter and field, what it starts as, which part of it a token's products use."""

    dims: tuple[tuple[str, str, int], ...]  # letter, field, size
    std: float  # of the normals that it starts with; 0: it starts at `start`
    start: float = 0.0
    active: float = 1.0

    @property
    def letters(self) -> str:
        return "".join(letter for letter, _, _ in self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, _, size in self.dims)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


NORM, ZERO, RESIDUAL = "norm", "zero", ">"  # instead of the letters that a product sums over; ">LETTERS": to the residual


def parameter(name: str, kind: str, sizes: Sizes, num_layers: int = 1, active: float = 1.0) -> Parameter:
    """`name` ends in its dims. `kind`: the letters that its product sums over, NORM, or ZERO (it starts at 0)."""
    dims = tuple((letter, *sizes[letter]) for letter in name.rsplit("_", 1)[1])
    if kind in (NORM, ZERO):
        return Parameter(dims, std=0.0, start=float(kind == NORM), active=active)
    fan_in = math.prod(sizes[letter][1] for letter in kind.removeprefix(RESIDUAL))
    fan_in *= 2 * num_layers if kind.startswith(RESIDUAL) else 1
    return Parameter(dims, std=fan_in**-0.5, active=active)


class Part(Protocol):
    """Half a layer, as a value."""

    def weights(self, dim: int) -> list[tuple[str, str, Sizes, float]]:
        """(name, kind, sizes of its letters, the part of it that a token uses) of each, in a fixed order."""


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Grouped-query attention: a run of num_heads / num_kv_heads query heads shares a key head. Ainslie et al. 2023,
    arXiv 2305.13245."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool = False  # RMS norm of every query's and key's head, before the rotation (Qwen3)

    def __post_init__(self):
        check_positive(vars(self))
        if self.num_heads % self.num_kv_heads:
            raise _unshared(self.num_heads, self.num_kv_heads)
        if self.head_dim % 2:
            fix = f"head_dim = {self.head_dim + 1}"
            raise UserError(f"head_dim = {self.head_dim} is odd.", rule="rotary positions turn pairs of dims", fix=fix)

    @property
    def rope_dim(self) -> int:
        return self.head_dim

    @property
    def flops_per_key(self) -> int:
        """Forward and backward, of one query of all heads against one key: its score, and its value."""
        return 6 * self.num_heads * (self.head_dim + self.head_dim)

    def weights(self, dim: int) -> list[tuple[str, str, Sizes, float]]:
        fields = dict(N="num_heads", K="num_kv_heads", H="head_dim")
        sizes = {letter: (field, getattr(self, field)) for letter, field in fields.items()}
        products = [("q_LDNH", "D"), ("k_LDKH", "D"), ("v_LDKH", "D"), ("o_LNHD", ">NH")]
        norms = [("q_norm_LH", NORM), ("k_norm_LH", NORM)] if self.qk_norm else []
        return [(name, kind, sizes, 1.0) for name, kind in products + norms]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """SwiGLU of one width for all tokens."""

    ffn: int

    def __post_init__(self):
        check_positive(vars(self))

    def weights(self, dim: int) -> list[tuple[str, str, Sizes, float]]:
        products = [("gate_LDF", "D"), ("up_LDF", "D"), ("down_LFD", ">F")]
        return [(name, kind, {"F": ("ffn", self.ffn)}, 1.0) for name, kind in products]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Equal layers. `prefix` begins the names of their parameters in the model."""

    num_layers: int
    heads: Any  # a Part: Grouped or Latent
    ffn: Any  # a Part: Dense or Experts
    prefix: str = ""

    def parameters(self, dim: int, depth: int) -> dict[str, Parameter]:
        """By name without the prefix. `depth`: the model's layers, which all write to the residual stream."""
        sizes: Sizes = {"L": ("num_layers", self.num_layers), "D": ("dim", dim)}
        norms = [[(name, NORM, {}, 1.0)] for name in ("attn_norm_LD", "ffn_norm_LD")]
        rows = norms[0] + self.heads.weights(dim) + norms[1] + self.ffn.weights(dim)
        return {name: parameter(name, kind, sizes | own, depth, active) for name, kind, own, active in rows}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's longer context: rotations that turn less than `low_freq_factor` times within `original_max_position`
    positions are slowed by `factor`, those that turn more than `high_freq_factor` times are left, between them a blend.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        check_positive(dict(original_max_position=self.original_max_position))
        check_finite(factor=self.factor, low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"high_freq_factor = {self.high_freq_factor} leaves no frequencies to blend.",
                got=f"low_freq_factor {self.low_freq_factor}",
                rule="low_freq_factor is below high_freq_factor",
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What every decoder has. A family adds fields and says its `stacks`. Raises UserError."""

    vocab_size: int
    dim: int
    num_layers: int
    tied: bool = False  # the unembedding is the embedding
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    attention: Attention = Auto()
    remat: Remat = "none"  # REMAT says what each keeps for the backward pass
    scan_layers: bool = True  # one compiled layer, run num_layers times; False unrolls, with the same parameters

    def __post_init__(self):
        check_positive(dict(vocab_size=self.vocab_size, dim=self.dim, num_layers=self.num_layers))
        check_finite(norm_eps=self.norm_eps, rope_theta=self.rope_theta)
        if self.remat not in REMAT:
            raise UserError(f"remat = {self.remat!r} is not known.", fix=closest(self.remat, REMAT))
        self.stacks()

    def stacks(self) -> tuple[Stack, ...]:
        """The layers, in order of execution."""
        raise NotImplementedError

    def build(self, key: Any) -> Any:
        """A Decoder with float32 parameters drawn from `key`; traceable by jax.eval_shape."""
        from models.decoder import Decoder

        return Decoder(self, key)

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter by name."""
        sizes: Sizes = {"V": ("vocab_size", self.vocab_size), "D": ("dim", self.dim)}
        found = {"embed_VD": replace(parameter("embed_VD", "D", sizes), active=float(self.tied))}  # a lookup is no product
        for stack in self.stacks():
            layers = stack.parameters(self.dim, self.num_layers)
            found |= {stack.prefix + name: p for name, p in layers.items()}
        found["final_norm_D"] = parameter("final_norm_D", NORM, sizes)
        return found | ({} if self.tied else {"unembed_DV": parameter("unembed_DV", "D", sizes)})

    def num_params(self) -> int:
        """All parameters, the tied embedding once."""
        return sum(p.size for p in self.parameters().values())

    def num_active_params(self) -> int:
        """Those that one token meets, the embedding among them: of experts, only as many as it chooses."""
        layers = sum(round(p.size * p.active) for name, p in self.parameters().items() if name != "embed_VD")
        return layers + self.vocab_size * self.dim

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward per token; a token attends to (seq_len + 1) / 2 keys on average.

        6 per weight in a product (unembedding: a product; embedding: a lookup; experts: the chosen ones), and by key
        and layer what its attention says.
        """
        weights = sum(p.size * p.active for p in self.parameters().values() if p.std)
        per_key = sum(stack.num_layers * stack.heads.flops_per_key for stack in self.stacks())
        return 6 * weights + per_key * (seq_len + 1) / 2

    def layer_flops(self, seq_len: int) -> tuple[list[float], float]:
        """FLOPs per token as above, of each layer in order and of the unembedding."""
        layers = []
        for stack in self.stacks():
            weights = sum(p.size * p.active for p in stack.parameters(self.dim, self.num_layers).values() if p.std)
            one = 6 * weights / stack.num_layers + stack.heads.flops_per_key * (seq_len + 1) / 2
            layers += [one] * stack.num_layers
        return layers, 6.0 * self.vocab_size * self.dim

    def check(self, axes: Mapping[str, int], seq_len: int, rules: Rules = DEFAULT, platform: str = "") -> None:
        """Raises LayoutError where a parameter or an activation cannot be laid out by `rules` over axes of these sizes.

        `platform`: of the devices, where it is known; then also for what is required and cannot run there.
        """
        arrays = self.parameters()
        letters = {letter for p in arrays.values() for letter in p.letters}
        stored = {name: rules.stored(p.letters, p.shape, axes) for name, p in arrays.items()}
        for name, p in arrays.items():
            check_letters(p.letters, stored[name], name)
            check_letters(p.letters, rules.acts, name)
        for activation in ACTIVATIONS:
            if set(activation) <= letters | set("BSR"):
                check_letters(activation, rules.acts, "an activation")
        _check_division([row for name, p in arrays.items() for row in _cut(p.dims, stored[name], axes)], axes)
        columns = [(letter, "seq_len", seq_len) for letter in "SR"]
        rows = [row for dims in [*(p.dims for p in arrays.values()), columns] for row in _cut(dims, rules.acts, axes)]
        _check_division(rows, axes)
        for num_heads in {size for p in arrays.values() for letter, _, size in p.dims if letter == "N"}:
            check_cut(self.attention, rules, axes, seq_len, num_heads)
        check_platform(self.attention, platform)
        if "E" in letters:
            over, *tokens = (tuple(cut) for cut in cuts(axes, rules.acts, "EBS"))
            check_experts(rules.acts, over, sum(tokens, ()))
            if over and platform:
                check_exchange(rules.experts, platform)


def check_positive(fields: Mapping[str, Any]) -> None:
    """Raises UserError for a size below 1, or one with a point; what is no number is none of its business."""
    for name, size in fields.items():
        number = isinstance(size, int | float) and not isinstance(size, bool)
        if number and (isinstance(size, float) or size < 1):
            raise UserError(f"{name} = {size} is no size.", rule="a whole number, at least 1")


def check_finite(*, from_zero: bool = False, **numbers: float) -> None:
    """Raises UserError for a number that is not finite, or not above 0, or below it where it may be 0."""
    for name, number in numbers.items():
        if not math.isfinite(number) or number < 0 or number == 0 and not from_zero:
            rule = "zero or a positive number" if from_zero else "a positive number"
            raise UserError(f"{name} = {number} is out of range.", rule=f"{name} is {rule}")


Row = tuple[str, int, dict[str, int]]  # the field of a dim, its size, the axes that shard it


def _cut(dims: Iterable[tuple[str, str, int]], mapping: Mapping[str, Axes], axes: Mapping[str, int]) -> list[Row]:
    letters, fields, sizes = zip(*dims)
    return list(zip(fields, sizes, cuts(axes, mapping, "".join(letters)), strict=True))


def _check_division(rows: list[Row], axes: Mapping[str, int]) -> None:
    for field, size, over in rows:
        if size % math.prod(over.values()):
            together = math.gcd(*(other for _, other, same in rows if same == over))
            raise _indivisible(field, size, over, math.gcd(together, math.prod(axes.values())), together)


def _unshared(heads: int, kv_heads: int) -> UserError:
    near = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - kv_heads))
    return UserError(
        "the query heads do not share the key heads evenly.",
        got=f"num_heads {heads}, num_kv_heads {kv_heads}",
        rule="num_heads is a multiple of num_kv_heads",
        fix=f"num_heads = {max(round(heads / kv_heads), 1) * kv_heads} or num_kv_heads = {near}",
    )


def _indivisible(field: str, size: int, axes: dict[str, int], most: int, together: int) -> DivisionError:
    """`together`: what the product of these axes has to divide; `most`: what of it the number of devices allows."""
    over, shards = " x ".join(axes), math.prod(axes.values())
    near = min((n for n in range(1, most + 1) if most % n == 0), key=lambda n: abs(n - shards))
    return DivisionError(
        f"{field} = {size} does not divide over {over}.",
        got=" x ".join(f"{axis} {n}" for axis, n in axes.items()),
        rule=f"{over} divides all that it shards, so it divides {together}",
        fix=f"{over} = {near}",
    )
