"""The layers that architectures share: RMS norm, rotary positions, SwiGLU. It holds no parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from meshes import constrain

if TYPE_CHECKING:
    from models.llama import RopeScaling


def regathered(product):
    """A function linear in its activations whose backward lays out its weights anew instead of keeping them laid out.

    Kept, the gathered weights of every layer would be alive together and FSDP's memory lost. Nothing is multiplied twice.
    """
    return jax.checkpoint(product)


def rms_norm(x_BSD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x_BSD, scale_D -> x over its root mean square, scaled; statistics in float32. Zhang & Sennrich 2019, arXiv 1910.07467."""
    x32_BSD = x_BSD.astype(jnp.float32)
    inverse_BS1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BSD), axis=-1, keepdims=True) + eps)
    return (x32_BSD * inverse_BS1).astype(x_BSD.dtype) * constrain(scale_D, "D")[None, None]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each pair of a head's dims, float32. Scaling as in Meta's reference code, `apply_scaling`."""
    freqs = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_position * freqs / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0, 1)  # 1: fast, left as it is; 0: slow, slowed in full
        freqs = freqs * (kept + (1 - kept) / scaling.factor)
    return freqs.astype(np.float32)


def rotations(positions_BS: jax.Array, freqs: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """positions_BS -> cos_BSH, sin_BSH of every pair's angle, in float32; H is half a head here."""
    angles_BSH = positions_BS.astype(jnp.float32)[:, :, None] * freqs[None, None]
    return jnp.cos(angles_BSH), jnp.sin(angles_BSH)


def rotate(x_BSNH: jax.Array, cos_BSH: jax.Array, sin_BSH: jax.Array) -> jax.Array:
    """x_BSNH with dim i of a head turned against dim i + H/2, as in Hugging Face weights. Su et al. 2021, arXiv 2104.09864."""
    a, b = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BSH[:, :, None], sin_BSH[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSNH.dtype)


def swiglu(x_BRD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """x_BRD -> (silu(x gate) * x up) down, laid out as "BRD" too. Shazeer 2020, arXiv 2002.05202."""
    gate_BSF, up_BSF = _gate_up(x_BRD, gate_DF, up_DF)
    return _down(constrain(jax.nn.silu(gate_BSF) * up_BSF, "BSF"), down_FD)


@regathered
def _gate_up(x_BRD, gate_DF, up_DF):
    # One product instead of two, on CPU 2-8 % of a layer; stacked beside F, so that F stays where it is sharded.
    fused_D2F = jnp.stack([constrain(gate_DF, "DF"), constrain(up_DF, "DF")], axis=1)
    h_BS2F = constrain(jnp.einsum("BSD,DCF->BSCF", constrain(x_BRD, "BSD"), fused_D2F), "BS_F")
    return h_BS2F[:, :, 0], h_BS2F[:, :, 1]


@regathered
def _down(h_BSF, down_FD):
    return constrain(h_BSF @ constrain(down_FD, "FD"), "BRD")
