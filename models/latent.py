"""The maths of multi-head latent attention: latents, heads from them, and the key that all heads share. No cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from meshes import constrain
from models.kernels import attend
from models.layers import project_out, regathered, rms_norm, rotate

if TYPE_CHECKING:
    from models.family import DecoderConfig
    from models.mla import Latent


def latent(cfg: DecoderConfig, heads: Latent, w: dict[str, jax.Array], h_BRD, segments_BS, rope) -> jax.Array:
    """h_BRD -> BRD. DeepSeek-V2, equations 9 to 19: c = norm(h W_down), [k; v] = c W_up, and rotated parts beside them.

    For training, heads are made from latents and attention runs over heads; the absorbed form would be for decoding.
    """
    h_BSD = constrain(h_BRD, "BSD")
    if heads.q_latent is None:
        q_BSNH = _heads_of_residual(h_BSD, w["q_LDNH"])
    else:
        q_BSNH = _heads(_compressed(cfg, h_BSD, w["q_down_LDZ"], w["q_norm_LA"]), w["q_up_LANH"])
    kv_BSNH = _heads(_compressed(cfg, h_BSD, w["kv_down_LDZ"], w["kv_norm_LA"]), w["kv_up_LANH"])
    k_BSNH, v_BSNH = jnp.split(kv_BSNH, [heads.nope_dim], axis=-1)
    k_rope_BSNH = rotate(_down(h_BSD, w["k_rope_LDH"])[:, :, None], *rope)
    k_rope_BSNH = jnp.broadcast_to(k_rope_BSNH, (*k_BSNH.shape[:3], heads.rope_dim))
    q_nope_BSNH, q_rope_BSNH = jnp.split(q_BSNH, [heads.nope_dim], axis=-1)
    q_BSNH = jnp.concatenate([q_nope_BSNH, rotate(q_rope_BSNH, *rope)], axis=-1)
    k_BSNH = jnp.concatenate([k_BSNH, k_rope_BSNH], axis=-1)
    o_BSNH = attend(cfg.attention, q_BSNH, k_BSNH, v_BSNH, segments_BS)
    return project_out(constrain(o_BSNH, "BSNH"), w["o_LNHD"])


def _compressed(cfg, h_BSD, down_DZ, norm_A) -> jax.Array:
    return rms_norm(_down(h_BSD, down_DZ), norm_A, cfg.norm_eps, "A")


@regathered
def _down(h_BSD, down_DZ):
    return constrain(h_BSD @ constrain(down_DZ, "DZ"), "BSZ")


@regathered
def _heads(c_BSA, up_ANH):
    return constrain(jnp.einsum("BSA,ANH->BSNH", c_BSA, constrain(up_ANH, "ANH")), "BSNH")


@regathered
def _heads_of_residual(h_BSD, q_DNH):
    return constrain(jnp.einsum("BSD,DNH->BSNH", h_BSD, constrain(q_DNH, "DNH")), "BSNH")
