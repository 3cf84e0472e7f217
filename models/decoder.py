"""The decoder of every family as an nnx module: parameters stacked over layers, and the forward pass. It has no sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import checkpoint_policies as policies

from meshes import constrain, overlap
from meshes.context import columns
from meshes.lookup import look_up
from meshes.pipeline import in_stage
from models.draw import normals
from models.kernels import attend
from models.family import Dense, Grouped, Stack
from models.latent import latent
from models.layers import frequencies, in_loop, project_out, regathered, rms_norm, rotate, rotations, swiglu, together
from models.mla import Latent
from models.moe import Bias, Experts
from models.routed import metrics, moved, routed

if TYPE_CHECKING:
    from models.family import DecoderConfig, Parameter

Extras = dict[str, jax.Array]  # fp32 sums over tokens: "objective", and by layer whatever else a model counts
POLICIES = {
    "dots": policies.dots_saveable,
    "projections": policies.dots_with_no_batch_dims_saveable,
    "full": policies.nothing_saveable,
}


class Decoder(nnx.Module):
    """Pre-norm transformer: RMS norm, rotary attention, SwiGLU. Touvron et al. 2023, arXiv 2302.13971. What a layer
    attends and feeds forward with is what its stack in the config says.

    Matrices start as normals cut off at 2 deviations, of standard deviation 1 / sqrt(inputs); what writes to the
    residual stream is divided by sqrt(2 L) besides (Radford et al. 2019, section 2.3). Norms start at 1. Routers are exact:
    two near scores of experts must not become equal, nor a small change of a bias be lost (Fedus et al. 2021, arXiv
    2101.03961, section 2.4).
    """

    def __init__(self, config: DecoderConfig, key: jax.Array):
        self.config = config
        for i, (name, parameter) in enumerate(config.parameters().items()):
            kept = dict(letters=parameter.letters, exact="router" in name)
            setattr(self, name, nnx.Param(_draw(jax.random.fold_in(key, i), parameter), **kept))

    def __call__(self, tokens_BS, segments_BS=None, positions_BS=None) -> tuple[jax.Array, Extras]:
        """-> h_BSD, laid out as "BSD", final norm applied, and what the layers add up beside it.

        segments_BS None: one document a row. positions_BS None: 0, 1, ... Raises LayoutError if a required way refuses.
        """
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(columns(tokens_BS.shape[1])[None], tokens_BS.shape)
        x_BRD, found = self.embed(tokens_BS), []
        for stack, weights in enumerate(self.stacks()):
            x_BRD, extras = self.through(stack, weights, x_BRD, segments_BS, positions_BS)
            found.append(extras)
        return self.final(x_BRD), joined(found)

    def embed(self, tokens_BS) -> jax.Array:
        """tokens_BS -> x_BRD, the start of the residual stream."""
        return constrain(look_up(self.embed_VD[...], tokens_BS), "BRD")

    def stacks(self) -> tuple[dict[str, jax.Array], ...]:
        """In order of execution: the parameters of equal layers by name, L first."""
        return tuple(self._weights(stack) for stack in self.config.stacks())

    def _weights(self, stack: Stack) -> dict[str, jax.Array]:
        names = stack.parameters(self.config.dim, self.config.num_layers)
        return {name: getattr(self, stack.prefix + name)[...] for name in names}

    def through(self, stack: int, weights: dict[str, jax.Array], x_BRD, segments_BS, positions_BS):
        """x_BRD through the layers that `weights` holds, any number of rows of that stack -> (x_BRD, extras)."""
        cfg, kind = self.config, self.config.stacks()[stack]
        if segments_BS is not None:  # else the partitioner takes their layout from "BR", and exchanges parts in attention
            segments_BS = constrain(segments_BS, "BS")
        rope = rotations(positions_BS, frequencies(kind.heads.rope_dim, cfg.rope_theta, cfg.rope_scaling))

        def layer(x_BRD, w):
            return block(cfg, kind, w, x_BRD, segments_BS, rope)

        x_BRD, extras = self._layers(layer, x_BRD, weights)
        return x_BRD, extras | {name: extras[name].sum() for name in extras.keys() & {"objective"}}

    def final(self, x_BRD) -> jax.Array:
        """x_BRD -> h_BSD: the final norm."""
        return constrain(rms_norm(x_BRD, self.final_norm_D[...], self.config.norm_eps), "BSD")

    def unembedding(self) -> jax.Array:
        """-> w_DV, laid out as stored: the embedding transposed where the two are tied."""
        return self.embed_VD[...].T if self.config.tied else self.unembed_DV[...]

    def after_update(self, params: dict[str, jax.Array], extras: Extras) -> dict[str, jax.Array]:
        """The optimizer's parameters, but for the biases of experts, which follow the load."""
        for stack in self.config.stacks():
            if isinstance(stack.ffn, Experts) and isinstance(stack.ffn.balance, Bias):
                name = stack.prefix + "router_bias_LE"
                params = params | {name: moved(stack.ffn.balance, getattr(self, name)[...], extras["load"])}
        return params

    def metrics(self, extras: Extras) -> dict[str, jax.Array]:
        """What the experts counted; a dense decoder has none."""
        return metrics(extras) if "load" in extras else {}

    def _layers(self, layer, x_BRD, weights):
        cfg = self.config
        # A stage keeps the residuals of each microbatch: of a scan all but the weights, else a copy of every layer's too.
        scan = cfg.scan_layers or in_stage()
        if cfg.remat != "none":
            layer = jax.checkpoint(layer, policy=POLICIES[cfg.remat], prevent_cse=not scan)
        if scan:
            with in_loop():
                return jax.lax.scan(layer, x_BRD, weights)
        unstacked = {name: jnp.unstack(w) for name, w in weights.items()}
        found = []
        for i in range(len(next(iter(unstacked.values())))):
            x_BRD, extras = layer(x_BRD, {name: w[i] for name, w in unstacked.items()})
            found.append(extras)
        return x_BRD, jax.tree.map(lambda *rows: jnp.stack(rows), *found)


def joined(found: list[Extras]) -> Extras:
    """The extras of consecutive layers as one: the objective added, the rest one layer after the other."""
    names = dict.fromkeys(name for extras in found for name in extras)
    columns = {name: [extras[name] for extras in found if name in extras] for name in names}
    return {name: sum(rows) if name == "objective" else jnp.concatenate(rows) for name, rows in columns.items()}


def block(cfg: DecoderConfig, kind: Stack, w: dict[str, jax.Array], x_BRD, segments_BS, rope) -> tuple[jax.Array, Extras]:
    """One layer: x_BRD -> x_BRD, extras. The residual stream keeps the layout "BRD"; inside, the halves use "BSD"."""
    h_BRD = constrain(rms_norm(x_BRD, w["attn_norm_LD"], cfg.norm_eps), "BRD")
    x_BRD = x_BRD + ATTENTION[type(kind.heads)](cfg, kind.heads, w, h_BRD, segments_BS, rope)
    h_BRD = constrain(rms_norm(x_BRD, w["ffn_norm_LD"], cfg.norm_eps), "BRD")
    y_BRD, extras = FEED_FORWARD[type(kind.ffn)](cfg, kind.ffn, w, h_BRD, segments_BS)
    return x_BRD + y_BRD, extras


def grouped(cfg: DecoderConfig, heads: Grouped, w: dict[str, jax.Array], h_BRD, segments_BS, rope) -> jax.Array:
    """h_BRD -> BRD: grouped-query attention."""
    q_BSNH, k_BSKH, v_BSKH = _qkv(h_BRD, w["q_LDNH"], w["k_LDKH"], w["v_LDKH"])
    if heads.qk_norm:
        q_BSNH = rms_norm(q_BSNH, w["q_norm_LH"], cfg.norm_eps, "H")
        k_BSKH = rms_norm(k_BSKH, w["k_norm_LH"], cfg.norm_eps, "H")
    q_BSNH, k_BSKH = rotate(q_BSNH, *rope), rotate(k_BSKH, *rope)
    o_BSNH = attend(cfg.attention, q_BSNH, k_BSKH, v_BSKH, segments_BS)
    return project_out(constrain(o_BSNH, "BSNH"), w["o_LNHD"])


def dense(cfg: DecoderConfig, ffn: Dense, w: dict[str, jax.Array], h_BRD, segments_BS) -> tuple[jax.Array, Extras]:
    """h_BRD -> BRD: one SwiGLU for all tokens."""
    return swiglu(h_BRD, w["gate_LDF"], w["up_LDF"], w["down_LFD"]), {}


ATTENTION = {Grouped: grouped, Latent: latent}
FEED_FORWARD = {Dense: dense, Experts: routed}


@regathered
def _qkv(h_BRD, q_DNH, k_DKH, v_DKH):
    if overlap.rings():
        return tuple(overlap.gathered(h_BRD, [q_DNH, k_DKH, v_DKH], ["DNH", "DKH", "DKH"]))
    q_DNH, k_DKH, v_DKH = constrain(q_DNH, "DNH"), constrain(k_DKH, "DKH"), constrain(v_DKH, "DKH")
    q_BSNH, k_BSKH, v_BSKH = together(constrain(h_BRD, "BSD"), q_DNH, k_DKH, v_DKH, groups=k_DKH.shape[1])
    return constrain(q_BSNH, "BSNH"), constrain(k_BSKH, "BSKH"), constrain(v_BSKH, "BSKH")


def _draw(key: jax.Array, parameter: Parameter) -> jax.Array:
    if parameter.std:
        return normals(key, parameter.shape, parameter.std)
    return jnp.full(parameter.shape, parameter.start, jnp.float32)
