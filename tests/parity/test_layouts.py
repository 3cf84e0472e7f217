"""Every rules preset on every kind of mesh computes what one device computes: loss, gradients, one update."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

import meshes
from jaxtrain.generate import generate
from jaxtrain.train.optim import AdamW, Lion, Muon
from jaxtrain.train.schedule import WSD
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import train_step
from models.llama import Config
from tests.tiny import TINY

# Relative to the largest entry of each array. fp32 keeps 7 digits; sums over 8 x 32 tokens and 2 layers in another order
# lose about one and a half of them.
REORDERED = 3e-5
# Of the way that an array's entries went in the first update, on average. Adam's is a whole rate either way, whatever the
# gradient's size: one that REORDERED may turn round goes twice as far apart. Were gradients normal and the largest at ten
# deviations, they would be 2.4 of ten thousand, and this is twice what they add up to.
ONE_UPDATE = 1e-3

MODEL = Config(vocab_size=64, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, ffn=64)
# The first update at the whole rate: at the default's hundredth of it, a wrong one would be lost in what parameters are.
RATE = dict(peak_lr=1e-2, schedule=WSD(warmup=0))
CONFIG = dataclasses.replace(TINY, model=MODEL, optim=AdamW(clip=None, **RATE), z_loss=1e-3)
MESHES = {
    "fsdp8": dict(fsdp=8),
    "data2 fsdp2 tensor2": dict(data=2, fsdp=2, tensor=2),
    "replica2 context2 tensor2": dict(replica=2, fsdp=1, context=2, tensor=2),
    "stage2 expert2 fsdp2": dict(stage=2, expert=2, fsdp=2),
}


def _batch(config):
    rng = np.random.default_rng(0)
    shape = (config.batch, config.seq_len)
    ends = rng.random(shape) < 0.1
    segments = 1 + np.cumsum(ends, axis=1, dtype=np.int32)
    starts = np.maximum.accumulate(np.where(np.diff(segments, axis=1, prepend=0) > 0, np.arange(shape[1]), 0), axis=1)
    ids = rng.integers(0, 64, (2, *shape), dtype=np.int32)
    positions = np.arange(shape[1], dtype=np.int32) - starts.astype(np.int32)
    weights = (rng.random(shape) < 0.9).astype(np.float32)
    return dict(tokens=ids[0], targets=ids[1], segments=segments, positions=positions, weights=weights)


def _on(config, **sizes):
    """-> (loss, state after one update on the host and on the mesh, blueprint) on a mesh of these sizes."""
    config = dataclasses.replace(config, mesh=meshes.MeshConfig(**sizes))
    count = int(np.prod(list(sizes.values())))
    mesh = meshes.make(config.mesh, jax.devices()[:count])
    blueprint = Blueprint(config, mesh)
    state = blueprint.init()
    batch = jax.device_put(_batch(config), blueprint.batch_sharding())

    stop = jax.device_put(np.zeros(count, np.int32), meshes.per_device(mesh))
    after, metrics = train_step(blueprint)(state, batch, stop)
    return float(metrics["train/loss"]), jax.device_get(after), after, blueprint


@cache
def _one_device(config):
    return _on(config, fsdp=1)[:2]


@cache
def _start(config):
    """The parameters before the first update; they are the same bits on every mesh."""
    blueprint = Blueprint(config, meshes.make(meshes.MeshConfig(), jax.devices()[:1]))
    return jax.device_get(blueprint.init().params)


def _gradients(state):
    """Adam's first moment after one update: the gradient times 1 - b1, for nothing clips it here."""
    return state.opt[0].mu


def _assert_close(ours, reference, tolerance):
    def compare(path, x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, ours, reference)


def _assert_same_way(start, ours, reference, tolerance):
    """From the same start; that an array went somewhere is seen too, or any two ways would be the same."""

    def compare(path, start, x, y):
        apart, way = np.abs(x - y).mean(), np.abs(y - start).mean()
        assert way > 1e-4 and apart <= tolerance * way, (jax.tree_util.keystr(path), apart, way)

    jax.tree_util.tree_map_with_path(compare, start, ours, reference)


def _assert_same_update(loss, ours, config):
    """As one device's by this config: the loss, the gradients, and the way that the parameters went."""
    expected_loss, expected = _one_device(config)
    assert loss == pytest.approx(expected_loss, rel=REORDERED)
    _assert_close(_gradients(ours), _gradients(expected), REORDERED)
    _assert_same_way(_start(config), ours.params, expected.params, ONE_UPDATE)


ROWS = [
    pytest.param(preset, mesh, marks=[] if "DEFAULT" == preset or mesh == "replica2 context2 tensor2" else pytest.mark.slow)
    for preset in meshes.PRESETS
    for mesh in MESHES
]


@pytest.mark.parametrize(("preset", "mesh"), ROWS)
def test_a_preset_on_a_mesh_equals_one_device(preset, mesh, capfd):
    config = dataclasses.replace(CONFIG, rules=meshes.PRESETS[preset])
    loss, ours, placed, _ = _on(config, **({"fsdp": 1} | MESHES[mesh]))
    _assert_same_update(loss, ours, CONFIG)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    for moment in (placed.opt[0].mu, placed.opt[0].nu):
        jax.tree.map(_assert_same_sharding, moment, placed.params)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), pytest.param(dict(context=2, tensor=4), marks=pytest.mark.slow)], ids=str)
def test_products_in_a_ring_equal_one_device(sizes):
    rules = dataclasses.replace(meshes.DEFAULT, matmul="ring")
    loss, ours, *_ = _on(dataclasses.replace(CONFIG, rules=rules), **sizes)
    _assert_same_update(loss, ours, CONFIG)


@pytest.mark.slow
def test_text_of_a_length_that_the_stream_does_not_divide_into_is_that_of_one_device():
    texts = []
    for sizes in (dict(fsdp=1), dict(fsdp=2, tensor=2, context=2)):
        blueprint = _on(CONFIG, **sizes)[3]
        texts.append(generate(blueprint, blueprint.init().params, [[1, 2, 3], [4]], tokens=4, temperature=0.0))
    assert texts[0] == texts[1]


def _assert_same_sharding(moment, param):
    assert moment.sharding.is_equivalent_to(param.sharding, param.ndim)


@pytest.mark.parametrize("optim", [pytest.param(Lion(**RATE), marks=pytest.mark.slow), Muon(**RATE)], ids=["lion", "muon"])
def test_every_optimizer_updates_alike_on_a_mesh(optim):
    config = dataclasses.replace(CONFIG, optim=optim)
    _, ours, _, blueprint = _on(config, fsdp=2, tensor=2, data=2)
    _assert_same_way(_start(config), ours.params, _one_device(config)[1].params, ONE_UPDATE)
    assert sum(x != "" for x in jax.tree.leaves(blueprint.letters.opt)) >= len(jax.tree.leaves(ours.params))


@pytest.mark.parametrize("sizes", [dict(fsdp=1), dict(fsdp=2, tensor=2)], ids=["one device", "fsdp2 tensor2"])
def test_accumulated_microbatches_equal_the_whole_batch(sizes):
    loss, ours, *_ = _on(dataclasses.replace(CONFIG, accumulate=4), **sizes)
    _assert_same_update(loss, ours, CONFIG)


def test_a_state_is_born_with_the_same_bits_on_every_mesh():
    one, eight = (
        Blueprint(CONFIG, meshes.make(meshes.MeshConfig(), jax.devices()[:n])).init() for n in (1, 8)
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), jax.device_get(one), jax.device_get(eight))


def test_no_device_holds_a_whole_array_that_the_rules_divide():
    mesh = meshes.make(meshes.MeshConfig(fsdp=4, tensor=2))
    state = Blueprint(CONFIG, mesh).init()
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held < sum(x.nbytes for x in jax.tree.leaves(state)) / 3
