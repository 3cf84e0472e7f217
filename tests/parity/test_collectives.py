"""Collectives of each layout, read from the compiled step, against the budget in collectives.json: none is unplanned.

The budget holds, by kind and mesh axes, executions and bytes in one step on eight CPU devices; what is smaller than a
row of activations (metrics, norms) is left out. CPU programs have no reduce-scatter: an all-reduce stands for it. After
a change that is meant, `python -m tests.parity.test_collectives` writes it again.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import meshes
from jaxtrain.observe.hlo import collectives, traffic
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import lowered
from models.llama import Config
from tests.parity.test_experts import MODELS
from tests.tiny import TINY

BUDGET = Path(__file__).with_name("collectives.json")
SMALL = 1024  # bytes
DENSE = Config(vocab_size=64, dim=32, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=8, ffn=64, remat="full")
LAYOUTS = {
    "data8": (DENSE, dict(data=8)),
    "fsdp8": (DENSE, dict(fsdp=8)),
    "tensor4": (DENSE, dict(tensor=4)),
    "data2 fsdp2 tensor2": (DENSE, dict(data=2, fsdp=2, tensor=2)),
    "context4": (DENSE, dict(context=4)),
    "stage4": (DENSE, dict(stage=4)),
    "expert4 fsdp2": (MODELS["moe"], dict(expert=4, fsdp=2)),
}


def measured(model, sizes):
    config = dataclasses.replace(TINY, model=model, mesh=meshes.MeshConfig(**({"fsdp": 1} | sizes)))
    mesh = meshes.make(config.mesh, jax.devices()[: int(np.prod(list(sizes.values())))])
    blueprint = Blueprint(config, mesh)
    found = collectives(lowered(blueprint).compile().as_text(), mesh)
    return [one for one in found if one.bytes >= SMALL and one.axes]


def rows(found):
    return {f"{kind} over {axes}": list(row) for (kind, axes), row in traffic(found).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_moves_no_more_than_its_budget(layout):
    found = measured(*LAYOUTS[layout])
    budget = json.loads(BUDGET.read_text())[layout]
    over = {name: row for name, row in rows(found).items() if any(a > b for a, b in zip(row, budget.get(name, (0, 0))))}
    culprits = [f"{one.times} x {one.bytes} B  {one.op}" for one in found if f"{one.kind} over {' x '.join(one.axes)}" in over]
    assert not over, f"budget {({name: budget.get(name) for name in over})}; found {over}:\n" + "\n".join(culprits)


def test_data_parallelism_reduces_every_gradient_once():
    found = measured(*LAYOUTS["data8"])
    assert {one.kind for one in found} == {"all-reduce"}
    assert sum(one.bytes * one.times for one in found) == pytest.approx(4 * DENSE.num_params(), rel=0.05)


def test_fsdp_gathers_each_layers_weights_once_forward_and_once_backward_and_reduces_once():
    found = measured(*LAYOUTS["fsdp8"])
    in_layers = [one for one in found if one.times == DENSE.num_layers]
    layer = 4 * sum(np.prod(p.shape[1:]) for name, p in DENSE.parameters().items() if "_L" in name and len(p.shape) > 2)
    gathered = sum(one.bytes for one in in_layers if one.kind == "all-gather")
    reduced = sum(one.bytes for one in in_layers if one.kind == "all-reduce")
    assert gathered == 2 * layer and layer <= reduced <= 1.05 * layer
    assert {one.axes for one in found} == {("fsdp",)}


def test_tensor_parallelism_has_four_exchanges_of_the_stream_in_a_layers_forward_pass():
    found = measured(*LAYOUTS["tensor4"])
    stream = TINY.batch * TINY.seq_len * DENSE.dim * 4
    in_layers = [one for one in found if one.times == DENSE.num_layers]
    assert {one.bytes for one in in_layers} == {stream}
    forward = [one for one in in_layers if "transpose" not in one.op]
    assert len(forward) == 4 and {one.axes for one in in_layers} == {("tensor",)}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    table = {name: rows(measured(*layout)) for name, layout in LAYOUTS.items()}
    BUDGET.write_text(json.dumps(table, indent=1) + "\n")
