"""Pipelines compute what one device computes, store and checkpoint what it stores, and move no more than they say."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from jaxtrain.errors import ConfigError, RunError
from jaxtrain.generate import generate
from jaxtrain.layout import check_layout, num_microbatches
from jaxtrain.train.pipeline import check, describe, divide, unstaged
from jaxtrain.train.replicas import DiLoCo
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import eval_step, lowered
from meshes import DEFAULT, ZERO1, Gathered, GPipe, Interleaved, OneFOneB, Ring, Ulysses, ZeroBubble, pipeline
from tests.parity.test_experts import MODELS
from tests.parity.test_layouts import CONFIG, MODEL, REORDERED, _assert_same_update, _batch, _on

FIVE = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, num_layers=5))  # which 2 and 4 do not divide
TIED = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, tied=True))
SLOW = pytest.mark.slow


def _with(config, pipeline, rules=DEFAULT, **changes):
    return dataclasses.replace(config, rules=dataclasses.replace(rules, pipeline=pipeline), **changes)


def _assert_equal_to_one_device(config, **sizes):
    loss, ours, *_ = _on(config, **({"fsdp": 1} | sizes))
    plain = dataclasses.replace(config, rules=DEFAULT, accumulate=1)
    _assert_same_update(loss, ours, plain)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(stage=2),
        dict(stage=2, fsdp=2, tensor=2),
        pytest.param(dict(stage=2, fsdp=2, data=2), marks=SLOW),
        pytest.param(dict(stage=2, context=2, fsdp=2), marks=SLOW),
        pytest.param(dict(stage=2, expert=2, fsdp=2), marks=SLOW),
        pytest.param(dict(stage=2, replica=2, tensor=2), marks=SLOW),
    ],
    ids=lambda sizes: " ".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_stages_beside_other_axes_equal_one_device(sizes, capfd):
    _assert_equal_to_one_device(CONFIG, **sizes)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(stage=2, context=4), dict(stage=2, context=2, tensor=2)], ids=str)
@pytest.mark.parametrize("way", [Ring(), Gathered(), Ulysses()], ids=str)
def test_every_way_of_attention_within_a_stage_equals_one_device(way, sizes):
    _assert_equal_to_one_device(dataclasses.replace(CONFIG, rules=dataclasses.replace(DEFAULT, context=way)), **sizes)


@pytest.mark.parametrize(
    ("pipeline", "sizes"),
    [
        pytest.param(OneFOneB(), dict(stage=4, fsdp=2), marks=SLOW),
        pytest.param(ZeroBubble(), dict(stage=2, tensor=2, data=2), marks=SLOW),
        (Interleaved(chunks=2), dict(stage=2, fsdp=2)),
        pytest.param(GPipe(keep="inputs"), dict(stage=2, tensor=2), marks=SLOW),
        pytest.param(ZeroBubble(keep="inputs"), dict(stage=4), marks=SLOW),
        pytest.param(Interleaved(keep="inputs"), dict(stage=4, tensor=2), marks=SLOW),
    ],
    ids=str,
)
def test_every_schedule_equals_one_device_with_layers_that_do_not_divide(pipeline, sizes):
    _assert_equal_to_one_device(_with(FIVE, pipeline), **sizes)


@pytest.mark.parametrize(
    "config",
    [
        _with(TIED, GPipe()),
        pytest.param(_with(TIED, OneFOneB(), accumulate=2), marks=SLOW),
        pytest.param(_with(CONFIG, None), marks=SLOW),
        _with(FIVE, Interleaved(), rules=ZERO1),
        pytest.param(_with(CONFIG, Interleaved(), rules=meshes.HSDP), marks=SLOW),
        pytest.param(_with(CONFIG, Interleaved(), model=dataclasses.replace(MODEL, remat="full")), marks=SLOW),
        pytest.param(_with(CONFIG, Interleaved(), model=dataclasses.replace(MODEL, scan_layers=False)), marks=SLOW),
    ],
    ids=["tied", "tied accumulated", "no pipeline", "ZERO1", "HSDP", "remat", "unrolled"],
)
def test_models_and_rules_in_a_pipeline_equal_one_device(config, capfd):
    _assert_equal_to_one_device(config, stage=2, fsdp=2)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def _blueprint(config, **sizes):
    config = dataclasses.replace(config, mesh=meshes.MeshConfig(**({"fsdp": 1} | sizes)))
    return Blueprint(config, meshes.make(config.mesh, jax.devices()[: int(np.prod(list(sizes.values())))]))


def test_stages_store_their_layers_and_equal_parts_of_what_does_not_divide():
    two, five = _blueprint(CONFIG, stage=2, fsdp=2), _blueprint(FIVE, stage=2, fsdp=2)

    def shards(blueprint):
        return jax.tree.map(lambda x, s: s.shard_shape(x.shape), blueprint.shapes, blueprint.shardings)

    assert shards(two).params["gate_LDF"] == (1, 16, 64)
    assert shards(five).params["gate_LDF"] == (5, 8, 64)
    assert shards(two).params["embed_VD"] == (64, 8)
    plain = _blueprint(CONFIG, fsdp=4)
    assert jax.tree.map(lambda x: x.shape, two.shapes) == jax.tree.map(lambda x: x.shape, plain.shapes)


def test_without_a_pipeline_stage_cuts_the_batch():
    """Under the default rules less their pipeline, as under the presets that have none."""
    flat, sizes = _with(CONFIG, None), dict(stage=2, fsdp=2)
    assert _blueprint(flat, **sizes).batch_sharding().shard_shape((8, 32)) == (2, 32)
    staged = _blueprint(CONFIG, **sizes)
    assert staged.batch_sharding().shard_shape((8, 32)) == (4, 32)
    assert unstaged(staged).shards("B", sizes) == 4  # evaluation and text run without the pipeline
    with pytest.raises(ConfigError, match="4 batch shards"):
        check_layout(dataclasses.replace(flat, batch=6, mesh=meshes.MeshConfig(stage=2, fsdp=2)), 4)


@pytest.mark.parametrize("batch", [CONFIG.batch, 6], ids=["batch divides", "batch does not"])
def test_evaluation_and_text_under_stages_equal_one_device(batch):
    config = dataclasses.replace(FIVE, batch=batch)
    sizes = dict(stage=4, tensor=2) if batch == 6 else dict(stage=2, fsdp=2)
    found = []
    for blueprint in (_blueprint(config, **sizes), _blueprint(config, fsdp=1)):
        params = blueprint.init().params
        rows = jax.device_put(_batch(config), blueprint.batch_sharding())
        sums = [float(x) for x in eval_step(blueprint)(params, rows, np.ones(64, np.float32))]
        found.append((sums, generate(blueprint, params, [[1, 2, 3], [4]], tokens=3, temperature=0.0)))
    assert found[0][0] == pytest.approx(found[1][0], rel=REORDERED)
    assert found[0][1] == found[1][1]


def test_layers_lie_where_their_virtual_stage_is():
    found = divide((1, 5), [2, 1, 1, 2], stages=2)  # a stack of one layer, then one of five; two chunks
    assert found.counts == ((1, 1), (0, 1), (0, 1), (0, 2))
    assert found.rows[0].tolist() == [[[0], [0]], [[0], [0]]]
    assert found.rows[1].tolist() == [[[0, 0], [2, 0]], [[1, 0], [3, 4]]]
    assert [rows.ravel()[places].tolist() for rows, places in zip(found.rows, found.places)] == [[0], [0, 1, 2, 3, 4]]
    assert divide((4,), [2, 2], stages=2).in_order(0)
    assert not divide((4,), [1, 1, 1, 1], stages=2).in_order(0)
    assert not divide((3,), [2, 1], stages=2).in_order(0)


def _compiled(config, **sizes):
    return lowered(_blueprint(config, **sizes)).compile()


@pytest.mark.slow
def test_what_experts_count_in_a_pipeline_compiles_where_replicas_train_apart():
    """XLA's partitioner aborted the process on the rows of layers that are not in order."""
    config = dataclasses.replace(CONFIG, model=MODELS["mla moe"], replicas=DiLoCo(every=2))
    blueprint = _blueprint(config, replica=2, stage=2, fsdp=2)
    check(lowered(blueprint).compile(), blueprint.mesh)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(stage=2, fsdp=2, tensor=2),
        pytest.param(dict(stage=2, context=2, fsdp=2), marks=SLOW),
        pytest.param(dict(stage=2, context=2, tensor=2), marks=SLOW),
    ],
    ids=str,
)
def test_only_the_two_sends_permute_and_weights_are_gathered_within_the_branches(sizes):
    """A permute waits for all devices that it names, also those of stages in another branch: it would wait for ever."""
    text = _compiled(CONFIG, **sizes).as_text()
    permutes = re.findall(r"^.*collective-permute\(.*$", text, re.MULTILINE)
    assert len(permutes) == 2 and all("/ppermute" in line for line in permutes)
    gathers = re.findall(r"^.*= (\S+) all-gather\(.*op_name=\"([^\"]*)\"", text, re.MULTILINE)
    weights = [where for shape, where in gathers if "while/body" in where]
    assert weights and all("/cond/" in where for where in weights)


def test_memory_of_a_training_step_does_not_grow_with_microbatches():
    def memory(pipeline, microbatches):
        config = _with(CONFIG, pipeline, batch=microbatches, accumulate=microbatches)
        return _compiled(config, stage=2).memory_analysis().temp_size_in_bytes

    assert memory(OneFOneB(), 32) <= 1.2 * memory(OneFOneB(), 8)
    assert memory(GPipe(), 32) > 2 * memory(GPipe(), 8)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_that_are_not_scanned_keep_no_more_in_a_stage(remat, monkeypatch):
    """Not a copy of their weights for each microbatch."""
    kept, init = [], pipeline._Layout.__init__

    def seen(layout, pulls):
        init(layout, pulls)
        kept.append(sum(x.size * x.dtype.itemsize for x in jax.eval_shape(partial(layout.zeros, 1))))

    monkeypatch.setattr(pipeline._Layout, "__init__", seen)
    for scan_layers in (True, False):
        model = dataclasses.replace(MODEL, num_layers=4, remat=remat, scan_layers=scan_layers)
        lowered(_blueprint(dataclasses.replace(CONFIG, model=model), stage=2))
    scanned, unrolled = kept
    assert 0 < unrolled <= scanned


@pytest.mark.parametrize(
    ("changes", "sizes", "said"),
    [
        (dict(accumulate=2), dict(stage=4), "accumulate = 4"),
        (dict(batch=4), dict(stage=4, fsdp=2), "batch = 8"),
        (dict(), dict(stage=8), "mesh.stage = 4"),
        (dict(rules=dataclasses.replace(DEFAULT, pipeline=Interleaved(chunks=4))), dict(stage=2), "mesh.stage = 1"),
        (dict(rules=dataclasses.replace(DEFAULT, pipeline=Interleaved(chunks=9))), dict(stage=2), "chunks = 2"),
        (dict(batch=9), dict(stage=2, fsdp=2), "batch = 10"),
        (dict(rules=dataclasses.replace(DEFAULT, matmul="ring")), dict(stage=2, tensor=2), "rules.matmul = 'whole'"),
    ],
)
def test_a_pipeline_that_cannot_be_filled_is_refused_with_what_works(changes, sizes, said):
    config = dataclasses.replace(FIVE, **changes, mesh=meshes.MeshConfig(**({"fsdp": 1} | sizes)))
    with pytest.raises(ConfigError, match=said):
        check_layout(config, int(np.prod(list(sizes.values()))))


def test_microbatches_are_chosen_where_the_config_leaves_them():
    assert num_microbatches(CONFIG, dict(stage=2)) == 8
    assert num_microbatches(CONFIG, dict(stage=2, fsdp=4)) == 2
    assert num_microbatches(dataclasses.replace(CONFIG, accumulate=4), dict(stage=2)) == 4
    assert num_microbatches(dataclasses.replace(CONFIG, batch=100), dict(stage=2)) == 5
    assert num_microbatches(CONFIG, dict(fsdp=4)) == 1


def test_a_run_says_how_long_its_stages_idle_as_it_is_run():
    """1F1B of 8 microbatches on 2 stages: 2 ticks of a forward, 16 of a backward, that has its forward in it."""
    one = 1 - 8 * (1 + 2) / (2 * 1 + 16 * 2)
    again = 1 - 8 * (1 + 3) / (2 * 1 + 16 * 3)
    assert f"{one:.0%} of the time idle" in describe(_with(CONFIG, OneFOneB()), dict(stage=2))
    assert f"{again:.0%} of the time idle" in describe(_with(CONFIG, OneFOneB(keep="inputs")), dict(stage=2))


def test_a_pipeline_that_would_hang_is_refused_before_it_runs():
    mesh = meshes.make(meshes.MeshConfig(stage=2, fsdp=2), jax.devices()[:4])

    ring = lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])  # noqa: E731
    branch = lambda x: jax.lax.cond(x.sum() > 0, ring, lambda x: x, x)  # noqa: E731
    spec = jax.sharding.PartitionSpec("stage", "fsdp")

    def compiled(local):
        run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(run).lower(jnp.ones((2, 2))).compile()

    check(compiled(ring), mesh)
    check(compiled(branch), mesh)  # apart from the ticks all devices take the same
    with pytest.raises(RunError, match="(?s)would hang on CPUs.*over fsdp within a stage"):
        check(compiled(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: branch(x) + 1, x)), mesh)
