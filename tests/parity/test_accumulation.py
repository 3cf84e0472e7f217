"""Microbatches: the same gradients under every rule, and gradients reduced over copies once a step, not once a microbatch."""

import dataclasses

import pytest

import meshes
from jaxtrain.observe.hlo import collectives
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import lowered
from tests.parity.test_layouts import CONFIG, _assert_same_update, _on

ACCUMULATED = dataclasses.replace(CONFIG, batch=32, accumulate=4)
MESHES = {"data2 fsdp2 tensor2": dict(data=2, fsdp=2, tensor=2), "replica2 context2 fsdp2": dict(replica=2, context=2, fsdp=2)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "preset", ["ZERO1", *(pytest.param(p, marks=pytest.mark.slow) for p in ("DP", "ZERO2", "HSDP", "FSDP_TP", "DEFAULT"))]
)
def test_accumulated_microbatches_equal_one_device(preset, mesh):
    loss, ours, *_ = _on(dataclasses.replace(ACCUMULATED, rules=meshes.PRESETS[preset]), **MESHES[mesh])
    _assert_same_update(loss, ours, dataclasses.replace(CONFIG, batch=32))


@pytest.mark.parametrize(
    ("preset", "sizes", "axes_in_loops"),
    [
        ("DP", dict(data=8), set()),
        ("ZERO1", dict(data=8), set()),
        ("ZERO2", dict(data=8), {"data"}),
        ("DEFAULT", dict(data=8), set()),
        ("DEFAULT", dict(fsdp=8), {"fsdp"}),  # layers are gathered, and their gradients scattered, as they are used
        ("HSDP", dict(data=4, fsdp=2), {"fsdp"}),  # between the groups once
    ],
)
def test_copies_reduce_gradients_once_a_step_unless_told_otherwise(preset, sizes, axes_in_loops):
    found = _collectives(dataclasses.replace(ACCUMULATED, rules=meshes.PRESETS[preset]), sizes)
    assert {axis for one in found if one.times > 1 for axis in one.axes} == axes_in_loops
    once = [one for one in found if one.times == 1 and one.bytes > 100]
    assert {axis for one in once for axis in one.axes} == set(sizes)


def _collectives(config, sizes):
    config = dataclasses.replace(config, mesh=meshes.MeshConfig(**({"fsdp": 1} | sizes)))
    blueprint = Blueprint(config, meshes.make(config.mesh))
    return collectives(lowered(blueprint).compile().as_text(), blueprint.mesh)
