"""Logits and gradients equal Hugging Face's Mixtral, Qwen3-MoE and DeepSeek-V3 in fp32, and so does every count."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.family import Grouped
from models.mla import Latent
from models.moe import Auxiliary, Bias, Config, Experts, Limited, Sigmoid, size
from tests.models import reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers deprecate names of each other's on import
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

FP32 = 1e-4  # two fp32 programs of some hundred additions each; logits are of size 1
TINY = Config(
    vocab_size=99,
    dim=32,
    num_layers=2,
    heads=Grouped(num_heads=4, num_kv_heads=2, head_dim=8),
    experts=Experts(num_experts=6, num_chosen=2, ffn=24, balance=Auxiliary(weight=0.0)),
    rope_theta=1e4,
)
SHAPES = {
    "Mixtral": TINY,
    "Qwen3Moe": dataclasses.replace(
        TINY,
        heads=dataclasses.replace(TINY.heads, qk_norm=True),
        experts=dataclasses.replace(TINY.experts, num_experts=8, num_chosen=3),
        norm_eps=1e-6,
    ),
    "DeepseekV3": dataclasses.replace(
        TINY,
        num_layers=3,
        heads=Latent(num_heads=4, kv_latent=10, q_latent=12, nope_dim=6, rope_dim=4, value_dim=5),
        experts=Experts(
            num_experts=8,
            num_chosen=2,
            ffn=24,
            shared_ffn=24,
            router=Sigmoid(scale=2.5),
            balance=Bias(weight=0.0),
            limited=Limited(groups=4, kept=2),
        ),
        dense_layers=1,
        dense_ffn=40,
        norm_eps=1e-6,
    ),
}


def their_config(family, config):
    heads, mix = config.heads, config.experts
    shape = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=heads.num_heads,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        num_experts_per_tok=mix.num_chosen,
        attn_implementation="eager",
    )
    if family == "DeepseekV3":
        shape |= dict(q_lora_rank=heads.q_latent, kv_lora_rank=heads.kv_latent, v_head_dim=heads.value_dim)
        shape |= dict(qk_nope_head_dim=heads.nope_dim, qk_rope_head_dim=heads.rope_dim, first_k_dense_replace=config.dense_layers)
        shape |= dict(num_key_value_heads=heads.num_heads, intermediate_size=config.dense_ffn, moe_intermediate_size=mix.ffn)
        shape |= dict(n_group=mix.limited.groups, topk_group=mix.limited.kept, routed_scaling_factor=mix.router.scale)
        shape |= dict(n_routed_experts=mix.num_experts, n_shared_experts=mix.shared_ffn // mix.ffn)
        return transformers.DeepseekV3Config(**shape)
    shape |= dict(num_key_value_heads=heads.num_kv_heads, head_dim=heads.head_dim)
    if family == "Mixtral":
        return transformers.MixtralConfig(**shape, intermediate_size=mix.ffn, num_local_experts=mix.num_experts)
    shape |= dict(norm_topk_prob=True, moe_intermediate_size=mix.ffn, num_experts=mix.num_experts)
    return transformers.Qwen3MoeConfig(**shape)


def interleaved(w):
    """Our rotated pairs (i, i + H/2) -> theirs, (2 i, 2 i + 1), along the last dim."""
    return np.swapaxes(w.reshape(*w.shape[:-1], 2, -1), -1, -2).reshape(w.shape)


def attention(config, w):
    """One layer's, by their names below `self_attn.`, as (outputs, inputs)."""
    out = lambda x: x.reshape(len(x), -1).T  # noqa: E731
    named = {"o_proj.weight": w["o_LNHD"].reshape(-1, config.dim).T}
    if isinstance(config.heads, Grouped):
        named |= {f"{x}_proj.weight": out(w[f"{x}_LD{n}H"]) for x, n in (("q", "N"), ("k", "K"), ("v", "K"))}
        return named | {f"{x}_norm.weight": w[f"{x}_norm_LH"] for x in "qk" if config.heads.qk_norm}
    nope = config.heads.nope_dim
    q = np.concatenate([w["q_up_LANH"][..., :nope], interleaved(w["q_up_LANH"][..., nope:])], -1)
    named |= {"q_a_proj.weight": w["q_down_LDZ"].T, "q_a_layernorm.weight": w["q_norm_LA"], "q_b_proj.weight": out(q)}
    down = np.concatenate([w["kv_down_LDZ"], interleaved(w["k_rope_LDH"])], -1)
    named |= {"kv_a_proj_with_mqa.weight": down.T, "kv_a_layernorm.weight": w["kv_norm_LA"]}
    return named | {"kv_b_proj.weight": out(w["kv_up_LANH"])}


def dense(w, prefix):
    dims = dict(gate="DF", up="DF", down="FD")
    return {f"{name}_proj.weight": w[f"{prefix}{name}_L{letters}"].T for name, letters in dims.items()}


def feed_forward(w):
    """One layer's, by their names below `mlp.`."""
    if "router_LDE" not in w:
        return dense(w, "")
    named = {"gate.weight": w["router_LDE"].T, "experts.down_proj": w["expert_down_LEFD"].swapaxes(1, 2)}
    named["experts.gate_up_proj"] = np.concatenate([w["expert_gate_LEDF"], w["expert_up_LEDF"]], 2).swapaxes(1, 2)
    if "router_bias_LE" in w:
        named["gate.e_score_correction_bias"] = w["router_bias_LE"]
        named |= {f"shared_experts.{name}": x for name, x in dense(w, "shared_").items()}
    return named


def mapped(config, arrays):
    """Arrays by our names -> the same by theirs."""
    named = {"model.embed_tokens.weight": arrays["embed_VD"], "model.norm.weight": arrays["final_norm_D"]}
    named["lm_head.weight"] = arrays["unembed_DV"].T
    layer = 0
    for stack in config.stacks():
        for i in range(stack.num_layers):
            w = {name: arrays[stack.prefix + name][i] for name in stack.parameters(config.dim, config.num_layers)}
            parts = {"input_layernorm.weight": w["attn_norm_LD"], "post_attention_layernorm.weight": w["ffn_norm_LD"]}
            parts |= {f"self_attn.{name}": x for name, x in attention(config, w).items()}
            parts |= {f"mlp.{name}": x for name, x in feed_forward(w).items()}
            named |= {f"model.layers.{layer}.{name}": x for name, x in parts.items()}
            layer += 1
    return named


@pytest.mark.parametrize("family", SHAPES)
def test_logits_and_gradients_equal_hugging_faces(family):
    config = SHAPES[family]
    graph, params = nnx.split(reference.model(config))
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.vocab_size, size=(2, 21))
    weight = rng.normal(size=config.vocab_size).astype(np.float32)

    def scalar(params):
        model = nnx.merge(graph, params)
        logits = model(tokens)[0] @ model.unembedding()
        return (jnp.tanh(logits) * weight[None, None]).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    model = getattr(transformers, f"{family}ForCausalLM")(their_config(family, config))
    state = mapped(config, {key: np.asarray(leaf[...]) for key, leaf in params.items()})
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, strict=True)
    other = model.eval()(torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(logits, other.detach().numpy(), rtol=0, atol=FP32)
    (torch.tanh(other) * torch.from_numpy(weight)).mean().backward()
    expected = {key: p.grad.numpy() for key, p in model.named_parameters()}
    for key, grad in mapped(config, {key: np.asarray(leaf[...]) for key, leaf in grads.items()}).items():
        if "bias" not in key:  # a buffer of theirs
            np.testing.assert_allclose(grad, expected[key], rtol=0, atol=FP32 * np.abs(expected[key]).max(), err_msg=key)


PUBLISHED = {
    "mixtral-8x7b": "Mixtral",
    "qwen3-30b-a3b": "Qwen3Moe",
    "qwen3-235b-a22b": "Qwen3Moe",
    "deepseek-v3-671b": "DeepseekV3",
}


@pytest.mark.parametrize(("name", "family"), PUBLISHED.items())
def test_a_named_size_has_every_parameter_that_theirs_of_that_shape_has(name, family):
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(their_config(family, size(name)))
    theirs = sum(p.numel() for p in model.parameters())
    theirs += sum(b.numel() for key, b in model.named_buffers() if "correction_bias" in key)
    assert size(name).num_params() == theirs
