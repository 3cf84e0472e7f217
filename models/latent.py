"""The maths of multi-head latent attention: latents, heads from them, and the key that all heads share. No cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from meshes import constrain, overlap
from models.kernels import attend
from models.layers import project_out, regathered, rms_norm, rotate

if TYPE_CHECKING:
    from models.family import DecoderConfig
    from models.mla import Latent


def latent(cfg: DecoderConfig, heads: Latent, w: dict[str, jax.Array], h_BRD, segments_BS, rope) -> jax.Array:
    """h_BRD -> BRD. DeepSeek-V2, equations 9 to 19: c = norm(h W_down), [k; v] = c W_up, and rotated parts beside them.

    For training, heads are made from latents and attention runs over heads; the absorbed form would be for decoding.
    """
    of_residual = ["q_LDNH" if heads.q_latent is None else "q_down_LDZ", "kv_down_LDZ", "k_rope_LDH"]
    q, kv_BSZ, k_rope_BSH = _of_residual(h_BRD, *(w[name] for name in of_residual))
    if heads.q_latent is None:
        q_BSNH = q
    else:
        q_BSNH = _heads(rms_norm(q, w["q_norm_LA"], cfg.norm_eps, "A"), w["q_up_LANH"])
    kv_BSNH = _heads(rms_norm(kv_BSZ, w["kv_norm_LA"], cfg.norm_eps, "A"), w["kv_up_LANH"])
    k_BSNH, v_BSNH = jnp.split(kv_BSNH, [heads.nope_dim], axis=-1)
    k_rope_BSNH = rotate(k_rope_BSH[:, :, None], *rope)
    k_rope_BSNH = jnp.broadcast_to(k_rope_BSNH, (*k_BSNH.shape[:3], heads.rope_dim))
    q_nope_BSNH, q_rope_BSNH = jnp.split(q_BSNH, [heads.nope_dim], axis=-1)
    q_BSNH = jnp.concatenate([q_nope_BSNH, rotate(q_rope_BSNH, *rope)], axis=-1)
    k_BSNH = jnp.concatenate([k_BSNH, k_rope_BSNH], axis=-1)
    o_BSNH = attend(cfg.attention, q_BSNH, k_BSNH, v_BSNH, segments_BS)
    return project_out(constrain(o_BSNH, "BSNH"), w["o_LNHD"])


@regathered
def _of_residual(h_BRD, *weights) -> tuple[jax.Array, ...]:
    """Products of the residual stream with weights "DZ" or "DNH"."""
    letters = ["DZ" if w.ndim == 2 else "DNH" for w in weights]
    if overlap.rings():
        return tuple(overlap.gathered(h_BRD, weights, letters))
    h_BSD = constrain(h_BRD, "BSD")
    products = [jnp.tensordot(h_BSD, constrain(w, name), 1) for w, name in zip(weights, letters, strict=True)]
    return tuple(constrain(x, "BS" + name[1:]) for x, name in zip(products, letters, strict=True))


@regathered
def _heads(c_BSA, up_ANH):
    return constrain(jnp.einsum("BSA,ANH->BSNH", c_BSA, constrain(up_ANH, "ANH")), "BSNH")
