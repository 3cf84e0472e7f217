"""The layers that architectures share: RMS norm, rotary positions, SwiGLU. It holds no parameters."""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from meshes import axis_size, constrain, overlap, platform

if TYPE_CHECKING:
    from models.family import RopeScaling

_in_loop: ContextVar[bool] = ContextVar("in_loop", default=False)


def regathered(product):
    """A function linear in its activations whose backward lays out its weights anew instead of keeping them laid out.

    Kept, all layers' gathered weights would be alive together and FSDP's memory lost. Nothing is multiplied twice.
    """
    apart, shared = jax.checkpoint(product), jax.checkpoint(product, prevent_cse=False)

    @functools.wraps(product)
    def call(*args):
        return (shared if _in_loop.get() else apart)(*args)

    return call


@contextlib.contextmanager
def in_loop():
    """Layers are traced here as the body of a loop: its forward and backward are two loops, and nothing that one gathers
    is at hand in the other. So what remat computes again may share a gather with the backward, where apart from a loop
    it is kept from sharing with the forward. In programs in part by hand the layers' weights were gathered three times."""
    token = _in_loop.set(True)
    try:
        yield
    finally:
        _in_loop.reset(token)


def rms_norm(x_BSD: jax.Array, scale_D: jax.Array, eps: float, letter: str = "D") -> jax.Array:
    """x_BSD over its root mean square, scaled; statistics in float32. Zhang & Sennrich 2019, arXiv 1910.07467.

    `letter`: of the last dim, which is normalised; any number of dims before it.
    """
    x32_BSD = x_BSD.astype(jnp.float32)
    inverse_BS1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BSD), axis=-1, keepdims=True) + eps)
    scale_D = jnp.expand_dims(constrain(scale_D, letter), tuple(range(x_BSD.ndim - 1)))
    return (x32_BSD * inverse_BS1).astype(x_BSD.dtype) * scale_D


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each pair of a head's dims, float32; scaled as Meta's reference code does."""
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
    """x_BSNH, dim i of a head turned against i + H/2, as Hugging Face does. Su et al. 2021, arXiv 2104.09864."""
    a, b = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BSH[:, :, None], sin_BSH[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSNH.dtype)


def together(x_BSD: jax.Array, *weights_DNH: jax.Array, groups: int) -> list[jax.Array]:
    """x_BSD times each weight -> BSNH each, N of its own for each; `groups` divides every N.

    On CPU as one product, which saves 2-8 % of a layer; joined group by group, so that a sharded N stays where it is:
    heads of which only some are cut (K whole, N not) are apart, as one array of both would be exchanged to be cut.
    On GPU apart: the gradient of joined weights is all-reduced whole, where that of each alone is reduce-scattered.
    """
    heads = max(w.shape[1] for w in weights_DNH) > 1
    if platform() != "cpu" or (heads and axis_size("N") != axis_size("K")):
        return [jnp.einsum("BSD,DNH->BSNH", x_BSD, w) for w in weights_DNH]
    weights_DKCH = [w.reshape(w.shape[0], groups, -1, w.shape[2]) for w in weights_DNH]
    joined = jnp.einsum("BSD,DKCH->BSKCH", x_BSD, jnp.concatenate(weights_DKCH, axis=2))
    parts = jnp.split(joined, np.cumsum([w.shape[2] for w in weights_DKCH])[:-1], axis=3)
    return [part.reshape(*x_BSD.shape[:2], -1, part.shape[-1]) for part in parts]


def swiglu(x_BRD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """x_BRD -> (silu(x gate) * x up) down, laid out as "BRD" too. Shazeer 2020, arXiv 2002.05202."""
    gate_BSF, up_BSF = _gate_up(x_BRD, gate_DF, up_DF)
    return _down(constrain(jax.nn.silu(gate_BSF) * up_BSF, "BSF"), down_FD)


@regathered
def _gate_up(x_BRD, gate_DF, up_DF):
    if overlap.rings():
        return tuple(overlap.gathered(x_BRD, [gate_DF, up_DF], ["DF", "DF"]))
    gate_DF, up_DF = constrain(gate_DF, "DF"), constrain(up_DF, "DF")
    outputs = together(constrain(x_BRD, "BSD"), gate_DF[:, None], up_DF[:, None], groups=1)
    return tuple(constrain(out[:, :, 0], "BSF") for out in outputs)


@regathered
def _down(h_BSF, down_FD):
    if overlap.rings():
        return overlap.scattered(h_BSF, down_FD, "FD")
    return _scattered(h_BSF @ constrain(down_FD, "FD"))


@regathered
def project_out(o_BSNH, o_NHD):
    """o_BSNH -> BRD: what attention writes to the residual stream."""
    if overlap.rings():
        return overlap.scattered(o_BSNH, o_NHD, "NHD")
    return _scattered(jnp.einsum("BSNH,NHD->BSD", o_BSNH, constrain(o_NHD, "NHD")))


def _scattered(x_BSD):
    """To BRD by way of BSD: its gradient is then gathered once, where the partitioner would for each of two products."""
    return constrain(constrain(x_BSD, "BSD"), "BRD")
