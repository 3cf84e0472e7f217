"""Mixtures of experts: the Config, and named sizes after Mixtral, Qwen3-MoE and DeepSeek-V3. Importing this imports no jax.

Token-choice top-k of SwiGLU experts. The maths is models/routed.py, the way to the experts' devices meshes/experts.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from meshes import UserError, closest
from models.family import ZERO, DecoderConfig, Dense, Grouped, Sizes, Stack, check_finite, check_positive
from models.mla import Latent


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Scores are probabilities over all experts. Shazeer et al. 2017, arXiv 1701.06538."""

    normalise: bool = True  # the chosen ones' scores are divided by their sum
    scale: float = 1.0  # of the gates

    def __post_init__(self):
        check_finite(scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Each expert's score is its own. DeepSeek-V3, arXiv 2412.19437, equation 15."""

    normalise: bool = True
    scale: float = 1.0

    def __post_init__(self):
        check_finite(scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """A loss on uneven load, of every sequence apart: DeepSeek-V3, equations 17 to 20, with the experts that were chosen.

    A sequence and not a batch is what it is defined on, so neither mesh nor microbatches change it.
    """

    weight: float = 0.01

    def __post_init__(self):
        check_finite(from_zero=True, weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class Bias:
    """No loss: a bias on the scores decides who is chosen, never the gates; after every step it rises by `speed` for
    experts below the mean load and falls for those above. DeepSeek-V3, section 2.1.2."""

    speed: float = 1e-3
    weight: float = 1e-4  # of the loss within a sequence, as Auxiliary's; 0: none

    def __post_init__(self):
        check_finite(from_zero=True, speed=self.speed, weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class Limited:
    """Of `groups` of experts, in order, a token chooses among the best `kept`, ranked by the sum of their best two."""

    groups: int
    kept: int


Router = Softmax | Sigmoid
Balance = Auxiliary | Bias


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The feed-forward of a mixture: `num_chosen` of `num_experts` narrow ones per token, and one that all pass."""

    num_experts: int
    num_chosen: int
    ffn: int  # of one expert
    shared_ffn: int | None = None  # of the shared expert; several shared ones are one as wide as all of them
    router: Router = Softmax()
    balance: Balance = Auxiliary()
    z_loss: float = 0.0  # weight of log(sum exp(logits))^2 per token: Zoph et al. 2022, arXiv 2202.08906, equation 5
    limited: Limited | None = None

    def __post_init__(self):
        check_positive({name: value for name, value in vars(self).items() if name != "z_loss"})
        check_finite(from_zero=True, z_loss=self.z_loss)
        if self.num_chosen > self.num_experts:
            raise UserError(
                f"num_chosen = {self.num_chosen} is more than there are experts.",
                got=f"num_experts {self.num_experts}",
                rule="a token chooses different experts",
                fix=f"num_chosen = {self.num_experts}",
            )
        if self.limited:
            _check_groups(self, self.limited)

    def weights(self, dim: int) -> list[tuple[str, str, Sizes, float]]:
        sizes: Sizes = {"E": ("num_experts", self.num_experts), "F": ("experts.ffn", self.ffn)}
        rows = [("router_LDE", "D", sizes, 1.0)]
        if isinstance(self.balance, Bias):
            rows.append(("router_bias_LE", ZERO, sizes, 1.0))
        part = self.num_chosen / self.num_experts
        rows += [(name, kind, sizes, part) for name, kind in zip(EXPERT, ("D", "D", ">F"), strict=True)]
        if self.shared_ffn:
            shared: Sizes = {"F": ("experts.shared_ffn", self.shared_ffn)}
            rows += [(name, kind, shared, 1.0) for name, kind in zip(SHARED, ("D", "D", ">F"), strict=True)]
        return rows


EXPERT = ("expert_gate_LEDF", "expert_up_LEDF", "expert_down_LEFD")
SHARED = ("shared_gate_LDF", "shared_up_LDF", "shared_down_LFD")


def _check_groups(experts: Experts, limited: Limited) -> None:
    per_group = experts.num_experts // max(limited.groups, 1)
    fits = limited.groups > 0 and experts.num_experts % limited.groups == 0 and 1 <= limited.kept <= limited.groups
    if not fits or per_group < 2 or limited.kept * per_group < experts.num_chosen:
        raise UserError(
            f"{limited.kept} of {limited.groups} groups do not hold the experts to choose.",
            got=f"num_experts {experts.num_experts}, num_chosen {experts.num_chosen}",
            rule="groups divides num_experts into two or more each, and the kept groups hold num_chosen",
        )


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """A decoder whose layers are mixtures of experts, after `dense_layers` that are not. Raises UserError."""

    heads: Grouped | Latent
    experts: Experts
    dense_layers: int = 0
    dense_ffn: int | None = None  # of those

    def __post_init__(self):
        if not 0 <= self.dense_layers < self.num_layers or (self.dense_layers > 0) != (self.dense_ffn is not None):
            raise UserError(
                f"dense_layers = {self.dense_layers}, dense_ffn = {self.dense_ffn} do not fit.",
                got=f"num_layers {self.num_layers}",
                rule="dense layers come first, fewer than num_layers, and have a dense_ffn",
            )
        super().__post_init__()

    def stacks(self) -> tuple[Stack, ...]:
        mixed = Stack(num_layers=self.num_layers - self.dense_layers, heads=self.heads, ffn=self.experts)
        if self.dense_ffn is None:
            return (mixed,)
        first = Stack(num_layers=self.dense_layers, heads=self.heads, ffn=Dense(ffn=self.dense_ffn), prefix="dense_")
        return first, mixed


def _grouped(num_heads: int, num_kv_heads: int, head_dim: int = 128, qk_norm: bool = False) -> Grouped:
    return Grouped(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, qk_norm=qk_norm)


def _qwen3(dim: int, num_layers: int, num_heads: int, ffn: int) -> Config:
    """The published config.json of Qwen3-30B-A3B and Qwen3-235B-A22B; Yang et al. 2025, arXiv 2505.09388, table 2."""
    return Config(
        vocab_size=151_936,
        dim=dim,
        num_layers=num_layers,
        heads=_grouped(num_heads, 4, qk_norm=True),
        experts=Experts(num_experts=128, num_chosen=8, ffn=ffn, balance=Auxiliary(weight=1e-3)),
        norm_eps=1e-6,
        rope_theta=1e6,
    )


def _small(dim: int, num_layers: int, num_heads: int, experts: Experts, vocab_size: int) -> Config:
    heads = _grouped(num_heads, num_heads // 2, dim // num_heads)
    shape = dict(vocab_size=vocab_size, dim=dim, num_layers=num_layers)
    return Config(heads=heads, experts=experts, rope_theta=10_000.0, **shape)


SIZES: dict[str, Config] = {
    "2m-a1m": _small(128, 4, 4, Experts(num_experts=8, num_chosen=4, ffn=128), 512),
    "30m-a10m": _small(256, 6, 8, Experts(num_experts=16, num_chosen=2, ffn=320, shared_ffn=320), 8192),
    # Jiang et al. 2024, arXiv 2401.04088, table 1, and the published config.json.
    "mixtral-8x7b": Config(
        vocab_size=32_000,
        dim=4096,
        num_layers=32,
        heads=_grouped(32, 8),
        experts=Experts(num_experts=8, num_chosen=2, ffn=14_336, balance=Auxiliary(weight=0.02)),
        rope_theta=1e6,
    ),
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 768),
    "qwen3-235b-a22b": _qwen3(4096, 94, 64, 1536),
    # arXiv 2412.19437, section 4.2; without multi-token prediction, and without YaRN, which came after pre-training.
    "deepseek-v3-671b": Config(
        vocab_size=129_280,
        dim=7168,
        num_layers=61,
        heads=Latent(num_heads=128, kv_latent=512, q_latent=1536, nope_dim=128, rope_dim=64, value_dim=128),
        experts=Experts(
            num_experts=256,
            num_chosen=8,
            ffn=2048,
            shared_ffn=2048,
            router=Sigmoid(scale=2.5),
            balance=Bias(speed=1e-3, weight=1e-4),
            limited=Limited(groups=8, kept=4),
        ),
        dense_layers=3,
        dense_ffn=18_432,
        norm_eps=1e-6,
        rope_theta=10_000.0,
    ),
}


def size(name: str, **changes: Any) -> Config:
    """The named size with these fields changed: `size("mixtral-8x7b", remat="full")`. Raises UserError."""
    if name not in SIZES:
        raise UserError(f"no mixture of size {name!r}.", fix=closest(name, SIZES))
    return dataclasses.replace(SIZES[name], **changes)
