"""Causal grouped-query attention over rows of documents, in the ways that models/attention.py chooses among."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from meshes import axis_size, constrain, context, platform
from models.attention import Attention, Chunked, CuDNN, Site, Tiled, choose


def attend(wanted: Attention, q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BS=None) -> jax.Array:
    """-> o_BSNH: each query over the keys of its own document up to itself, softmax in float32, scaled by 1 / sqrt(H).

    N is a multiple of K; a run of N / K query heads shares a key head. Laid out as "BSNH" by the current rules. Raises
    LayoutError where `wanted` is required and refuses.
    """
    if context.exchanges():
        return context.exchanged(partial(attend, wanted), q_BSNH, k_BSKH, v_BSKH, segments_BS)
    seq_len = q_BSNH.shape[1]
    site = Site(
        platform=platform(),
        dtype=q_BSNH.dtype.name,
        seq_len=seq_len,
        head_dim=max(q_BSNH.shape[-1], v_BSKH.shape[-1]),
        packed=segments_BS is not None,
        shards=axis_size("S"),
    )
    way = choose(wanted, site)
    if isinstance(way, Tiled):
        return context.attend(q_BSNH, k_BSKH, v_BSKH, segments_BS, tile=way.tile)
    q_BSNH, k_BSKH, v_BSKH = constrain(q_BSNH, "BSNH"), constrain(k_BSKH, "BSKH"), constrain(v_BSKH, "BSKH")
    if isinstance(way, CuDNN):
        return cudnn(q_BSNH, k_BSKH, v_BSKH, segments_BS)
    chunk = (way.chunk or max(64, -(-seq_len // 16))) if isinstance(way, Chunked) else seq_len
    return chunked(q_BSNH, k_BSKH, v_BSKH, segments_BS, chunk)


def cudnn(q_BSNH, k_BSKH, v_BSKH, segments_BS) -> jax.Array:
    """NVIDIA's kernel; documents become a mask, which it adds to the logits."""
    mask = None
    if segments_BS is not None:
        mask = constrain(segments_BS[:, None, :, None] == segments_BS[:, None, None, :], "B___")
    widths = q_BSNH.shape[-1], v_BSKH.shape[-1]  # two in latent attention; the kernel wants one
    padded = [jnp.pad(x, [(0, 0)] * 3 + [(0, max(widths) - x.shape[-1])]) for x in (q_BSNH, k_BSKH, v_BSKH)]
    o_BSNH = jax.nn.dot_product_attention(
        *padded, mask=mask, scale=_scale(k_BSKH), is_causal=True, implementation="cudnn"
    )
    return o_BSNH[..., : widths[1]]


def chunked(q_BSNH, k_BSKH, v_BSKH, segments_BS, chunk: int) -> jax.Array:
    """Chunk by chunk of queries, each against the keys before its end: (1 + chunk / S) / 2 of the whole square.

    The backward is written out, from the kept exp(logits) and their sums: on CPU the training step takes 8 % less time
    than with the derived one.
    """
    B, S, N, H = q_BSNH.shape
    K = k_BSKH.shape[2]
    q_BKGSH = jnp.moveaxis(q_BSNH.reshape(B, S, K, N // K, H), 1, 3)
    k_BKTH, v_BKTH = jnp.moveaxis(k_BSKH, 1, 2), jnp.moveaxis(v_BSKH, 1, 2)
    segments = None if segments_BS is None else (segments_BS, segments_BS)
    return jnp.moveaxis(_causal(q_BKGSH, k_BKTH, v_BKTH, segments, chunk), 3, 1).reshape(B, S, N, -1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal(q_BKGSH, k_BKTH, v_BKTH, segments, chunk: int) -> jax.Array:
    """`segments`: of the queries BS and of the keys BT, or None."""
    return _forward(q_BKGSH, k_BKTH, v_BKTH, segments, chunk)[0]


def _forward(q_BKGSH, k_BKTH, v_BKTH, segments, chunk):
    """Keeps p = exp(logits - their maximum), in the dtype of v, and its row sums z >= 1: the softmax is p / z."""
    out, kept = [], []
    for span, before in _spans(q_BKGSH.shape[3], chunk):
        k, v = k_BKTH[:, :, before], v_BKTH[:, :, before]
        logits = _product("BKGSH,BKTH->BKGST", q_BKGSH[:, :, :, span], k) * _scale(k)
        logits = jnp.where(_mask(segments, span, before), logits, -1e30)
        p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        z, p = p.sum(axis=-1, keepdims=True), p.astype(v.dtype)
        out.append((_product("BKGST,BKTH->BKGSH", p, v) / z).astype(v.dtype))
        kept.append((p, z))
    o_BKGSH = jnp.concatenate(out, axis=3)
    return o_BKGSH, (q_BKGSH, k_BKTH, v_BKTH, o_BKGSH, kept)


def _backward(chunk: int, residuals, do_BKGSH):
    """dlogits = softmax * (dp - sum(do * o)): its sum over H is one over keys. Dao et al. 2022, arXiv 2205.14135."""
    q_BKGSH, k_BKTH, v_BKTH, o_BKGSH, kept = residuals
    delta = (do_BKGSH.astype(jnp.float32) * o_BKGSH).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k_BKTH.shape, jnp.float32), jnp.zeros(v_BKTH.shape, jnp.float32)
    for (span, before), (p, z) in zip(_spans(q_BKGSH.shape[3], chunk), kept, strict=True):
        k, v, dtype = k_BKTH[:, :, before], v_BKTH[:, :, before], v_BKTH.dtype
        do = (do_BKGSH[:, :, :, span] / z).astype(dtype)
        dp = _product("BKGSH,BKTH->BKGST", do, v)
        dlogits = (p * (dp - delta[:, :, :, span] / z) * _scale(k)).astype(dtype)
        dq.append(_product("BKGST,BKTH->BKGSH", dlogits, k))
        dk = dk.at[:, :, before].add(_product("BKGST,BKGSH->BKTH", dlogits, q_BKGSH[:, :, :, span]))
        dv = dv.at[:, :, before].add(_product("BKGST,BKGSH->BKTH", p, do))
    dq_BKGSH = jnp.concatenate(dq, axis=3)
    return dq_BKGSH.astype(q_BKGSH.dtype), dk.astype(k_BKTH.dtype), dv.astype(v_BKTH.dtype), None


_causal.defvjp(_forward, _backward)
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _spans(S: int, chunk: int) -> list[tuple[slice, slice]]:
    """(a chunk of queries, the keys up to its end)."""
    return [(slice(start, min(start + chunk, S)), slice(0, min(start + chunk, S))) for start in range(0, S, chunk)]


def _mask(segments, span: slice, before: slice) -> jax.Array:
    queries, keys = jnp.arange(span.start, span.stop)[None, :, None], jnp.arange(before.stop)[None, None, :]
    mask_BST = queries >= keys
    if segments is not None:
        mask_BST = mask_BST & (segments[0][:, span, None] == segments[1][:, None, before])
    return mask_BST[:, None, None]


def _scale(k_BKTH) -> float:
    return k_BKTH.shape[-1] ** -0.5
