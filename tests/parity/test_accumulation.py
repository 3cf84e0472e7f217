"""Microbatches: the same gradients under every rule, and gradients reduced over copies once a step, not once a microbatch."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import meshes
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import train_step
from tests.parity.test_layouts import CONFIG, REORDERED, _assert_close, _batch, _gradients, _on, _one_device

ACCUMULATED = dataclasses.replace(CONFIG, batch=32, accumulate=4)
MESHES = {"data2 fsdp2 tensor2": dict(data=2, fsdp=2, tensor=2), "replica2 context2 fsdp2": dict(replica=2, context=2, fsdp=2)}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "preset", ["ZERO1", "HSDP", "DEFAULT", *(pytest.param(p, marks=pytest.mark.slow) for p in ("DP", "ZERO2", "FSDP_TP"))]
)
def test_accumulated_microbatches_equal_one_device(preset, mesh):
    loss, ours, *_ = _on(dataclasses.replace(ACCUMULATED, rules=meshes.PRESETS[preset]), **MESHES[mesh])
    expected_loss, expected = _one_device(dataclasses.replace(CONFIG, batch=32))
    assert loss == pytest.approx(expected_loss, rel=REORDERED)
    _assert_close(_gradients(ours), _gradients(expected), REORDERED)


@pytest.mark.parametrize(
    ("preset", "sizes", "in_loops"),
    [
        ("DP", dict(data=8), False),
        ("ZERO1", dict(data=8), False),
        ("ZERO2", dict(data=8), True),
        ("DEFAULT", dict(data=8), False),
        ("DEFAULT", dict(fsdp=8), True),  # layers are gathered, and their gradients scattered, as they are used
    ],
)
def test_copies_reduce_gradients_once_a_step_unless_told_otherwise(preset, sizes, in_loops):
    inside, outside = collectives(_program(dataclasses.replace(ACCUMULATED, rules=meshes.PRESETS[preset]), sizes))
    assert bool(inside) == in_loops
    assert outside


def test_hybrid_sharding_gathers_within_a_group_and_reduces_between_groups_once():
    inside, _ = collectives(_program(dataclasses.replace(ACCUMULATED, rules=meshes.HSDP), dict(data=4, fsdp=2)))
    assert inside and all(size <= 2 for size in inside)


def collectives(program: str) -> tuple[list[int], list[int]]:
    """The group sizes of the collectives that stand in loops, and of those that do not."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", program, re.M | re.S))
    calls = {name: set(re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", text)) for name, text in bodies.items()}
    looped = set(re.findall(r"body=%?([\w.\-]+)", program))
    while more := {callee for name in looped for callee in calls.get(name, ())} - looped:
        looped |= more
    found: dict[bool, list[int]] = {True: [], False: []}
    for name, text in bodies.items():
        for line in text.splitlines():
            if any(f" {kind}(" in line or f" {kind}-start(" in line for kind in COLLECTIVES):
                found[name in looped].append(_group_size(line))
    return found[True], found[False]


def _group_size(line: str) -> int:
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return explicit[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    return 2  # a permutation's pairs


def _program(config, sizes) -> str:
    config = dataclasses.replace(config, mesh=meshes.MeshConfig(**({"fsdp": 1} | sizes)))
    blueprint = Blueprint(config, meshes.make(config.mesh))
    sharding = blueprint.batch_sharding()
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in _batch(config).items()}
    stop = jax.ShapeDtypeStruct((8,), np.int32, sharding=meshes.per_device(blueprint.mesh))
    return train_step(blueprint).lower(blueprint.abstract, batch, stop).compile().as_text()
