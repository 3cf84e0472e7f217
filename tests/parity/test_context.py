"""A step over a cut sequence: one device's loss, gradients and update; memory that falls as the axis grows."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

import meshes
from jaxtrain.layout import check_layout
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import eval_step, lowered
from meshes import DEFAULT, Gathered, LayoutError, Ring, Ulysses
from models.attention import CuDNN, Tiled
from tests.parity.test_layouts import CONFIG, MODEL, REORDERED, _assert_same_update, _batch, _on

WAYS = {"ring": Ring(), "gathered": Gathered(), "Ulysses": Ulysses(), "natural": Ring(zigzag=False)}
MESHES = {
    "context2": dict(context=2),
    "context4": dict(context=4),
    "context8": dict(context=8),
    "context4 tensor2": dict(context=4, tensor=2),
    "data2 context2 tensor2": dict(data=2, context=2, tensor=2),
    "fsdp2 context4": dict(fsdp=2, context=4),
    "expert4 context2": dict(expert=4, context=2),
    "replica2 expert2 context2": dict(replica=2, expert=2, context=2),
}
FAST = {
    ("context8", "ring"),
    ("context4 tensor2", "ring"),
    ("data2 context2 tensor2", "gathered"),
    ("data2 context2 tensor2", "Ulysses"),
    ("expert4 context2", "ring"),
}
ROWS = [
    pytest.param(mesh, way, marks=[] if (mesh, way) in FAST else pytest.mark.slow) for mesh in MESHES for way in WAYS
]


@pytest.mark.parametrize(("mesh", "way"), ROWS)
def test_a_step_over_a_cut_sequence_equals_one_device(mesh, way, capfd):
    config = dataclasses.replace(CONFIG, rules=dataclasses.replace(DEFAULT, context=WAYS[way]))
    loss, ours, *_ = _on(config, **({"fsdp": 1} | MESHES[mesh]))
    _assert_same_update(loss, ours, CONFIG)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


VARIANTS = [
    pytest.param(dict(accumulate=2)),  # by hand over `data`, so by hand twice over
    pytest.param(dict(accumulate=2, rules=meshes.DP), marks=pytest.mark.slow),
    pytest.param(dict(accumulate=2, rules=dataclasses.replace(DEFAULT, context=Ulysses())), marks=pytest.mark.slow),
    pytest.param(dict(model=dataclasses.replace(MODEL, remat="full")), marks=pytest.mark.slow),
    pytest.param(
        dict(model=dataclasses.replace(MODEL, remat="dots", scan_layers=False, tied=True)), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_accumulation_and_remat_over_a_cut_sequence_equal_one_device(changes):
    config = dataclasses.replace(CONFIG, **changes)
    loss, ours, *_ = _on(config, fsdp=1, data=2, context=2, tensor=2)
    _assert_same_update(loss, ours, dataclasses.replace(config, accumulate=1, rules=DEFAULT))


@cache
def _evaluated(rules, **sizes):
    config = dataclasses.replace(CONFIG, rules=rules, mesh=meshes.MeshConfig(fsdp=1, **sizes))
    blueprint = Blueprint(config, meshes.make(config.mesh, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))]))
    batch = jax.device_put(_batch(config), blueprint.batch_sharding())
    num_bytes = np.arange(64, dtype=np.float32)
    return [float(x) for x in eval_step(blueprint)(blueprint.init().params, batch, num_bytes)]


def test_evaluation_over_a_cut_sequence_equals_one_device():
    np.testing.assert_allclose(_evaluated(DEFAULT, context=4), _evaluated(DEFAULT), rtol=REORDERED)


# Length 32,768, one row. What does not shrink is the logits of one tile (8 heads x 256 x 256, a few times), and the
# token ids, gathered once to be put in order: 3 MiB beside the 48 MiB of a device of eight.
LENGTH, SHRINKS = 32_768, 1.1
# Keys and values of one layer, whole on each device, and their gradients: 4 x 32,768 x 4 heads x 8 x 4 bytes = 16 MiB.
GATHERED = 16 << 20


def _temporary(way, context):
    model = dataclasses.replace(MODEL, attention=Tiled(tile=256))
    rules, mesh = dataclasses.replace(DEFAULT, context=way), meshes.MeshConfig(fsdp=1, context=context)
    config = dataclasses.replace(CONFIG, model=model, rules=rules, mesh=mesh, batch=1, seq_len=LENGTH)
    blueprint = Blueprint(config, meshes.make(mesh, jax.devices()[:context]))
    return lowered(blueprint).compile().memory_analysis().temp_size_in_bytes


@cache
def _whole():
    return _temporary(Ring(), 1)


@pytest.mark.parametrize("context", [2, 4, 8])
def test_memory_of_a_step_falls_as_one_over_the_axis(context):
    assert context * _temporary(Ring(), context) < SHRINKS * _whole()


@pytest.mark.parametrize("way", ["gathered", "Ulysses"])
def test_memory_of_a_step_falls_so_under_other_ways_but_for_gathered_keys(way):
    kept = GATHERED if way == "gathered" else 0
    assert 8 * (_temporary(WAYS[way], 8) - kept) < SHRINKS * _whole()


def test_a_layout_that_attention_cannot_take_is_refused_before_anything_compiles():
    config = dataclasses.replace(CONFIG, mesh=meshes.MeshConfig(context=4))
    check_layout(config, 8)
    with pytest.raises(LayoutError, match="8 chunks"):
        check_layout(dataclasses.replace(config, seq_len=36), 8)
    required = dataclasses.replace(MODEL, attention=CuDNN(require=True))
    with pytest.raises(LayoutError, match="CuDNN is required"):
        check_layout(dataclasses.replace(config, model=required), 8)
    exchanged = dataclasses.replace(DEFAULT, context=Ulysses())
    with pytest.raises(LayoutError, match="num_heads = 6"):
        few = dataclasses.replace(MODEL, num_heads=6, num_kv_heads=2)
        check_layout(dataclasses.replace(config, model=few, rules=exchanged), 8)
