"""The maths of a mixture's layer: router, gates, losses on load, shared expert. Transport is meshes/experts.py's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from meshes import constrain, experts
from models.layers import swiglu
from models.moe import EXPERT, SHARED, Auxiliary, Bias, Experts, Limited, Sigmoid

if TYPE_CHECKING:
    from models.family import DecoderConfig


def routed(cfg: DecoderConfig, mix: Experts, w: dict[str, jax.Array], h_BRD, segments_BS) -> tuple[jax.Array, dict]:
    """h_BRD -> BRD, and extras of this layer: the objective, tokens per expert "load" E, of which "dropped" E.

    Tokens of segment 0 are padding: they choose no expert and count nowhere.
    """
    live_BR = jnp.ones(h_BRD.shape[:2], bool) if segments_BS is None else constrain(segments_BS > 0, "BR")
    logits_BRE = _logits(h_BRD, w["router_LDE"])
    scores_BRE = jax.nn.sigmoid(logits_BRE) if isinstance(mix.router, Sigmoid) else jax.nn.softmax(logits_BRE, axis=-1)
    chosen_BRk, gates_BRk = (constrain(x, "BR_") for x in choose(mix, scores_BRE, w.get("router_bias_LE")))
    if mix.router.normalise:
        gates_BRk = gates_BRk / (gates_BRk.sum(-1, keepdims=True) + 1e-20)  # sigmoids may all be 0
    hit_BRE = (chosen_BRk[..., None] == jnp.arange(mix.num_experts)[None, None, None]).any(2) & live_BR[..., None]
    chosen_BRk = jnp.where(live_BR[..., None], chosen_BRk, mix.num_experts)
    y_BRD, dropped_E = _through_experts(h_BRD, chosen_BRk, mix.router.scale * gates_BRk, [w[name] for name in EXPERT])
    if mix.shared_ffn:
        y_BRD = y_BRD + swiglu(h_BRD, *(w[name] for name in SHARED))
    objective = _objective(mix, logits_BRE, scores_BRE, hit_BRE, live_BR)
    load_E = hit_BRE.sum((0, 1)).astype(jnp.float32)
    return y_BRD, {"objective": objective, "load": load_E, "dropped": dropped_E}


def _logits(h_BRD, router_DE) -> jax.Array:
    """In float32 whatever the model computes in: two near scores must not become equal."""
    h_BRD, router_DE = constrain(h_BRD, "BRD").astype(jnp.float32), constrain(router_DE, "D_").astype(jnp.float32)
    return constrain(jnp.einsum("BRD,DE->BRE", h_BRD, router_DE, precision="highest"), "BR_")


def choose(mix: Experts, scores_BRE, bias_E=None) -> tuple[jax.Array, jax.Array]:
    """-> chosen_BRk, the best first; equal ones by number; and their scores. No gradient passes through the choice, nor
    to the bias."""
    ranked_BRE = jax.lax.stop_gradient(scores_BRE)
    if bias_E is not None:
        ranked_BRE = ranked_BRE + constrain(jax.lax.stop_gradient(bias_E), "_").astype(jnp.float32)[None, None]
    return experts.per_token(partial(_best, mix), scores_BRE, ranked_BRE)


def _best(mix: Experts, scores_BRE, ranked_BRE) -> tuple[jax.Array, jax.Array]:
    if mix.limited:
        ranked_BRE = _within(mix.limited, ranked_BRE)
    chosen_BRk = jax.lax.top_k(ranked_BRE, mix.num_chosen)[1]
    return chosen_BRk, jnp.take_along_axis(scores_BRE, chosen_BRk, axis=-1)


def _within(limited: Limited, scores_BRE) -> jax.Array:
    """-inf outside the best groups. DeepSeek-V3, section 2.1.2, "node-limited routing"."""
    of_group = scores_BRE.reshape(*scores_BRE.shape[:2], limited.groups, -1)
    rank = jax.lax.top_k(of_group, 2)[0].sum(-1)
    best = jax.lax.top_k(rank, limited.kept)[1]
    kept = (best[..., None] == jnp.arange(limited.groups)[None, None, None]).any(2)
    return jnp.where(kept[..., None], of_group, -jnp.inf).reshape(scores_BRE.shape)


def _objective(mix: Experts, logits_BRE, scores_BRE, hit_BRE, live_BR) -> jax.Array:
    """A sum over tokens: z-loss, and T sum_e f_e P_e of each sequence of T tokens, f_e = E / (k T) choices of e."""
    live_BR = live_BR.astype(jnp.float32)
    share_BRE = scores_BRE / scores_BRE.sum(-1, keepdims=True) * live_BR[..., None]
    tokens_B = jnp.maximum(live_BR.sum(1), 1.0)
    chosen_BE = hit_BRE.sum(1).astype(jnp.float32)
    uneven = (chosen_BE * share_BRE.sum(1)).sum(-1) / tokens_B * (mix.num_experts / mix.num_chosen)
    z = (jax.nn.logsumexp(logits_BRE, axis=-1) ** 2 * live_BR).sum()
    return mix.balance.weight * uneven.sum() + mix.z_loss * z


def _kept(primitive, *_, **__) -> bool:
    return primitive.name != "sharding_constraint"


@partial(jax.checkpoint, policy=_kept)
def _through_experts(h_BRD, chosen_BRk, gates_BRk, weights) -> tuple[jax.Array, jax.Array]:
    """The backward pass gathers the experts' weights anew instead of keeping all layers' of them; the rest is kept."""
    return experts.apply(experts.Weights(*weights), h_BRD, chosen_BRk, gates_BRk)


def moved(balance: Auxiliary | Bias, bias_LE, load_LE) -> jax.Array:
    """The bias after a step in which the experts were chosen this often, over the whole batch."""
    return bias_LE + balance.speed * jnp.sign(load_LE.mean(1, keepdims=True) - load_LE)


def metrics(extras: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`load`: choices of each expert, by layer, a list of lists; `max_load`: of the fullest, over the mean."""
    load_LE = extras["load"]
    return {
        "experts/dropped_fraction": extras["dropped"].sum() / jnp.maximum(load_LE.sum(), 1.0),
        "experts/max_load": (load_LE.max(1) / jnp.maximum(load_LE.mean(1), 1.0)).max(),
        "experts/load": load_LE.astype(jnp.int32),
    }
