"""Collectives of each layout, read from the compiled step, against the budget in collectives.json: none is unplanned.

The budget holds, by kind and mesh axis, executions and bytes in one step on eight devices, of programs for CPUs and for
GPUs; what stands in a branch counts as if it always ran. CPU programs have no reduce-scatter: an all-reduce stands for
it. GPU programs need `make plan`. After a change that is meant, `python -m tests.parity.test_collectives` writes both.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain.observe.hlo import Collective, traffic
from tests.parity.programs import DENSE, LAYOUTS, measured
from tests.tiny import TINY

BUDGET = Path(__file__).with_name("collectives.json")
ROOT = Path(__file__).parents[2]
PLAN = Path(sys.prefix, "plan")  # where `make plan` puts it
FAST = {"data8", "fsdp8", "tensor4", "stage4", "expert4 fsdp2", "mla tensor4"}
STREAM = TINY.batch * TINY.seq_len * DENSE.dim * 4  # bytes of the residual stream of a whole batch in float32


def can_compile_for_gpus():
    return PLAN.is_dir() or all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "nvidia.cu13")))


gpus = pytest.mark.skipif(not can_compile_for_gpus(), reason="no CUDA plugin, ptxas and libdevice here: make plan")


@functools.cache
def on(platform, layout):
    if platform == "cpu":
        return measured(layout, jax.devices())
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": f"{ROOT}{os.pathsep}{PLAN}"}
    command = [sys.executable, "-m", "tests.parity.programs", layout]
    ran = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-4000:]
    found = [Collective(**one) for one in json.loads(ran.stdout.splitlines()[-1])]
    return [Collective(**vars(one) | {"axes": tuple(one.axes)}) for one in found]


def rows(found):
    return {f"{kind} over {axes}": list(row) for (kind, axes), row in traffic(found).items()}


TABLE = json.loads(BUDGET.read_text())
ROWS = [pytest.param("cpu", layout, marks=[] if layout in FAST else pytest.mark.slow) for layout in TABLE["cpu"]]
ROWS += [pytest.param("gpu", layout, marks=[pytest.mark.slow, gpus]) for layout in TABLE["gpu"]]


@pytest.mark.parametrize(("platform", "layout"), ROWS)
def test_a_layout_moves_no_more_than_its_budget(platform, layout):
    found = on(platform, layout)
    budget = TABLE[platform][layout]
    over = {name: row for name, row in rows(found).items() if any(a > b for a, b in zip(row, budget.get(name, (0, 0))))}
    culprits = [f"{one.times} x {one.bytes} B  {one.op}" for one in found if f"{one.kind} over {' x '.join(one.axes)}" in over]
    assert not over, f"budget {({name: budget.get(name) for name in over})}; found {over}:\n" + "\n".join(culprits)


BOTH = pytest.mark.parametrize("platform", ["cpu", pytest.param("gpu", marks=[pytest.mark.slow, gpus])])


@BOTH
def test_data_parallelism_reduces_every_gradient_once(platform):
    found = on(platform, "data8")
    assert {one.kind for one in found} == {"all-reduce"}
    assert sum(one.bytes * one.times for one in found) == pytest.approx(4 * DENSE.num_params(), rel=0.05)


@BOTH
def test_fsdp_gathers_each_layers_weights_once_forward_and_once_backward_and_reduces_once(platform):
    found = on(platform, "fsdp8")
    reduction = {"cpu": "all-reduce", "gpu": "reduce-scatter"}[platform]
    in_layers = [one for one in found if one.times == DENSE.num_layers]
    layer = 4 * sum(np.prod(p.shape[1:]) for name, p in DENSE.parameters().items() if "_L" in name and len(p.shape) > 2)
    gathered = sum(one.bytes for one in in_layers if one.kind == "all-gather")
    reduced = sum(one.bytes for one in in_layers if one.kind == reduction)
    # A GPU's combined messages hold the norms too, of two rows of D.
    assert 2 * layer <= gathered <= 1.01 * 2 * layer and layer <= reduced <= 1.05 * layer
    assert {one.kind for one in found} == {"all-gather", reduction} and {one.axes for one in found} == {("fsdp",)}
    ends = [one for one in found if one.times == 1 and one.kind == reduction]
    assert sum(one.bytes for one in ends) == pytest.approx(4 * 2 * DENSE.vocab_size * DENSE.dim, rel=0.05)


@pytest.mark.slow
@gpus
@pytest.mark.parametrize(("layout", "copies", "parts"), [("replica2 fsdp4", "replica", 4), ("data2 fsdp2 tensor2", "data", 4)])
def test_gradients_are_summed_over_copies_as_they_are_stored(layout, copies, parts):
    """Not whole over both axes at once, which sends a whole gradient over the slower one."""
    found = [one for one in on("gpu", layout) if copies in one.axes]
    assert {(one.kind, one.axes) for one in found} == {("all-reduce", (copies,))}
    assert sum(one.bytes * one.times for one in found) == pytest.approx(4 * DENSE.num_params() / parts, rel=0.05)


def test_tensor_parallelism_has_four_exchanges_of_the_stream_in_a_layer_each_way():
    """The backward gathers two gradients and sums two; that remat "full" runs the forward again is three more, as what
    leaves the ffn is not needed again."""
    in_layers = [one for one in on("cpu", "tensor4") if one.times == DENSE.num_layers]
    assert {one.bytes for one in in_layers} == {STREAM} and {one.axes for one in in_layers} == {("tensor",)}
    of = lambda found: sorted(one.kind for one in found)  # noqa: E731
    backward = [one for one in in_layers if "transpose" in one.op]
    again = [one for one in backward if "rematted_computation" in one.op]
    four = ["all-gather"] * 2 + ["all-reduce"] * 2
    assert of(one for one in in_layers if one not in backward) == four
    assert of(one for one in backward if one not in again) == four
    assert of(again) == ["all-gather"] * 2 + ["all-reduce"]


@pytest.mark.slow
@gpus
def test_tensor_parallelism_gathers_and_scatters_the_stream_twice_a_layer_each_way():
    """A GPU's reduce-scatters bear no name; the fifth, and two of the backward's gathers, are of the forward pass that remat
    "full" runs again."""
    in_layers = [one for one in on("gpu", "tensor4") if one.times == DENSE.num_layers]
    gathers = [one for one in in_layers if one.kind == "all-gather"]
    backward = [one for one in gathers if "transpose" in one.op]
    assert sum(one.bytes for one in gathers if one not in backward) == 2 * STREAM
    assert sum(one.bytes for one in backward) == (2 + 2) * STREAM
    assert sum(one.bytes for one in in_layers if one.kind == "reduce-scatter") == (2 + 2 + 1) * STREAM
    assert {one.kind for one in in_layers} == {"all-gather", "reduce-scatter"}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    platforms = ["cpu", "gpu"] if can_compile_for_gpus() else ["cpu"]
    table = TABLE | {p: {name: rows(on(p, name)) for name in LAYOUTS} for p in platforms}
    BUDGET.write_text(json.dumps(table, indent=1) + "\n")
