"""The Llama decoder as an nnx module: parameters stacked over layers, and the forward pass. Sizes: models/llama.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import checkpoint_policies as policies

from meshes import constrain
from models.draw import normals
from models.kernels import attend
from models.layers import frequencies, regathered, rms_norm, rotate, rotations, swiglu, together

if TYPE_CHECKING:
    from models.llama import Config, Parameter

POLICIES = {
    "dots": policies.dots_saveable,
    "projections": policies.dots_with_no_batch_dims_saveable,
    "full": policies.nothing_saveable,
}


class Decoder(nnx.Module):
    """Pre-norm transformer: RMS norm, grouped-query rotary attention, SwiGLU. Touvron et al. 2023, arXiv 2302.13971.

    Matrices start as normals cut off at 2 deviations, of standard deviation 1 / sqrt(inputs); what writes to the
    residual stream is divided by sqrt(2 L) besides (Radford et al. 2019, section 2.3). Norms start at 1.
    """

    def __init__(self, config: Config, key: jax.Array):
        self.config = config
        for i, (name, parameter) in enumerate(config.parameters().items()):
            setattr(self, name, nnx.Param(_draw(jax.random.fold_in(key, i), parameter), letters=parameter.letters))

    def __call__(self, tokens_BS, segments_BS=None, positions_BS=None) -> jax.Array:
        """-> h_BSD, laid out as "BSD", final norm applied.

        segments_BS None: one document a row. positions_BS None: 0, 1, ... Raises LayoutError if a required way refuses.
        """
        cfg = self.config
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1])[None], tokens_BS.shape)
        rope = rotations(positions_BS, frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling))
        x_BRD = constrain(constrain(self.embed_VD[...], "VD")[tokens_BS], "BRD")

        def layer(x_BRD, w):
            return block(cfg, w, x_BRD, segments_BS, rope), None

        x_BRD = self._through(layer, x_BRD)
        return constrain(rms_norm(x_BRD, self.final_norm_D[...], cfg.norm_eps), "BSD")

    def unembedding(self) -> jax.Array:
        """-> w_DV, laid out as stored: the embedding transposed where the two are tied."""
        return self.embed_VD[...].T if self.config.tied else self.unembed_DV[...]

    def _through(self, layer, x_BRD) -> jax.Array:
        cfg = self.config
        stacked = {name: getattr(self, name)[...] for name, p in cfg.parameters().items() if p.letters[0] == "L"}
        if cfg.remat != "none":
            layer = jax.checkpoint(layer, policy=POLICIES[cfg.remat], prevent_cse=not cfg.scan_layers)
        if cfg.scan_layers:
            return jax.lax.scan(layer, x_BRD, stacked)[0]
        unstacked = {name: jnp.unstack(w) for name, w in stacked.items()}
        for i in range(cfg.num_layers):
            x_BRD, _ = layer(x_BRD, {name: w[i] for name, w in unstacked.items()})
        return x_BRD


def block(cfg: Config, w: dict[str, jax.Array], x_BRD, segments_BS, rope) -> jax.Array:
    """One layer: x_BRD -> x_BRD. The residual stream keeps the layout "BRD"; inside, attention and SwiGLU use "BSD"."""
    h_BRD = constrain(rms_norm(x_BRD, w["attn_norm_LD"], cfg.norm_eps), "BRD")
    q_BSNH, k_BSKH, v_BSKH = _qkv(h_BRD, w["q_LDNH"], w["k_LDKH"], w["v_LDKH"])
    q_BSNH, k_BSKH = rotate(q_BSNH, *rope), rotate(k_BSKH, *rope)
    o_BSNH = attend(cfg.attention, q_BSNH, k_BSKH, v_BSKH, segments_BS)
    x_BRD = x_BRD + _out(constrain(o_BSNH, "BSNH"), w["o_LNHD"])
    h_BRD = constrain(rms_norm(x_BRD, w["ffn_norm_LD"], cfg.norm_eps), "BRD")
    return x_BRD + swiglu(h_BRD, w["gate_LDF"], w["up_LDF"], w["down_LFD"])


@regathered
def _qkv(h_BRD, q_DNH, k_DKH, v_DKH):
    q_DNH, k_DKH, v_DKH = constrain(q_DNH, "DNH"), constrain(k_DKH, "DKH"), constrain(v_DKH, "DKH")
    q_BSNH, k_BSKH, v_BSKH = together(constrain(h_BRD, "BSD"), q_DNH, k_DKH, v_DKH, groups=k_DKH.shape[1])
    return constrain(q_BSNH, "BSNH"), constrain(k_BSKH, "BSKH"), constrain(v_BSKH, "BSKH")


@regathered
def _out(o_BSNH, o_NHD):
    return constrain(jnp.einsum("BSNH,NHD->BSD", o_BSNH, constrain(o_NHD, "NHD")), "BRD")


def _draw(key: jax.Array, parameter: Parameter) -> jax.Array:
    return normals(key, parameter.shape, parameter.std) if parameter.std else jnp.ones(parameter.shape, jnp.float32)
