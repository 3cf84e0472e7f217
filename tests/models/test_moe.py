"""Mixtures against a float64 numpy one that goes token by token and expert by expert; counts against published ones."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshes import LayoutError, UserError
from models.family import Grouped
from models.mla import Latent
from models.moe import SIZES, Auxiliary, Bias, Config, Experts, Limited, Sigmoid, Softmax, size
from models.routed import moved
from tests.models import reference

HEADS = Grouped(num_heads=4, num_kv_heads=2, head_dim=6)
MIX = Experts(num_experts=8, num_chosen=2, ffn=12, z_loss=1e-2)
TINY = Config(vocab_size=48, dim=16, num_layers=2, heads=HEADS, experts=MIX)
V3 = dict(router=Sigmoid(scale=2.5), balance=Bias(weight=0.05), shared_ffn=10)
LATENT = Latent(num_heads=4, kv_latent=10, q_latent=14, nope_dim=6, rope_dim=4, value_dim=5)
SHAPES = {
    "softmax, 2 of 8": TINY,
    "softmax as it is, 1 of 8": dataclasses.replace(
        TINY, experts=dataclasses.replace(MIX, num_chosen=1, router=Softmax(normalise=False, scale=2.0))
    ),
    "all of 4, normalised heads": dataclasses.replace(
        TINY, heads=dataclasses.replace(HEADS, qk_norm=True), experts=dataclasses.replace(MIX, num_experts=4, num_chosen=4)
    ),
    "sigmoid, bias, shared, 3 of 8 in groups, a dense layer first, latent": dataclasses.replace(
        TINY,
        num_layers=3,
        heads=LATENT,
        experts=dataclasses.replace(MIX, num_chosen=3, limited=Limited(groups=4, kept=2), **V3),
        dense_layers=1,
        dense_ffn=20,
    ),
}
# fp32 keeps 7 digits; a few hundred additions of numbers of size 1, and 2 or 3 layers, lose two of them.
FP32 = 3e-5

TOKENS = np.random.default_rng(0).integers(48, size=(2, 14))
SEGMENTS = np.array([[1] * 5 + [2] * 7 + [0] * 2, [1] * 14])
POSITIONS = np.array([[*range(5), *range(7), 0, 0], [*range(14)]])
BATCH = (TOKENS, SEGMENTS, POSITIONS)
WEIGHT = np.random.default_rng(5).normal(size=(2, 14, 16)).astype(np.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_values_losses_and_loads_equal_a_loop_over_tokens_and_experts(name):
    config = SHAPES[name]
    model = reference.model(config)
    h, extras = jax.jit(lambda model: model(*BATCH))(model)
    params = reference.params_of(model)
    expected = reference.hidden(config, params, *BATCH)
    np.testing.assert_allclose(h, expected, rtol=0, atol=FP32 * np.abs(expected).max())
    objective, counts = reference.extras(config, params, *BATCH)
    assert float(extras["objective"]) == pytest.approx(objective, rel=FP32)
    np.testing.assert_array_equal(extras["load"], counts)
    assert float(extras["dropped"].sum()) == 0
    assert counts.sum() == 26 * config.experts.num_chosen * (config.num_layers - config.dense_layers)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_finite_differences_of_that_loop(name):
    config, rng, step = SHAPES[name], np.random.default_rng(0), 1e-6
    model = reference.model(config)
    graph, state = nnx.split(model)

    def scalar(params):
        h, extras = nnx.merge(graph, params)(*BATCH)
        return jnp.sum(WEIGHT * h) + extras["objective"]

    grads, params = jax.jit(jax.grad(scalar))(state), reference.params_of(model)
    for key, array in params.items():
        direction = rng.normal(size=array.shape)
        up, down = (_scalar(config, params | {key: array + sign * step * direction}) for sign in (1, -1))
        along = float((np.asarray(grads[key][...]) * direction).sum())
        if "bias" in key:
            assert along == 0, key
        else:
            assert along == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=2e-3), key


def _scalar(config, params):
    return (WEIGHT * reference.hidden(config, params, *BATCH)).sum() + reference.extras(config, params, *BATCH)[0]


def test_two_runs_give_the_same_bits():
    model = reference.model(TINY)
    run = jax.jit(jax.value_and_grad(lambda m: m(*BATCH)[0].sum()))
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(nnx.to_pure_dict(nnx.state(run(model)[1]))) for _ in range(2)))


def test_layers_run_in_slices_give_what_they_give_at_once():
    config = SHAPES["sigmoid, bias, shared, 3 of 8 in groups, a dense layer first, latent"]
    model = reference.model(config)

    @jax.jit
    def sliced(model):
        x, found = model.embed(TOKENS), []
        for number, weights in enumerate(model.stacks()):
            for i in range(len(jax.tree.leaves(weights)[0])):
                x, extras = model.through(number, {k: w[i : i + 1] for k, w in weights.items()}, x, SEGMENTS, POSITIONS)
                found.append(extras)
        return model.final(x), found

    h, extras = jax.jit(lambda model: model(*BATCH))(model)
    parts_h, found = sliced(model)
    np.testing.assert_allclose(parts_h, h, rtol=0, atol=FP32)
    assert found[0] == {} and [x["load"].shape for x in found[1:]] == [(1, 8), (1, 8)]
    assert float(sum(x["objective"] for x in found[1:])) == pytest.approx(float(extras["objective"]), rel=FP32)
    np.testing.assert_array_equal(np.concatenate([x["load"] for x in found[1:]]), extras["load"])


def test_padding_chooses_no_expert_and_an_empty_row_adds_nothing():
    model = reference.model(TINY)
    run = jax.jit(lambda model, tokens, segments: model(tokens, segments, POSITIONS)[1])
    padded = run(model, TOKENS, np.array([[1] * 14, [0] * 14]))
    assert padded["load"].sum() == 14 * 2 * 2
    other = run(model, np.stack([TOKENS[0], 1 + TOKENS[1] % 40]), np.array([[1] * 14, [0] * 14]))
    assert float(padded["objective"]) == float(other["objective"]) > 0


def test_the_bias_moves_the_load_towards_balance_and_the_loss_has_no_part_in_it():
    """A router that prefers two experts strongly; only the bias may change."""
    config = dataclasses.replace(TINY, num_layers=1, experts=dataclasses.replace(MIX, balance=Bias(speed=0.02, weight=0.0)))
    model = reference.model(config)
    key = "router_bias_LE"
    bias = -0.4 * (np.arange(8) > 1)[None].astype(np.float32)

    @jax.jit
    def load(bias):
        graph, params = nnx.split(model)
        params[key] = params[key].replace(bias)
        built = nnx.merge(graph, params)
        extras = built(*BATCH)[1]
        return extras["load"], built.after_update({key: bias, "other": bias}, extras)

    first, moved_once = load(bias)
    np.testing.assert_allclose(moved_once[key] - bias, 0.02 * np.sign(first.mean() - first), atol=1e-7)
    assert moved_once["other"] is not None and np.array_equal(moved_once["other"], bias)
    for _ in range(60):
        last, new = load(bias)
        bias = np.asarray(new[key])
    assert first.max() >= 2 * last.max() and first.std() > 3 * last.std()


def test_the_mean_that_the_bias_follows_is_each_layers_own():
    load = np.array([[1, 1, 4], [5, 0, 0]], np.float32)
    bias = moved(Bias(speed=0.5), np.zeros((2, 3), np.float32), load)
    np.testing.assert_array_equal(bias, [[0.5, 0.5, -0.5], [-0.5, 0.5, 0.5]])


# Jiang et al. 2024 (46.7B, 12.9B), Qwen3's report, table 2, and its model cards (30.5B, 3.3B; 235B, 22B), DeepSeek-V3's
# abstract (671B, 37B). tests/models/test_huggingface_moe.py counts to the last one.
ANNOUNCED = {
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "deepseek-v3-671b": (671, 37),
}
CUT = 0.02  # they are rounded, or cut off, to two or three digits


@pytest.mark.parametrize(("name", "billions"), ANNOUNCED.items())
def test_a_size_has_as_many_parameters_and_active_ones_as_announced(name, billions):
    counts = size(name).num_params(), size(name).num_active_params()
    assert [count / 1e9 for count in counts] == pytest.approx(billions, rel=CUT)


@pytest.mark.parametrize("name", ["2m-a1m", "30m-a10m"])
def test_a_small_size_is_about_what_its_name_says(name):
    total, active = (float(part.strip("am")) for part in name.split("-"))
    assert SIZES[name].num_params() == pytest.approx(total * 1e6, rel=0.2)
    assert SIZES[name].num_active_params() == pytest.approx(active * 1e6, rel=0.2)


@pytest.mark.parametrize("config", [*SHAPES.values(), *SIZES.values()], ids=str)
def test_the_count_and_the_letters_are_those_of_the_built_tree(config):
    model = jax.eval_shape(config.build, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(model)) == config.num_params()
    for name in config.parameters():
        assert getattr(model, name).get_metadata("letters") == name.split("_")[-1]


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_counted_one_product_at_a_time(name):
    config, seq_len, forward = SHAPES[name], 5, 0
    for stack in config.stacks():
        heads, ffn, D = stack.heads, stack.ffn, config.dim
        for position in range(seq_len * stack.num_layers):
            keys = position % seq_len + 1
            if isinstance(heads, Latent):
                qk, v = heads.nope_dim + heads.rope_dim, heads.value_dim
                products = [(D, heads.q_latent), (heads.q_latent, 4 * qk), (D, heads.kv_latent), (D, heads.rope_dim)]
                products += [(heads.kv_latent, 4 * (heads.nope_dim + v)), (4 * v, D)]
            else:
                qk = v = heads.head_dim
                products = [(D, 4 * qk), (D, 2 * qk), (D, 2 * qk), (4 * qk, D)]
            if isinstance(ffn, Experts):
                products += [(D, ffn.num_experts)] + 3 * ffn.num_chosen * [(D, ffn.ffn)] + 3 * [(D, ffn.shared_ffn or 0)]
            else:
                products += 3 * [(D, ffn.ffn)]
            forward += sum(2 * n * m for n, m in products) + 2 * keys * 4 * (qk + v)
    forward += seq_len * 2 * config.dim * config.vocab_size
    assert config.flops_per_token(seq_len) * seq_len == pytest.approx(3 * forward, rel=1e-12)


def test_importing_and_making_configs_imports_no_jax():
    program = "import sys, models.moe as m, models.mla; m.size('mixtral-8x7b', remat='full').check({'expert': 8}, 8192)"
    program += "; print({'jax', 'flax', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("axes", "what", "fix"),
    [
        (dict(expert=16), "num_experts = 8 does not divide over expert", "expert = 8"),
        (dict(expert=3, data=2), "dim = 4096 does not divide over expert", "expert = 2"),
        (dict(tensor=3), "vocab_size", "tensor = 1"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_closest_that_does(axes, what, fix):
    with pytest.raises(LayoutError, match=what) as refusal:
        size("mixtral-8x7b").check(axes, 8192)
    assert refusal.value.fix == fix


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dataclasses.replace(MIX, num_chosen=9), "num_chosen = 9 is more than there are"),
        (lambda: dataclasses.replace(MIX, ffn=0), "ffn = 0"),
        (lambda: dataclasses.replace(MIX, num_experts=8.0), "num_experts = 8.0 is no size"),
        (lambda: dataclasses.replace(MIX, limited=Limited(groups=3, kept=1)), "1 of 3 groups"),
        (lambda: dataclasses.replace(TINY, dense_layers=2, dense_ffn=4), "dense_layers = 2"),
        (lambda: dataclasses.replace(TINY, dense_layers=1), "dense_ffn = None"),
        (lambda: dataclasses.replace(LATENT, rope_dim=3), "rope_dim = 3 is odd"),
        (lambda: dataclasses.replace(MIX, z_loss=-1.0), "z_loss = -1.0 is out of range"),
        (lambda: Auxiliary(weight=-0.01), "weight = -0.01 is out of range"),
        (lambda: Bias(speed=float("inf")), "speed = inf is out of range"),
        (lambda: Softmax(scale=0.0), "scale = 0.0 is out of range"),
        (lambda: Sigmoid(scale=-1.0), "scale = -1.0 is out of range"),
        (lambda: size("mixtral"), "did you mean 'mixtral-8x7b'"),
    ],
)
def test_a_shape_that_is_none_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_auxiliary_and_bias_are_values_of_one_choice():
    assert {type(config.experts.balance) for config in SIZES.values()} == {Auxiliary, Bias}
