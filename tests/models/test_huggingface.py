"""Logits and gradients equal Hugging Face's LlamaForCausalLM in fp32, weights mapped by hand."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.llama import Config, RopeScaling
from tests.models import reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers deprecate names of each other's on import
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

FP32 = 1e-4  # two fp32 programs of some hundred additions each; logits are of size 1
TINY = Config(vocab_size=99, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn=48)
STRETCHED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)
SHAPES = {
    "grouped": TINY,
    "tied, a key head each, epsilon": dataclasses.replace(TINY, num_kv_heads=4, tied=True, norm_eps=1e-3),
    "one wide key head, three layers": dataclasses.replace(TINY, num_kv_heads=1, head_dim=16, num_layers=3, ffn=40),
    "stretched, tied": dataclasses.replace(TINY, rope_scaling=STRETCHED, rope_theta=1000.0, tied=True, head_dim=12),
}
# Ours -> theirs; in a layer: model.layers.I.NAME.weight.
OUTSIDE = {"embed_VD": "model.embed_tokens.weight", "final_norm_D": "model.norm.weight", "unembed_DV": "lm_head.weight"}
LAYER = {
    "attn_norm_LD": "input_layernorm",
    "q_LDNH": "self_attn.q_proj",
    "k_LDKH": "self_attn.k_proj",
    "v_LDKH": "self_attn.v_proj",
    "o_LNHD": "self_attn.o_proj",
    "ffn_norm_LD": "post_attention_layernorm",
    "gate_LDF": "mlp.gate_proj",
    "up_LDF": "mlp.up_proj",
    "down_LFD": "mlp.down_proj",
}


def theirs(name, array, dim):
    """An array of ours as (outputs, inputs)."""
    if array.ndim == 1 or name == "embed_VD":
        return array
    inputs_first = array.reshape(-1, dim) if name in ("o_LNHD", "down_LFD") else array.reshape(dim, -1)
    return inputs_first.T


def mapped(config, arrays):
    """Arrays by our names -> the same by theirs."""
    out = {OUTSIDE[name]: theirs(name, arrays[name], config.dim) for name in OUTSIDE if name in arrays}
    for i in range(config.num_layers):
        for name, module in LAYER.items():
            out[f"model.layers.{i}.{module}.weight"] = theirs(name, arrays[name][i], config.dim)
    return out


def hugging_face(config, arrays):
    scaling = config.rope_scaling
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling:
        rope |= dict(
            rope_type="llama3",
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position,
        )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.ffn,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            rope_parameters=rope,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    )
    state = {name: torch.from_numpy(np.array(array)) for name, array in mapped(config, arrays).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tied else set())
    model.tie_weights()
    return model


@pytest.mark.parametrize(("seed", "name"), [*enumerate(SHAPES)])
def test_logits_and_gradients_equal_hugging_faces(name, seed):
    config = SHAPES[name]
    graph, params = nnx.split(reference.model(config, seed))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(config.vocab_size, size=(2, 21 + seed))
    weight = rng.normal(size=config.vocab_size).astype(np.float32)

    def scalar(params):
        model = nnx.merge(graph, params)
        logits = model(tokens)[0] @ model.unembedding()
        return (jnp.tanh(logits) * weight[None, None]).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    model = hugging_face(config, {key: np.asarray(leaf[...]) for key, leaf in params.items()})
    other = model(torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(logits, other.detach().numpy(), rtol=0, atol=FP32)
    (torch.tanh(other) * torch.from_numpy(weight)).mean().backward()
    expected = {key: p.grad.numpy() for key, p in model.named_parameters()}
    for key, grad in mapped(config, {key: np.asarray(leaf[...]) for key, leaf in grads.items()}).items():
        np.testing.assert_allclose(grad, expected[key], rtol=0, atol=FP32 * np.abs(expected[key]).max(), err_msg=key)
