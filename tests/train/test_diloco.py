"""DiLoCo against plain data parallelism, against replicas trained one by one with the outer step in float64, and resumed."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meshes
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints
from jaxtrain.errors import CheckpointError, ConfigError
from jaxtrain.observe.hlo import collectives
from jaxtrain.resilience.health import Health, Skip
from jaxtrain.train import diloco, pipeline, regroup
from jaxtrain.train.optim import Optimizer
from jaxtrain.train.replicas import DiLoCo, Together
from jaxtrain.train.schedule import WSD
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import lowered, train_step
from tests.parity.test_experts import MODELS
from tests.tiny import TINY

# Relative to the largest entry of an array: sums over tokens in another order, in fp32.
REORDERED = 3e-5


@dataclass(frozen=True, kw_only=True)
class Sgd(Optimizer):
    """Linear in the gradients, so that the mean of replicas' updates is the update of the mean."""

    def direction(self, letters):
        return optax.trace(0.5)


SGD = Sgd(peak_lr=0.05, clip=None, schedule=WSD(warmup=0), weight_decay=0.0)
CONFIG = dataclasses.replace(TINY, optim=SGD, steps=100)


def _start(config, **sizes):
    config = dataclasses.replace(config, mesh=meshes.MeshConfig(**({"fsdp": 1} | sizes)))
    mesh = meshes.make(config.mesh, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    return Blueprint(config, mesh)


def _batch(blueprint, index, rows=slice(None)):
    ids = np.random.default_rng(index).integers(0, 64, (2, 8, 32), dtype=np.int32)[:, rows]
    ones = np.ones(ids.shape[1:], np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), ones.shape)
    batch = dict(tokens=ids[0], targets=ids[1], segments=ones, positions=positions, weights=ones.astype(np.float32))
    return jax.device_put(batch, blueprint.batch_sharding())


_step = functools.cache(train_step)  # compiled once for each blueprint


def _run(blueprint, first, last, state=None, rows=slice(None)):
    step, losses = _step(blueprint), []
    state = blueprint.init() if state is None else state
    stop = jax.device_put(np.zeros(blueprint.mesh.devices.size, np.int32), meshes.per_device(blueprint.mesh))
    for index in range(first, last):
        state, metrics = step(state, _batch(blueprint, index, rows), stop)
        losses.append(float(metrics["train/loss"]))
    return state, losses


def _assert_close(ours, reference):
    def compare(path, x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=REORDERED * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, jax.device_get(ours), jax.device_get(reference))


def _assert_moved(ours, before):
    assert all(np.any(x != y) for x, y in zip(*(jax.tree.leaves(jax.device_get(tree)) for tree in (ours, before))))


LAYOUTS = {
    "alone": dict(replica=2),
    "fsdp2 tensor2": dict(replica=2, fsdp=2, tensor=2),
    "context2 tensor2": dict(replica=2, context=2, tensor=2),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [
        (LAYOUTS["alone"], 1),
        (LAYOUTS["fsdp2 tensor2"], 2),
        pytest.param(LAYOUTS["alone"], 2, marks=SLOW),
        pytest.param(LAYOUTS["fsdp2 tensor2"], 1, marks=SLOW),
        pytest.param(LAYOUTS["context2 tensor2"], 1, marks=SLOW),
        pytest.param(LAYOUTS["context2 tensor2"], 2, marks=SLOW),
    ],
    ids=str,
)
def test_an_outer_step_of_rate_1_after_every_step_is_plain_data_parallelism(sizes, accumulate):
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    outer = DiLoCo(every=1, lr=1.0, momentum=0.0)
    ours, losses = _run(_start(dataclasses.replace(config, replicas=outer), **sizes), 0, 3)
    plain, expected = _run(_start(config, **sizes), 0, 3)
    np.testing.assert_allclose(losses, expected, rtol=REORDERED)
    _assert_close(ours.params, plain.params)
    _assert_close(jax.tree.map(lambda x: x[1], ours.outer.local), plain.params)


@pytest.mark.slow
def test_after_every_step_the_biases_of_experts_follow_the_load_of_all_replicas():
    """The sign of the summed load is no mean of the signs of two."""
    config = dataclasses.replace(CONFIG, model=MODELS["mla moe"])
    ours, losses = _run(_start(dataclasses.replace(config, replicas=DiLoCo(every=1)), replica=2), 0, 2)
    plain, expected = _run(_start(config, replica=2), 0, 2)
    np.testing.assert_allclose(losses, expected, rtol=REORDERED)
    _assert_close(ours.params, plain.params)
    biases = [np.abs(x).max() for name, x in jax.device_get(plain.params).items() if "router_bias" in name]
    assert biases and min(biases) > 0


def test_outer_steps_equal_replicas_trained_one_by_one_and_nesterov_in_float64():
    config = DiLoCo(every=2, lr=0.7, momentum=0.9)
    ours, _ = _run(_start(dataclasses.replace(CONFIG, replicas=config), replica=2, fsdp=2), 0, 5)

    alone = _start(dataclasses.replace(CONFIG, batch=4))
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(tree))  # noqa: E731
    states = [alone.init(), alone.init()]
    theta = wide(states[0].params)
    velocity = jax.tree.map(np.zeros_like, theta)
    for first in (0, 2, 4):
        last = min(first + 2, 5)
        states = [_run(alone, first, last, s, slice(4 * i, 4 * i + 4))[0] for i, s in enumerate(states)]
        if last - first < 2:
            continue
        delta = jax.tree.map(lambda t, a, b: t - (a + b) / 2, theta, *(wide(s.params) for s in states))
        velocity = jax.tree.map(lambda v, d: 0.9 * v + d, velocity, delta)
        theta = jax.tree.map(lambda t, d, v: t - 0.7 * (d + 0.9 * v), theta, delta, velocity)
        fresh = jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), theta)
        states = [dataclasses.replace(s, params=jax.tree.map(jnp.copy, fresh)) for s in states]
    _assert_close(ours.params, theta)
    _assert_close(ours.outer.momentum, velocity)
    for i in range(2):
        _assert_close(jax.tree.map(lambda x: x[i], ours.outer.local), states[i].params)


@SLOW
def test_each_fragment_meets_in_its_turn_and_is_every_so_many_th_layer():
    config = DiLoCo(every=4, fragments=2, lr=0.7, momentum=0.9)
    blueprint = _start(dataclasses.replace(CONFIG, replicas=config), replica=2)
    state, moved = blueprint.init(), []
    for index in range(5):
        before = jax.device_get(state.params)
        state, _ = _run(blueprint, index, index + 1, state)
        moved.append(jax.tree.map(lambda a, b: np.flatnonzero((a != b).reshape(len(a), -1).any(1)), before, jax.device_get(state.params)))
    layers = [rows["q_LDNH"].tolist() for rows in moved]
    assert layers == [[], [1], [], [0], []]  # of two layers; after 2 and after 4 steps
    whole = [[name for name, rows in turn.items() if "_L" not in name and rows.size] for turn in moved]
    assert sorted(whole[1] + whole[3]) == sorted(n for n in blueprint.letters.params if "_L" not in n)
    assert whole[1] and whole[3]


@SLOW
@pytest.mark.parametrize("sent", ["bfloat16", "int8"])
def test_what_is_rounded_is_sent_in_its_own_bytes_and_the_rest_later(sent):
    config = dataclasses.replace(CONFIG, replicas=DiLoCo(every=2, sent=sent))
    blueprint = _start(config, replica=2)
    program = lowered(blueprint).as_text()
    wire = {"bfloat16": "bf16", "int8": "i8"}[sent]
    gathered = re.findall(r"stablehlo.all_gather.*?-> tensor<([\dx]*)x(\w+)>", program)
    sizes = [(np.prod([int(n) for n in dims.split("x")]), kind) for dims, kind in gathered]
    assert {kind for size, kind in sizes if size > 2 * 64 * 2} == {wire}

    state, _ = _run(blueprint, 0, 2)
    exact, _ = _run(_start(dataclasses.replace(config, replicas=DiLoCo(every=2)), replica=2), 0, 2)
    # momentum holds the mean of what was sent, the errors what was not: together the mean difference
    whole = jax.tree.map(lambda m, e: m + e.mean(0), state.outer.momentum, state.outer.error)
    _assert_close(whole, exact.outer.momentum)
    assert any(np.abs(e).max() > 0 for e in jax.tree.leaves(jax.device_get(state.outer.error)))


@pytest.mark.slow
def test_int8_differences_train_as_well_as_exact_ones():
    ends = {}
    for sent in ("float32", "int8"):
        config = dataclasses.replace(CONFIG, optim=TINY.optim, replicas=DiLoCo(every=5, sent=sent))
        ends[sent] = np.mean(_run(_start(config, replica=2), 0, 30)[1][-5:])
    assert ends["int8"] == pytest.approx(ends["float32"], abs=0.02)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    config = dataclasses.replace(CONFIG, steps=5, optim=TINY.optim, replicas=DiLoCo(every=3, sent="int8"))
    blueprint = _start(config, replica=2, fsdp=2)
    undisturbed, losses = _run(blueprint, 0, 5)
    state, first = _run(blueprint, 0, 2)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(2, state, config={}, data={}, letters=blueprint.letters)
    restored, _ = checkpoints.latest(blueprint.abstract)
    checkpoints.close()
    resumed, rest = _run(blueprint, 2, 5, restored)
    assert first + rest == losses
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(undisturbed))


@pytest.mark.parametrize("fragments", [1, pytest.param(2, marks=SLOW)])
def test_every_step_is_in_the_parameters_when_the_run_ends(fragments):
    """The last step comes before any turn: what a run evaluates and exports then is not what it began with."""
    config = dataclasses.replace(CONFIG, steps=3)
    outer = DiLoCo(every=100, fragments=fragments, lr=0.7, momentum=0.9)
    ours, _ = _run(_start(dataclasses.replace(config, replicas=outer), replica=2, fsdp=2), 0, 3)
    due, _ = _run(_start(dataclasses.replace(config, replicas=dataclasses.replace(outer, every=3, fragments=1)), replica=2), 0, 3)
    _assert_close((ours.params, ours.outer.momentum), (due.params, due.outer.momentum))
    for i in range(2):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[i], ours.outer.local), ours.params)
    _assert_moved(ours.params, _start(config).init().params)


def test_a_step_that_is_skipped_keeps_its_meeting():
    config = dataclasses.replace(CONFIG, steps=2, health=Health(not_finite=Skip()))
    blueprint = _start(dataclasses.replace(config, replicas=DiLoCo(every=100)), replica=2)
    state, _ = _run(blueprint, 0, 1)
    local = jax.device_get(state.outer.local)
    batch = _batch(blueprint, 1)
    batch["weights"] = jax.device_put(np.full((8, 32), np.nan, np.float32), blueprint.batch_sharding())
    stop = jax.device_put(np.zeros(2, np.int32), meshes.per_device(blueprint.mesh))
    state, metrics = _step(blueprint)(state, batch, stop)
    assert metrics["train/skipped"] == 1
    _assert_close(state.params, jax.tree.map(lambda x: x.mean(0), local))


def _saved(tmp_path, blueprint, state, wanted):
    """-> the state as another blueprint restores it."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), regroup.change)
    checkpoints.save(int(state.step), state, config={}, data={}, letters=blueprint.letters)
    restored, _ = checkpoints.latest(wanted.abstract)
    checkpoints.close()
    jax.tree.map(lambda x, s: _assert_equal(x.sharding, s), restored, wanted.shardings)
    return restored


def _assert_equal(x, y):
    assert x == y


@pytest.mark.parametrize("sizes", [dict(replica=4), pytest.param(dict(replica=2, fsdp=4), marks=SLOW)], ids=str)
def test_another_number_of_replicas_goes_on_from_the_mean_of_those_that_were_saved(sizes, tmp_path, capfd):
    config = dataclasses.replace(CONFIG, optim=TINY.optim, replicas=DiLoCo(every=3, sent="int8", lr=0.7, momentum=0.9))
    blueprint = _start(config, replica=6 - sizes["replica"], fsdp=2)
    state, other = _run(blueprint, 0, 4)[0], _start(config, **sizes)
    restored = _saved(tmp_path, blueprint, state, other)
    said = capfd.readouterr().err
    assert f"{6 - sizes['replica']} replicas trained apart and {sizes['replica']} go on, each from their mean" in said
    shared = lambda s: (s.step, s.params, s.outer.momentum)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(shared(s)) for s in (restored, state)))
    own = lambda s: jax.device_get((s.opt, s.outer.local, s.outer.error))  # noqa: E731
    for i in range(sizes["replica"]):
        _assert_close(jax.tree.map(lambda x: x[i], own(restored)), jax.tree.map(lambda x: x.mean(0), own(state)))
    ours, losses = _run(other, 4, 6, restored)
    _assert_moved(ours.params, jax.device_get(state.params))
    assert losses[-1] < _run(other, 4, 5)[1][0]  # than with parameters that were just drawn


@pytest.mark.slow
def test_replicas_that_train_apart_and_together_go_on_from_each_other(tmp_path, capfd):
    config = dataclasses.replace(CONFIG, optim=TINY.optim)
    together, apart = _start(config, replica=2), _start(dataclasses.replace(config, replicas=DiLoCo(every=1, sent="int8")), replica=2)
    plain, _ = _run(together, 0, 2)
    began = _saved(tmp_path / "apart", together, plain, apart)
    assert "2 replicas train apart from here on, each from the same" in capfd.readouterr().err
    for i in range(2):
        ours = began.params, *jax.tree.map(lambda x: x[i], jax.device_get((began.outer.local, began.opt)))
        jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (ours, (plain.params, plain.params, plain.opt))))
    assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get((began.outer.momentum, began.outer.error))))
    back = _saved(tmp_path / "together", apart, began, together)
    assert "go on together, from their mean; what rounding left unsent is dropped, and the outer momentum" in capfd.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), jax.device_get(plain))


def test_other_parameters_are_refused_whatever_the_replicas(tmp_path):
    config = dataclasses.replace(CONFIG, replicas=DiLoCo())
    wide = dataclasses.replace(config, model=dataclasses.replace(CONFIG.model, ffn=64))
    blueprint = _start(config, replica=2)
    with pytest.raises(CheckpointError, match="12 arrays differ"):
        _saved(tmp_path, blueprint, blueprint.init(), _start(wide, replica=4))


def test_replicas_store_apart_what_any_rules_would_spread_over_them():
    blueprint = _start(dataclasses.replace(CONFIG, rules=meshes.FSDP, replicas=DiLoCo()), replica=2, fsdp=4)
    spec = blueprint.shardings.outer.local["gate_LDF"].spec
    assert spec[0] == "replica" and spec[2] == "fsdp"
    assert blueprint.shardings.params["gate_LDF"].spec[1] == "fsdp"
    assert _start(dataclasses.replace(CONFIG, replicas=Together()), replica=2).init().outer == ()


def test_an_outer_step_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="fragments = 5"):
        DiLoCo(every=4, fragments=5)
    with pytest.raises(ConfigError, match="out of range"):
        DiLoCo(momentum=1.0)


def test_fragments_are_alike_in_size():
    letters, shapes = ["VD", "LDF", "DV", "D"], [(64, 8), (6, 8, 16), (8, 64), (8,)]
    places = diloco._places(2, letters, shapes)
    sizes = [sum(np.zeros(s)[p[f]].size for p, s in zip(places, shapes) if p[f]) for f in range(2)]
    assert max(sizes) - min(sizes) <= 8


def test_an_array_with_fewer_layers_than_fragments_meets_whole():
    places = diloco._places(4, ["LDF", "LFD", "LD", "VD"], [(2, 8, 16), (2, 16, 8), (2, 8), (64, 8)])
    assert all(turns.count(slice(None)) == 1 and turns.count(None) == 3 for turns in places)
    assert len({turns.index(slice(None)) for turns in places}) == 4


def _bytes_over_replica(config, **sizes):
    """Per step, from the compiled program; what stands under a condition runs once in `every` steps."""
    blueprint = _start(config, **sizes)
    program = lowered(blueprint).compile().as_text()
    found = [one for one in collectives(program, blueprint.mesh) if "replica" in one.axes]
    rare = getattr(config.replicas, "every", 1)
    return sum(one.wire_bytes * one.times / (rare if one.branch else 1) for one in found)


@pytest.mark.parametrize(("sent", "less"), [("float32", 8), ("bfloat16", 8), ("int8", 24)])  # XLA's CPU widens bfloat16
@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=SLOW), 2])
def test_ten_inner_steps_send_at_least_eight_times_less_between_replicas(sent, less, fsdp):
    plain = _bytes_over_replica(CONFIG, replica=2, fsdp=fsdp)
    assert plain >= 4 * CONFIG.model.num_params() / fsdp  # half of each gradient as stored, to the other replica and back
    assert _bytes_over_replica(dataclasses.replace(CONFIG, replicas=DiLoCo(every=10, sent=sent)), replica=2, fsdp=fsdp) < plain / less


QUICKSTART = 500  # steps, all of them


def _heldout_loss(folder, *overrides):
    """Of the quickstart on two replicas, at its end."""
    command = [sys.executable, "-m", "jaxtrain", "train", "configs/quickstart.py", "--fake-devices", "2", "--mesh.replica", "2"]
    command += ["--mesh.fsdp", "1", "--steps", str(QUICKSTART), "--runs-dir", str(folder), *overrides]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-2000:]
    rows = map(json.loads, (folder / "quickstart" / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}[QUICKSTART]


@pytest.mark.slow
def test_the_quickstart_with_ten_inner_steps_ends_within_two_percent_of_data_parallelism(tmp_path):
    """At equal tokens; a quarter of an hour on two cores."""
    apart = _heldout_loss(tmp_path / "apart", "--replicas", "DiLoCo", "--replicas.every", "10")
    assert apart <= 1.02 * _heldout_loss(tmp_path / "together")


def _exact(state):
    """The shared parameters with what rounding left unsent: a number between two steps may be rounded either way."""
    return jax.tree.map(lambda p, e: p - e.mean(0), state.params, state.outer.error) if state.outer.error else state.params


@pytest.mark.parametrize(
    ("sizes", "sent"),
    [
        (dict(fsdp=2), "float32"),
        pytest.param(dict(fsdp=2), "int8", marks=SLOW),
        pytest.param({}, "float32", marks=SLOW),
        pytest.param({}, "int8", marks=SLOW),
        pytest.param(dict(tensor=2), "float32", marks=SLOW),
    ],
    ids=str,
)
def test_fragments_meet_where_layers_are_divided_among_stages(sizes, sent):
    """Every so many-th layer of those that a stage holds; no device waits for another in vain."""
    model = dataclasses.replace(CONFIG.model, num_layers=4)
    config = dataclasses.replace(CONFIG, model=model, replicas=DiLoCo(every=2, fragments=2, sent=sent))
    blueprint = _start(config, replica=2, stage=2, **sizes)
    pipeline.check(lowered(blueprint).compile(), blueprint.mesh)
    one, _ = _run(_start(config, replica=2), 0, 4)
    ours, _ = _run(blueprint, 0, 4)
    _assert_close(_exact(ours), _exact(one))
    _assert_moved(ours.params, blueprint.init().params)
