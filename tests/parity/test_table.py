"""The parity table: every model on every layout trains as on one device: metrics, gradients and three updates.

The rows that a default run takes are spread over models and axes; `-m slow` runs them all.
"""

import dataclasses

import jax
import pytest

from jaxtrain.observe.hlo import collectives
from jaxtrain.train import pipeline
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import lowered
from meshes import DEFAULT, MeshConfig, make
from models.llama import Config
from tests.parity import test_experts as mixtures
from tests.parity.programs import WHOLE_KEYS
from tests.parity.test_experts import THREE_UPDATES, _assert_equal_metrics, _config, _run
from tests.parity.test_layouts import REORDERED, _assert_close, _assert_same_sharding, _assert_same_way, _gradients

DENSE = Config(vocab_size=64, dim=32, num_layers=5, num_heads=8, num_kv_heads=4, head_dim=8, ffn=64)
MODELS = {"dense": DENSE} | mixtures.MODELS
RING = dataclasses.replace(DEFAULT, matmul="ring")
LAYOUTS = [
    "replica8",
    "data8",
    "stage2",
    "fsdp8",
    "expert8",
    "context8",
    "tensor4",
    "fsdp2 tensor2 stage2",
    "data2 context2 tensor2",
    "expert2 fsdp2 stage2",
    "replica2 fsdp4",
    "context4 tensor2",
    "expert4 context2",
    "fsdp4 stage2",
    "tensor4 stage2",
    "context2 stage2 tensor2",
    "expert2 stage2 context2",
    "replica2 stage2 fsdp2",
    "replica2 expert2 stage2",
    "replica2 data2 fsdp2",
    "data2 fsdp2 context2",
    "expert2 tensor4",
    "fsdp2 expert2 context2",
    "data2 stage2 tensor2",
]
FAST = {
    ("dense", "fsdp2 tensor2 stage2"),
    ("dense", "context4 tensor2"),
    ("dense", "replica2 data2 fsdp2"),
    ("moe", "expert2 stage2 context2"),
    ("mla moe", "expert2 tensor4"),
}
ROWS = [
    pytest.param(model, layout, marks=[] if (model, layout) in FAST else pytest.mark.slow)
    for model in MODELS
    for layout in LAYOUTS
]


def test_the_rows_that_always_run_are_in_the_table():
    assert {(model, layout) for model, layout in FAST} <= {(m, s) for m in MODELS for s in LAYOUTS}


@pytest.mark.parametrize(("model", "layout"), ROWS)
def test_a_model_on_a_layout_trains_as_on_one_device(model, layout, capfd):
    _assert_trains_as_on_one_device(dataclasses.replace(_config("moe"), model=MODELS[model]), layout)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("key_heads", "layout"), [(1, "tensor2 stage2"), (2, "tensor4 stage2")])
def test_key_heads_too_few_to_be_cut_stay_whole_and_train_as_on_one_device(key_heads, layout):
    config = dataclasses.replace(_config("moe", rules=WHOLE_KEYS), model=dataclasses.replace(DENSE, num_kv_heads=key_heads))
    _assert_trains_as_on_one_device(config, layout)


def test_whole_key_heads_are_not_exchanged_within_a_stage():
    """One product of query and key heads of which only the ones are cut would be: a pipeline would hang there on CPUs."""
    config = dataclasses.replace(_config("moe", rules=WHOLE_KEYS), model=dataclasses.replace(DENSE, num_kv_heads=1))
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=1, tensor=2, stage=2))
    blueprint = Blueprint(config, make(config.mesh, jax.devices()[:4]))
    pipeline.check(lowered(blueprint).compile(), blueprint.mesh)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mla", "mla moe"])
def test_latent_attention_in_a_ring_trains_as_on_one_device(model):
    config = dataclasses.replace(_config("moe", rules=RING), model=MODELS[model])
    _assert_trains_as_on_one_device(config, "fsdp2 tensor4")


def test_latent_attention_in_a_ring_gathers_no_stream():
    config = dataclasses.replace(_config("moe", rules=RING), model=MODELS["mla"], mesh=MeshConfig(fsdp=1, tensor=2))
    blueprint = Blueprint(config, make(config.mesh, jax.devices()[:2]))
    found = [x for x in collectives(lowered(blueprint).compile().as_text(), blueprint.mesh) if x.times == config.model.num_layers]
    assert {x.kind for x in found if x.bytes > 1024} == {"collective-permute", "all-reduce"}
    stream = config.batch * config.seq_len * config.model.dim * 4
    assert all(x.bytes < stream for x in found if x.kind == "all-reduce")  # gradients of weights and latents


def _assert_trains_as_on_one_device(config, layout):
    metrics, states, placed = _run(config, 3, **{part[:-1]: int(part[-1]) for part in layout.split()})
    expected_metrics, expected = mixtures._one_device(dataclasses.replace(config, rules=DEFAULT))
    _assert_equal_metrics(metrics, expected_metrics)
    _assert_close(_gradients(states[0]), _gradients(expected[0]), REORDERED)
    _assert_same_way(states[0].params, states[2].params, expected[2].params, THREE_UPDATES)
    jax.tree.map(_assert_same_sharding, placed.opt[0].mu, placed.params)
