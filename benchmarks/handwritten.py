"""A tuned Llama training step in plain JAX, the baseline to be compared with. It shares no code with the packages here.

What a careful engineer would write for one machine: a dict of parameters, one jitted and donated step, causal attention
in query chunks that skip the masked half, its backward written out (8 % of the step), cross-entropy whose backward is
formed in its forward, fused q-k-v and gate-up projections (on an axis of their own: side by side they cost 10 % of the
step), AdamW and clipping by hand. One document a row, no mesh, no scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the model, of the batch and of the optimizer; the defaults are the workload of the comparison."""

    dim: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    ffn: int = 768
    vocab_size: int = 8192
    seq_len: int = 512
    batch: int = 8
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    query_chunk: int = 64
    loss_chunk: int = 1024
    learning_rate: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


def init(cfg: Config) -> dict:
    """The parameters: normal, standard deviation 1 / sqrt(inputs)."""
    rng = np.random.default_rng(cfg.seed)
    attended, group = cfg.num_heads * cfg.head_dim, cfg.num_heads // cfg.num_kv_heads

    def draw(inputs: int, *shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(inputs), jnp.float32)

    def layer() -> dict:
        return dict(
            attn_norm=jnp.ones(cfg.dim),
            qkv=draw(cfg.dim, cfg.dim, cfg.num_kv_heads, group + 2, cfg.head_dim),
            o=draw(attended, attended, cfg.dim),
            ffn_norm=jnp.ones(cfg.dim),
            gate_up=draw(cfg.dim, cfg.dim, 2, cfg.ffn),
            down=draw(cfg.ffn, cfg.ffn, cfg.dim),
        )

    return dict(
        embed=draw(cfg.dim, cfg.vocab_size, cfg.dim),
        layers=[layer() for _ in range(cfg.num_layers)],
        norm=jnp.ones(cfg.dim),
        unembed=draw(cfg.dim, cfg.dim, cfg.vocab_size),
    )


def rms_norm(x, scale, eps):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x, cos, sin):
    """x (B, S, K, heads, H), the two halves of H rotated against each other."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def logits_of(q, k, start, end):
    """Scaled and masked, (B, K, G, chunk, end), of the queries from `start` to `end` and the keys before `end`."""
    keep = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
    logits = jnp.einsum("bkgch,bkth->bkgct", q[:, :, :, start:end], k[:, :, :end])
    return jnp.where(keep[None, None, None], logits * q.shape[-1] ** -0.5, -1e30)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(q, k, v, chunk):
    """q (B, K, G, S, H), k and v (B, K, S, H); a chunk of queries reads only the keys up to its own end."""
    return attention_forward(q, k, v, chunk)[0]


def attention_forward(q, k, v, chunk):
    out, kept = [], []
    for start in range(0, q.shape[3], chunk):
        end = min(start + chunk, q.shape[3])
        logits = logits_of(q, k, start, end)
        p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        total = p.sum(axis=-1, keepdims=True)
        out.append(jnp.einsum("bkgct,bkth->bkgch", p, v[:, :, :end]) / total)
        kept.append((p, total))
    o = jnp.concatenate(out, axis=3)
    return o, (q, k, v, o, kept)


def attention_backward(chunk, residuals, do):
    """From the kept exponentials; sum(do * o) stands for sum(p * dp)."""
    q, k, v, o, kept = residuals
    delta = (do * o).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for start, (p, total) in zip(range(0, q.shape[3], chunk), kept, strict=True):
        end = start + p.shape[3]
        do_chunk = do[:, :, :, start:end] / total
        dp = jnp.einsum("bkgch,bkth->bkgct", do_chunk, v[:, :, :end])
        dlogits = p * (dp - delta[:, :, :, start:end] / total) * q.shape[-1] ** -0.5
        dq.append(jnp.einsum("bkgct,bkth->bkgch", dlogits, k[:, :, :end]))
        dk = dk.at[:, :, :end].add(jnp.einsum("bkgct,bkgch->bkth", dlogits, q[:, :, :, start:end]))
        dv = dv.at[:, :, :end].add(jnp.einsum("bkgct,bkgch->bkth", p, do_chunk))
    return jnp.concatenate(dq, axis=3), dk, dv


attention.defvjp(attention_forward, attention_backward)


def block(x, w, cos, sin, cfg: Config):
    qkv = jnp.einsum("bsd,dkch->bskch", rms_norm(x, w["attn_norm"], cfg.norm_eps), w["qkv"])
    q, k = rotate(qkv[:, :, :, :-2], cos, sin), rotate(qkv[:, :, :, -2:-1], cos, sin)[:, :, :, 0]
    heads_first = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), qkv[:, :, :, -1].transpose(0, 2, 1, 3)
    o = attention(*heads_first, cfg.query_chunk).transpose(0, 3, 1, 2, 4)
    x = x + o.reshape(*x.shape[:2], -1) @ w["o"]
    gate_up = jnp.einsum("bsd,dcf->bscf", rms_norm(x, w["ffn_norm"], cfg.norm_eps), w["gate_up"])
    return x + (jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]) @ w["down"]


def hidden(params, tokens, cfg: Config):
    S, half = tokens.shape[1], cfg.head_dim // 2
    angles = jnp.arange(S)[:, None] * (cfg.rope_theta ** (-jnp.arange(half) / half))[None]
    cos, sin = jnp.cos(angles)[None, :, None, None], jnp.sin(angles)[None, :, None, None]
    x = params["embed"][tokens]
    for w in params["layers"]:
        x = block(x, w, cos, sin, cfg)
    return rms_norm(x, params["norm"], cfg.norm_eps)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(h, w, targets, chunk):
    return cross_entropy_forward(h, w, targets, chunk)[0]


def cross_entropy_forward(h, w, targets, chunk):
    """The mean over tokens and, as residuals, its gradients: each chunk's logits are made once and never kept."""
    flat, targets, total, dw, dh = h.reshape(-1, h.shape[-1]), targets.reshape(-1), 0.0, jnp.zeros_like(w), []
    for start in range(0, flat.shape[0], chunk):
        rows, goal = flat[start : start + chunk], targets[start : start + chunk]
        logits = rows @ w
        lse = jax.nn.logsumexp(logits, axis=-1)
        total += jnp.sum(lse - jnp.take_along_axis(logits, goal[:, None], axis=-1)[:, 0])
        hit = goal[:, None] == jnp.arange(w.shape[1])[None, :]
        dlogits = (jnp.exp(logits - lse[:, None]) - hit) / flat.shape[0]
        dh.append(dlogits @ w.T)
        dw += rows.T @ dlogits
    return total / flat.shape[0], (jnp.concatenate(dh).reshape(h.shape), dw)


def cross_entropy_backward(chunk, residuals, g):
    dh, dw = residuals
    return dh * g, dw * g, None


cross_entropy.defvjp(cross_entropy_forward, cross_entropy_backward)


def loss(params, batch, cfg: Config):
    return cross_entropy(hidden(params, batch["tokens"], cfg), params["unembed"], batch["targets"], cfg.loss_chunk)


def adamw(params, grads, moments, count, cfg: Config):
    """One update of clipped AdamW; matrices decay, norms do not."""
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    scale = jnp.minimum(1.0, cfg.clip / norm)
    c1, c2 = 1 - cfg.b1**count, 1 - cfg.b2**count

    def update(p, g, m, v):
        g = g * scale
        m, v = cfg.b1 * m + (1 - cfg.b1) * g, cfg.b2 * v + (1 - cfg.b2) * g * g
        decay = cfg.weight_decay * p if p.ndim > 1 else 0.0
        return p - cfg.learning_rate * (m / c1 / (jnp.sqrt(v / c2) + cfg.eps) + decay), m, v

    new = jax.tree.map(update, params, grads, *moments)
    return [jax.tree.map(lambda _, leaf: leaf[i], params, new) for i in range(3)], norm


def make(cfg: Config = Config()):
    """-> (state, step, batch): `state, metrics = step(state, batch)`, jitted, the state donated."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        value, grads = jax.value_and_grad(loss)(state["params"], batch, cfg)
        count = state["count"] + 1
        (params, m, v), norm = adamw(state["params"], grads, (state["m"], state["v"]), count, cfg)
        return dict(params=params, m=m, v=v, count=count), dict(loss=value, grad_norm=norm)

    params = init(cfg)
    zeros = partial(jax.tree.map, jnp.zeros_like)
    state = dict(params=params, m=zeros(params), v=zeros(params), count=jnp.zeros((), jnp.int32))
    shape = (cfg.batch, cfg.seq_len + 1)
    ids = np.random.default_rng(cfg.seed + 1).integers(cfg.vocab_size, size=shape, dtype=np.int32)
    return state, step, dict(tokens=jnp.asarray(ids[:, :-1]), targets=jnp.asarray(ids[:, 1:]))
