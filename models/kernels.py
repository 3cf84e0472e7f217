"""Causal grouped-query attention over rows of documents, in the ways that models/attention.py chooses among."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from meshes import axis_size, constrain, platform
from models.attention import Attention, Chunked, CuDNN, Site, choose


def attend(wanted: Attention, q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BS=None) -> jax.Array:
    """-> o_BSNH: each query over the keys of its own document up to itself, softmax in float32, scaled by 1 / sqrt(H).

    N is a multiple of K; a run of N / K query heads shares a key head. Laid out as "BSNH" by the current rules. Raises
    LayoutError where `wanted` is required and refuses.
    """
    _, seq_len, _, head_dim = q_BSNH.shape
    site = Site(
        platform=platform(),
        dtype=q_BSNH.dtype.name,
        seq_len=seq_len,
        head_dim=head_dim,
        packed=segments_BS is not None,
        shards=axis_size("S"),
    )
    way = choose(wanted, site)
    if isinstance(way, CuDNN):
        return cudnn(q_BSNH, k_BSKH, v_BSKH, segments_BS)
    chunk = (way.chunk or max(64, -(-seq_len // 16))) if isinstance(way, Chunked) else seq_len
    return chunked(q_BSNH, k_BSKH, v_BSKH, segments_BS, chunk)


def cudnn(q_BSNH, k_BSKH, v_BSKH, segments_BS) -> jax.Array:
    """NVIDIA's kernel; documents become a mask, which it adds to the logits."""
    mask = None if segments_BS is None else constrain(segments_BS[:, None, :, None] == segments_BS[:, None, None, :], "B___")
    q, k, v = constrain(q_BSNH, "BSNH"), constrain(k_BSKH, "BSKH"), constrain(v_BSKH, "BSKH")
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def chunked(q_BSNH, k_BSKH, v_BSKH, segments_BS, chunk: int) -> jax.Array:
    """Chunk by chunk of queries, each against the keys before its end: (1 + chunk / S) / 2 of the whole square."""
    B, S, N, H = q_BSNH.shape
    K = k_BSKH.shape[2]
    q_BKGSH = jnp.moveaxis(q_BSNH.reshape(B, S, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = (jnp.moveaxis(constrain(x, "B_KH"), 1, 2) for x in (k_BSKH, v_BSKH))
    keys_BS = None if segments_BS is None else constrain(segments_BS, "B_")
    out = []
    for start in range(0, S, chunk):
        end = min(start + chunk, S)
        mask = jnp.arange(start, end)[None, :, None] >= jnp.arange(end)[None, None, :]
        if segments_BS is not None:
            mask = mask & (segments_BS[:, start:end, None] == keys_BS[:, None, :end])
        out.append(_attend(q_BKGSH[:, :, :, start:end], k_BKSH[:, :, :end], v_BKSH[:, :, :end], mask))
    o_BKGSH = jnp.concatenate(out, axis=3)
    return jnp.moveaxis(o_BKGSH, 3, 1).reshape(B, S, N, H)


def _attend(q_BKGSH, k_BKTH, v_BKTH, mask_BST) -> jax.Array:
    logits = jnp.einsum("BKGSH,BKTH->BKGST", q_BKGSH, k_BKTH, preferred_element_type=jnp.float32)
    logits = jnp.where(mask_BST[:, None, None], logits * q_BKGSH.shape[-1] ** -0.5, -1e30)
    p_BKGST = jax.nn.softmax(logits, axis=-1).astype(v_BKTH.dtype)
    return jnp.einsum("BKGST,BKTH->BKGSH", p_BKGST, v_BKTH)
