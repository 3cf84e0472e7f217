"""What is cast for compute and what is not, and that mixtures train in bfloat16."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from jaxtrain.protocols import BATCH_FIELDS
from jaxtrain.train.precision import BF16
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import _gradients
from tests.parity.test_experts import _config, _run
from tests.tiny import TINY

BF16_LOSS = 2e-2  # relative; bf16 keeps 8 bits


def test_routers_stay_float32_and_all_else_is_cast():
    config = dataclasses.replace(_config("mla moe"), precision=BF16)
    blueprint = Blueprint(config, meshes.make(config.mesh, jax.devices()[:1]))
    cast = jax.eval_shape(blueprint.compute_copy, blueprint.shapes.params)
    exact = {name for name, x in cast.items() if x.dtype == jnp.float32}
    assert exact == {"router_LDE", "router_bias_LE"}
    assert {x.dtype.name for name, x in cast.items() if name not in exact} == {"bfloat16"}


@pytest.mark.parametrize(("model", "sizes"), [("dense", dict(tensor=2)), ("moe", dict(fsdp=2))])
def test_a_layout_in_bfloat16_comes_close_to_one_device(model, sizes):
    """Sums of bfloat16 over an axis within a shard_map, which XLA's own pass aborts on."""
    config = dataclasses.replace(TINY if model == "dense" else _config(model), precision=BF16)
    ours, theirs = (_run(config, 1, **on)[0] for on in (sizes, {}))
    for name in ("train/loss", "train/grad_norm"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=BF16_LOSS), name


@pytest.mark.parametrize("sizes", [dict(data=2, context=2), dict(data=2, expert=2)])
@pytest.mark.parametrize("rules", ["DP", "ZERO1", "ZERO2", "FSDP", "TP_SP", "gathered once"])
def test_gradients_of_bfloat16_are_float32_in_every_layout(rules, sizes):
    rules = meshes.PRESETS.get(rules) or dataclasses.replace(meshes.DEFAULT, gather="step")
    mesh = meshes.MeshConfig(**{"fsdp": 1} | sizes)
    config = dataclasses.replace(TINY, precision=BF16, rules=rules, mesh=mesh)
    blueprint = Blueprint(config, meshes.make(mesh, jax.devices()[: math.prod(sizes.values())]))
    batch = {name: jax.ShapeDtypeStruct((config.batch, config.seq_len), kind) for name, kind in BATCH_FIELDS.items()}
    with meshes.use(blueprint.mesh, blueprint.rules):
        (_, grads) = jax.eval_shape(partial(_gradients, blueprint), blueprint.shapes.params, batch)
    assert {x.dtype.name for x in jax.tree.leaves(grads)} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["moe", "mla moe"])
def test_a_mixture_in_bfloat16_comes_close_to_one_in_float32(model):
    config = _config(model)
    ours, theirs = (_run(c, 1, expert=2)[0] for c in (dataclasses.replace(config, precision=BF16), config))
    assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=BF16_LOSS)
    moved = np.abs(ours["experts/load"] - theirs["experts/load"]).sum() / theirs["experts/load"].sum()
    assert moved < 0.1  # choices that were near to each other
