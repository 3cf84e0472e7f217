"""The decoder against a float64 numpy Llama, and against itself where two ways must give the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.attention import Chunked
from models.llama import REMAT, Config, RopeScaling
from tests.models import reference

TINY = Config(vocab_size=48, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn=20)
STRETCHED = RopeScaling(factor=8.0, original_max_position=32)  # short enough for 14 positions to feel all three ranges
SHAPES = {
    "grouped": TINY,
    "one key head, tied": dataclasses.replace(TINY, num_kv_heads=1, tied=True, head_dim=4),
    "a key head each, three layers": dataclasses.replace(TINY, num_kv_heads=4, num_layers=3, ffn=7, norm_eps=1e-3),
    "stretched": dataclasses.replace(TINY, rope_scaling=STRETCHED, rope_theta=100.0, head_dim=8),
}
# fp32 keeps 7 digits; a few hundred additions of numbers of size 1, and 2 or 3 layers, lose two of them.
FP32 = 2e-5
# bf16 keeps 8 bits, a rounding of 0.4 %, at some ten roundings on the way; the values are of size 1.
BF16 = 0.08
# The same fp32 maths in another order of summation, relative to the largest entry.
REORDERED = 1e-5

TOKENS = np.random.default_rng(0).integers(48, size=(2, 14))
SEGMENTS = np.array([[1] * 5 + [2] * 8 + [0], [1] * 14])
POSITIONS = np.array([[*range(5), *range(8), 0], [*range(14)]])
BATCH = (TOKENS, SEGMENTS, POSITIONS)
WEIGHT = np.random.default_rng(5).normal(size=(2, 14, 16)).astype(np.float32)


def run(model, *batch, config=None, **changed):
    """The hidden values of the model under another config, with some parameters replaced."""
    graph, params = nnx.split(model)
    if config is not None:
        graph = nnx.graphdef(jax.eval_shape(config.build, jax.random.key(0)))
    for name, array in changed.items():
        params[name] = params[name].replace(array)
    return nnx.merge(graph, params)(*batch)[0]


def gradients(model, config=None):
    """By parameter name, of a scalar that depends on every hidden value."""

    def scalar(params):
        return jnp.sum(WEIGHT * run(model, *BATCH, config=config, **params))

    return jax.jit(jax.grad(scalar))({name: getattr(model, name)[...] for name in model.config.parameters()})


def assert_equal_trees(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=REORDERED * np.abs(y).max())


@pytest.mark.parametrize(("name", "packed"), [*((name, True) for name in SHAPES), ("stretched", False)])
def test_logits_equal_a_float64_numpy_llama(name, packed):
    config, documents = SHAPES[name], (SEGMENTS, POSITIONS) if packed else (None, None)
    model = reference.model(config)
    logits = jax.jit(lambda model: model(TOKENS, *documents)[0] @ model.unembedding())(model)
    expected = reference.logits(config, reference.params_of(model), TOKENS, *documents)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=FP32 * np.abs(expected).max())


def test_bfloat16_parameters_give_the_same_to_bfloat16s_precision():
    model = reference.model(TINY)
    expected = reference.hidden(TINY, reference.params_of(model), TOKENS, SEGMENTS, POSITIONS)
    h = jax.jit(run)(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model), *BATCH)
    assert h.dtype == jnp.bfloat16
    np.testing.assert_allclose(h.astype(np.float32), expected, rtol=0, atol=BF16)


def test_no_position_depends_on_a_later_one():
    model, tokens = reference.model(TINY), np.arange(14)[None]

    @jax.jit
    @jax.grad
    def influence(embedding, position):
        return run(model, tokens, embed_VD=embedding)[0, position].sum()

    for position in (0, 6, 13):
        on = jnp.abs(influence(model.embed_VD[...], position)).sum(axis=-1)
        assert (on[: position + 1] > 0).all() and (on[position + 1 :] == 0).all()


def test_packed_documents_equal_the_documents_alone():
    model = reference.model(SHAPES["stretched"])
    packed = jax.jit(run)(model, *BATCH)
    for start, end in ((0, 5), (5, 13)):
        alone = jax.jit(run)(model, TOKENS[:1, start:end])
        np.testing.assert_allclose(packed[:1, start:end], alone, rtol=0, atol=FP32 * 4)


def test_no_document_receives_a_gradient_from_another():
    model = reference.model(TINY)

    @jax.jit
    @jax.grad
    def influence(embedding):
        return (run(model, np.arange(14)[None], SEGMENTS[:1], POSITIONS[:1], embed_VD=embedding)[0, :5] ** 2).sum()

    touched = jnp.abs(influence(model.embed_VD[...])).sum(axis=-1)
    assert (touched[:5] > 0).all() and (touched[5:] == 0).all()


def test_without_positions_a_row_counts_from_zero():
    model = reference.model(TINY)
    counted = np.tile(np.arange(14), (2, 1))
    np.testing.assert_array_equal(jax.jit(run)(model, TOKENS), jax.jit(run)(model, TOKENS, None, counted))


VARIANTS = {
    "unrolled": dict(scan_layers=False),
    "in chunks of 4": dict(attention=Chunked(chunk=4)),
    **{f"remat {name}": dict(remat=name) for name in REMAT},
    "unrolled, remat full": dict(remat="full", scan_layers=False),
}


@pytest.fixture(scope="module")
def plain():
    model = reference.model(TINY)
    return model, jax.jit(run)(model, *BATCH), gradients(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_how_it_is_computed_changes_neither_values_nor_gradients(name, plain):
    model, h, grads = plain
    config = dataclasses.replace(TINY, **VARIANTS[name])
    assert_equal_trees(jax.jit(lambda model: run(model, *BATCH, config=config))(model), h)
    assert_equal_trees(gradients(model, config), grads)


def test_gradients_equal_finite_differences_of_the_numpy_llama(plain):
    model, _, grads = plain
    params, rng, step = reference.params_of(model), np.random.default_rng(0), 1e-5
    for name, array in params.items():
        direction = rng.normal(size=array.shape)
        sides = [params | {name: array + sign * step * direction} for sign in (1, -1)]
        up, down = ((WEIGHT * reference.hidden(TINY, side, *BATCH)).sum() for side in sides)
        along = float((np.asarray(grads[name]) * direction).sum())
        assert along == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-3), name


def test_a_remat_policy_keeps_less_for_the_backward_pass():
    from jax._src.ad_checkpoint import saved_residuals

    def kept(remat):
        config = dataclasses.replace(TINY, remat=remat)
        graph, params = nnx.split(jax.eval_shape(config.build, jax.random.key(0)))
        residuals = saved_residuals(lambda p: nnx.merge(graph, p)(TOKENS)[0].sum(), params)
        return sum(aval.size for aval, source in residuals if "argument" not in source)

    sizes = [kept(remat) for remat in ("full", "projections", "dots", "none")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_parameters_start_as_documented():
    config = dataclasses.replace(TINY, dim=64, ffn=128, vocab_size=512)
    model = config.build(jax.random.key(0))
    spread = {name: float(getattr(model, name)[...].std()) for name in config.parameters()}
    assert spread["embed_VD"] == pytest.approx(1 / 8, rel=0.02)
    assert spread["gate_LDF"] == pytest.approx(1 / 8, rel=0.02)
    assert spread["down_LFD"] == pytest.approx(1 / np.sqrt(128 * 4), rel=0.02)
    assert spread["o_LNHD"] == pytest.approx(1 / np.sqrt(4 * 6 * 4), rel=0.05)
    assert spread["final_norm_D"] == 0 and (model.final_norm_D[...] == 1).all()
    assert not np.array_equal(model.gate_LDF[...], model.up_LDF[...])
    other = config.build(jax.random.key(1))
    assert not np.array_equal(model.q_LDNH[...], other.q_LDNH[...])
