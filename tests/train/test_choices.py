"""What a run says of its axes: a line for each whose use was chosen, none for plain data parallelism."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

import meshes
from jaxtrain.train.choices import chosen
from jaxtrain.train.replicas import DiLoCo
from jaxtrain.train.state import Blueprint
from meshes import DEFAULT, TP, Capacity, Gathered, MeshConfig, Ulysses
from tests.parity.test_experts import MODELS
from tests.parity.test_layouts import CONFIG

MIXTURE = dataclasses.replace(CONFIG, model=MODELS["moe"])


def said(config, **sizes: int) -> list[str]:
    """By a run of this config on a mesh of these sizes."""
    mesh = MeshConfig(**({"fsdp": 1} | sizes))
    devices = jax.devices()[: math.prod(sizes.values())]
    return list(chosen(Blueprint(dataclasses.replace(config, mesh=mesh), meshes.make(mesh, devices))))


def ruled(config=CONFIG, rules=DEFAULT, **changes):
    return dataclasses.replace(config, rules=dataclasses.replace(rules, **changes))


@pytest.mark.parametrize(
    ("config", "sizes", "lines"),
    [
        (CONFIG, dict(data=2, fsdp=2), []),
        (CONFIG, dict(stage=2, expert=2), []),  # a pipeline has its own line, and nothing here has experts
        (ruled(rules=meshes.FSDP), dict(tensor=2, stage=2), []),
        (CONFIG, dict(context=2), ["context 2: Ring(zigzag=True)"]),
        (ruled(context=Ulysses()), dict(context=2), ["context 2: Ulysses()"]),
        (ruled(context=Gathered(zigzag=False)), dict(context=4), ["context 4: Gathered(zigzag=False)"]),
        (MIXTURE, dict(expert=2), ["expert 2: Ragged(require=False), tokens by an all-to-all padded to the worst case"]),
        (ruled(MIXTURE, experts=Capacity()), dict(expert=4), ["expert 4: Capacity(factor=1.25), tokens by an all-to-all"]),
        (CONFIG, dict(tensor=2), ["tensor 2: cuts F N K V, and the sequence between blocks (R); matmul 'whole'"]),
        (ruled(matmul="ring"), dict(tensor=4), ["tensor 4: cuts F N K V, and the sequence between blocks (R); matmul 'ring'"]),
        (ruled(rules=TP, matmul="ring"), dict(tensor=2), ["tensor 2: cuts F N K V, not the sequence between blocks (R); matmul 'whole'"]),
        (CONFIG, dict(replica=2), ["replica 2: Together()"]),
    ],
    ids=str,
)  # fmt: skip
def test_an_axis_whose_use_was_chosen_has_a_line_that_says_how(config, sizes, lines):
    assert said(config, **sizes) == lines


def test_lines_come_in_the_order_of_the_axes_and_say_what_a_mesh_made_of_the_rules():
    first, second = said(dataclasses.replace(CONFIG, replicas=DiLoCo(every=7)), replica=2, context=2)
    assert first.startswith("replica 2: DiLoCo(every=7, ") and second == "context 2: Ring(zigzag=True)"
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dim=48))
    assert said(wide, stage=2, context=3) == ["context 3: Gathered(zigzag=True)"]  # there a ring takes powers of two
