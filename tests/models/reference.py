"""A Llama in float64 numpy, one query and one head at a time, written from the papers: what models are held against."""

import jax
import numpy as np
from flax import nnx


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
    tokens = np.asarray(tokens)
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)) if positions is None else np.asarray(positions)
    return np.stack([_row(config, params, *row) for row in zip(tokens, segments, positions, strict=True)])


def logits(config, params, tokens, segments=None, positions=None):
    """(B, S, V)"""
    unembed = params["embed_VD"].T if config.tied else params["unembed_DV"]
    return hidden(config, params, tokens, segments, positions) @ unembed


def _row(config, params, tokens, segments, positions):
    x = params["embed_VD"][tokens]
    for i in range(config.num_layers):
        w = {name: array[i] for name, array in params.items() if name.split("_")[-1].startswith("L")}
        x = x + _attention(config, w, _norm(config, x, w["attn_norm_LD"]), segments, positions)
        h = _norm(config, x, w["ffn_norm_LD"])
        gate = h @ w["gate_LDF"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_LDF"])) @ w["down_LFD"]
    return _norm(config, x, params["final_norm_D"])


def _norm(config, x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * scale


def _attention(config, w, h, segments, positions):
    out = np.zeros((len(h), w["o_LNHD"].shape[-1]))
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        q = _turn(config, h @ w["q_LDNH"][:, head], positions)
        k = _turn(config, h @ w["k_LDKH"][:, shared], positions)
        v = h @ w["v_LDKH"][:, shared]
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
    half = config.head_dim // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    freqs = np.array([_frequency(config, i) for i in range(half)])
    pairs = pairs * np.exp(1j * positions[:, None] * freqs[None])
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _frequency(config, i):
    """As Meta's reference code scales them, by wavelength."""
    frequency = config.rope_theta ** (-2 * i / config.head_dim)
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
