"""Mixtures on every kind of mesh compute what one device computes: loss, auxiliary loss, loads, gradients, three updates."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

import meshes
from jaxtrain.observe.hlo import collectives
from jaxtrain.train.optim import AdamW
from jaxtrain.train.schedule import Cosine
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import lowered, train_step
from meshes.rules import Capacity
from models import mla
from models.attention import Chunked
from models.family import Grouped
from models.mla import Latent
from models.moe import Bias, Config, Experts, Limited, Sigmoid
from tests.parity.test_layouts import REORDERED, _assert_close, _assert_same_sharding, _assert_same_way, _batch, _gradients
from tests.tiny import TINY

# Of the way that a parameter's entries went in three updates, on average. Adam divides a gradient by its own size, so the
# few entries whose gradient is noise go anywhere; the rest goes the same way to four digits.
THREE_UPDATES = 1e-2

SHAPE = dict(vocab_size=64, dim=32, num_layers=2)
LATENT = Latent(num_heads=4, kv_latent=16, q_latent=24, nope_dim=8, rope_dim=4, value_dim=8)
MODELS = {
    "moe": Config(
        **SHAPE,
        heads=Grouped(num_heads=8, num_kv_heads=4, head_dim=8),
        experts=Experts(num_experts=8, num_chosen=2, ffn=32, z_loss=1e-2),
    ),
    "mla moe": Config(
        vocab_size=64,
        dim=32,
        num_layers=3,
        heads=LATENT,
        experts=Experts(
            num_experts=8,
            num_chosen=3,
            ffn=16,
            shared_ffn=16,
            router=Sigmoid(scale=2.5),
            balance=Bias(speed=0.01, weight=0.01),
            limited=Limited(groups=4, kept=2),
        ),
        dense_layers=1,
        dense_ffn=64,
    ),
    "mla": mla.Config(**SHAPE, heads=dataclasses.replace(LATENT, q_latent=None), ffn=64),
}
MESHES = {
    "expert2": dict(expert=2),
    "expert4": dict(expert=4),
    "expert8": dict(expert=8),
    "expert2 fsdp2 tensor2": dict(expert=2, fsdp=2, tensor=2),
    "expert4 context2": dict(expert=4, context=2),
    "data2 expert4": dict(data=2, expert=4),
    "fsdp2 context2 tensor2": dict(fsdp=2, context=2, tensor=2),
    "replica2 expert2 context2": dict(replica=2, expert=2, context=2),
    "stage2 expert2 fsdp2": dict(stage=2, expert=2, fsdp=2),
    "stage2 expert2 tensor2": dict(stage=2, expert=2, tensor=2),
}
FAST = {
    "moe": ["expert4 context2"],
    "mla moe": [],  # tests/parity/test_table.py has one
    "mla": ["fsdp2 context2 tensor2"],
}
LAYOUTS = [
    pytest.param(model, mesh, marks=[] if mesh in FAST[model] else pytest.mark.slow)
    for model in MODELS
    for mesh in MESHES
]


def _run(config, steps, **sizes):
    """-> (metrics of the first update, states after each on the host, the last one on the mesh)."""
    config = dataclasses.replace(config, mesh=meshes.MeshConfig(**({"fsdp": 1} | sizes)))
    mesh = meshes.make(config.mesh, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    blueprint = Blueprint(config, mesh)
    state, step, first, states = blueprint.init(), train_step(blueprint), None, []
    batch, stop = jax.device_put(_batch(config), blueprint.batch_sharding()), np.zeros(mesh.size, np.int32)
    for _ in range(steps):
        state, metrics = step(state, batch, jax.device_put(stop, meshes.per_device(mesh)))
        first = first or jax.device_get(metrics)
        states.append(jax.device_get(state))
    return first, states, state


@cache
def _one_device(config, steps=3):
    return _run(config, steps)[:2]


def _config(model, **changes):
    return dataclasses.replace(TINY, model=MODELS[model], optim=AdamW(clip=None, peak_lr=1e-3, schedule=Cosine(warmup=1)), z_loss=1e-3, **changes)


def _assert_equal_metrics(ours, reference):
    for name in ("train/loss", "train/auxiliary_loss", "train/grad_norm"):
        np.testing.assert_allclose(ours.get(name, 0.0), reference.get(name, 0.0), rtol=REORDERED, err_msg=name)
    for name in ("experts/load", "experts/dropped_fraction", "experts/max_load"):
        np.testing.assert_array_equal(ours.get(name), reference.get(name), err_msg=name)


@pytest.mark.parametrize(("model", "mesh"), LAYOUTS)
def test_a_mixture_on_a_mesh_equals_one_device(model, mesh, capfd):
    metrics, states, placed = _run(_config(model), 3, **MESHES[mesh])
    expected_metrics, expected = _one_device(_config(model))
    _assert_equal_metrics(metrics, expected_metrics)
    _assert_close(_gradients(states[0]), _gradients(expected[0]), REORDERED)
    _assert_same_way(states[0].params, states[2].params, expected[2].params, THREE_UPDATES)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    jax.tree.map(_assert_same_sharding, placed.opt[0].mu, placed.params)


CAPPED = dataclasses.replace(meshes.DEFAULT, experts=Capacity(factor=0.75))


@pytest.mark.parametrize(
    "mesh", ["expert2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("expert2 fsdp2 tensor2", "expert4 context2"))]
)
def test_a_fixed_capacity_drops_the_same_tokens_on_every_mesh(mesh):
    config = _config("moe", rules=CAPPED)
    metrics, states, _ = _run(config, 1, **MESHES[mesh])
    expected_metrics, expected = _one_device(config, 1)
    assert 0.1 < metrics["experts/dropped_fraction"] < 0.5
    _assert_equal_metrics(metrics, expected_metrics)
    _assert_close(_gradients(states[0]), _gradients(expected[0]), REORDERED)


@pytest.mark.slow
def test_microbatches_change_neither_the_auxiliary_loss_nor_the_loads_nor_the_bias():
    whole, split = (_run(_config("mla moe", accumulate=n), 1, expert=2) for n in (1, 4))
    _assert_equal_metrics(split[0], whole[0])
    _assert_close(_gradients(split[1][0]), _gradients(whole[1][0]), REORDERED)
    for one, other in zip(whole[1], split[1], strict=True):
        np.testing.assert_array_equal(one.params["router_bias_LE"], other.params["router_bias_LE"])
    assert np.abs(whole[1][0].params["router_bias_LE"]).max() == pytest.approx(0.01)


@pytest.mark.parametrize("preset", ["FSDP", *(pytest.param(name, marks=pytest.mark.slow) for name in ("TP_SP", "ZERO1"))])
def test_presets_that_leave_experts_whole_compute_the_same(preset):
    config = _config("moe", rules=meshes.PRESETS[preset])
    metrics, states, _ = _run(config, 1, expert=2, fsdp=2, tensor=2)
    expected_metrics, expected = _one_device(_config("moe"))
    _assert_equal_metrics(metrics, expected_metrics)
    _assert_close(_gradients(states[0]), _gradients(expected[0]), REORDERED)


EXCHANGED = {"dropless, padded": (meshes.DEFAULT, 4 * 32 * 2), "capacity": (CAPPED, 8 * 6)}


@pytest.mark.parametrize(("rules", "rows"), EXCHANGED.values(), ids=EXCHANGED)
def test_a_layer_exchanges_tokens_four_times_and_nothing_else_of_their_size(rules, rows):
    """Forward there and back, backward there and back; fp32 rows of D. Padded: 4 peers x 32 tokens x 2 choices of a
    device's one sequence; capacity: 8 experts x 0.75 x 32 x 2 / 8. What else crosses `expert` is smaller than 1 kB a time,
    but for what has no E and is stored over `fsdp` and `expert`: its weights, gathered forward and backward, and gradients."""
    config = dataclasses.replace(_config("moe", rules=rules), mesh=meshes.MeshConfig(expert=4, fsdp=2))
    blueprint = Blueprint(config, mesh := meshes.make(config.mesh))
    program = lowered(blueprint).compile().as_text()
    over = [x for x in collectives(program, mesh) if "expert" in x.axes]
    large = [x for x in over if x.kind == "all-to-all" and x.bytes > 1024]
    assert sum(x.times for x in large) == 4 * config.model.num_layers
    assert {x.bytes for x in large} == {rows * config.model.dim * 4}
    gathers = [x for x in over if x.kind == "all-gather" and x.bytes > 1024]
    assert {x.axes for x in gathers} == {("fsdp", "expert")}
    weights = [4 * p.size // 2 for name, p in config.model.parameters().items() if name in ("q_LDNH", "k_LDKH", "v_LDKH", "o_LNHD")]
    assert sorted(x.bytes for x in gathers if x.times == 2) == sorted(2 * weights)
    reductions = [x for x in over if x.kind == "all-reduce" and x.bytes > 1024]
    assert all("dot_general" in x.op for x in reductions if x.times > 1)
    ends = [x.bytes for x in reductions if x.times == 1]  # gradients of embedding and unembedding, with a few scalars
    assert sum(ends) <= 1.01 * 4 * 2 * config.model.vocab_size * config.model.dim


def test_two_runs_on_a_mesh_are_bit_identical():
    one, other = (_run(_config("moe"), 2, expert=4, fsdp=2)[1][-1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_state_is_born_with_the_same_bits_on_every_mesh():
    config = _config("mla moe")
    one, eight = (Blueprint(config, meshes.make(meshes.MeshConfig(expert=n), jax.devices()[:n])).init() for n in (1, 8))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(eight))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"), [("moe", dict(stage=2, fsdp=2, tensor=2)), ("mla moe", dict(stage=2, expert=2, context=2))], ids=str
)
def test_within_a_stage_nothing_permutes_but_the_sends(name, sizes):
    """A permute waits for all devices that it names, also those of stages in another branch. The layout of tokens for the
    router must not spread to segments, whose slices attention compares chunk by chunk; nor may what stages of unlike
    layers keep share a buffer where it is laid out otherwise."""
    config = _config(name)
    model = dataclasses.replace(config.model, attention=Chunked(chunk=8))
    config = dataclasses.replace(config, model=model, mesh=meshes.MeshConfig(**sizes))
    blueprint = Blueprint(config, mesh := meshes.make(config.mesh))
    found = collectives(lowered(blueprint).compile().as_text(), mesh)
    assert {x.axes for x in found if x.kind == "collective-permute"} == {("stage",)}
    assert not [x for x in found if x.kind == "all-to-all" and x.branch and x.axes != ("expert",)]
