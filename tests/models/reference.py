"""Decoders in float64 numpy, one query, head, token and expert at a time, written from the papers: what models are held against."""

import jax
import numpy as np
from flax import nnx

from models.mla import Latent
from models.moe import Bias, Experts, Sigmoid


def model(config, seed=0):
    """A model with random parameters drawn by numpy, which compiles nothing; its norms are not 1 either."""
    rng = np.random.default_rng(seed)
    graph, _ = nnx.split(jax.eval_shape(config.build, jax.random.key(0)))

    def draw(parameter):
        array = rng.normal(size=parameter.shape) * (parameter.std or 0.1) + parameter.start
        return nnx.Param(jax.numpy.asarray(array, "float32"), letters=parameter.letters)

    return nnx.merge(graph, nnx.State({name: draw(parameter) for name, parameter in config.parameters().items()}))


def params_of(model):
    """Every parameter of a built model by name, in float64."""
    return {name: np.asarray(getattr(model, name)[...], np.float64) for name in model.config.parameters()}


def hidden(config, params, tokens, segments=None, positions=None):
    """h (B, S, D) of a batch."""
    rows = zip(*_batch(tokens, segments, positions), strict=True)
    return np.stack([_row(config, params, *row)[0] for row in rows])


def _batch(tokens, segments, positions):
    tokens = np.asarray(tokens)
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)) if positions is None else np.asarray(positions)
    return tokens, segments, positions


def logits(config, params, tokens, segments=None, positions=None):
    """(B, S, V)"""
    unembed = params["embed_VD"].T if config.tied else params["unembed_DV"]
    return hidden(config, params, tokens, segments, positions) @ unembed


def _row(config, params, tokens, segments, positions):
    x, objective, counts = params["embed_VD"][tokens], 0.0, []
    for stack in config.stacks():
        for i in range(stack.num_layers):
            w = {name: params[stack.prefix + name][i] for name in stack.parameters(config.dim, config.num_layers)}
            attention = _latent if isinstance(stack.heads, Latent) else _attention
            x = x + attention(config, stack.heads, w, _norm(config, x, w["attn_norm_LD"]), segments, positions)
            h = _norm(config, x, w["ffn_norm_LD"])
            if isinstance(stack.ffn, Experts):
                y, loss, load = experts(stack.ffn, w, h, segments)
                x, objective, counts = x + y, objective + loss, [*counts, load]
            else:
                x = x + swiglu(h, w["gate_LDF"], w["up_LDF"], w["down_LFD"])
    return _norm(config, x, params["final_norm_D"]), objective, np.array(counts)


def extras(config, params, tokens, segments=None, positions=None):
    """The objective beside -log p, and the choices of every expert by layer (L, E), of a batch."""
    rows = [_row(config, params, *row) for row in zip(*_batch(tokens, segments, positions), strict=True)]
    return sum(row[1] for row in rows), sum(row[2] for row in rows)


def swiglu(h, gate, up, down):
    gate = h @ gate
    return (gate / (1 + np.exp(-gate)) * (h @ up)) @ down


def experts(mix, w, h, segments, room=None):
    """One sequence, token by token: -> (S, D), the objective, choices of each expert. `room`: choices an expert takes."""
    out, choices, taken, shares, z = np.zeros_like(h), np.zeros(mix.num_experts), np.zeros(mix.num_experts), 0.0, 0.0
    for t in range(len(h)):
        if segments[t] > 0:
            logits = h[t] @ w["router_LDE"]
            scores, chosen, gates = route(mix, logits, w.get("router_bias_LE"))
            shares, z = shares + scores / scores.sum(), z + np.log(np.exp(logits).sum()) ** 2
            for e, gate in zip(chosen, gates, strict=True):
                choices[e] += 1
                if room is None or taken[e] < room:
                    taken[e] += 1
                    out[t] += gate * swiglu(h[t], *(w[f"expert_{x}"][e] for x in ("gate_LEDF", "up_LEDF", "down_LEFD")))
        if mix.shared_ffn:
            out[t] += swiglu(h[t], w["shared_gate_LDF"], w["shared_up_LDF"], w["shared_down_LFD"])
    live = max((np.asarray(segments) > 0).sum(), 1)
    fractions = mix.num_experts / mix.num_chosen / live * choices
    return out, mix.balance.weight * (fractions * shares).sum() + mix.z_loss * z, choices


def route(mix, logits, bias=None):
    """-> scores of all experts, the chosen, best first, and their gates."""
    p = np.exp(logits - logits.max())
    scores = 1 / (1 + np.exp(-logits)) if isinstance(mix.router, Sigmoid) else p / p.sum()
    wanted = scores + (bias if isinstance(mix.balance, Bias) else 0)
    if mix.limited:
        members = np.split(np.arange(mix.num_experts), mix.limited.groups)
        worth = [np.sort(wanted[group])[-2:].sum() for group in members]
        for g in np.argsort(worth)[: -mix.limited.kept]:
            wanted[members[g]] = -np.inf
    chosen = np.argsort(-wanted, kind="stable")[: mix.num_chosen]
    gates = scores[chosen]
    return scores, chosen, mix.router.scale * (gates / gates.sum() if mix.router.normalise else gates)


def _norm(config, x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * scale


def _attention(config, heads, w, h, segments, positions):
    out = np.zeros((len(h), w["o_LNHD"].shape[-1]))
    for head in range(heads.num_heads):
        shared = head // (heads.num_heads // heads.num_kv_heads)
        q, k, v = h @ w["q_LDNH"][:, head], h @ w["k_LDKH"][:, shared], h @ w["v_LDKH"][:, shared]
        if heads.qk_norm:
            q, k = _norm(config, q, w["q_norm_LH"]), _norm(config, k, w["k_norm_LH"])
        out += attend(_turn(config, q, positions), _turn(config, k, positions), v, segments) @ w["o_LNHD"][head]
    return out


def _latent(config, heads, w, h, segments, positions):
    """DeepSeek-V2, equations 9 to 19, head by head."""
    out, shared = np.zeros((len(h), w["o_LNHD"].shape[-1])), _turn(config, h @ w["k_rope_LDH"], positions)
    kv = _norm(config, h @ w["kv_down_LDZ"], w["kv_norm_LA"])
    for head in range(heads.num_heads):
        if heads.q_latent is None:
            q = h @ w["q_LDNH"][:, head]
        else:
            q = _norm(config, h @ w["q_down_LDZ"], w["q_norm_LA"]) @ w["q_up_LANH"][:, head]
        k = kv @ w["kv_up_LANH"][:, head, : heads.nope_dim]
        v = kv @ w["kv_up_LANH"][:, head, heads.nope_dim :]
        turned = _turn(config, q[:, heads.nope_dim :], positions)
        q, k = np.concatenate([q[:, : heads.nope_dim], turned], 1), np.concatenate([k, shared], 1)
        out += attend(q, k, v, segments) @ w["o_LNHD"][head]
    return out


def attend(q, k, v, segments):
    """One head: (S, H) each; a query reads the keys up to itself that are of its own segment."""
    out = np.zeros_like(v)
    for s in range(len(q)):
        seen = [t for t in range(s + 1) if segments[t] == segments[s]]
        scores = k[seen] @ q[s] / np.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max())
        out[s] = (p / p.sum()) @ v[seen]
    return out


def _turn(config, x, positions):
    """Each pair (i, i + H/2) as a complex number, multiplied by exp(i position frequency)."""
    half = x.shape[1] // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    freqs = np.array([_frequency(config, i, 2 * half) for i in range(half)])
    pairs = pairs * np.exp(1j * positions[:, None] * freqs[None])
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _frequency(config, i, dims):
    """As Meta's reference code scales them, by wavelength."""
    frequency = config.rope_theta ** (-2 * i / dims)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * np.pi / frequency
    if wavelength < scaling.original_max_position / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_position / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
