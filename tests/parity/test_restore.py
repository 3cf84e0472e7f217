"""A checkpoint written under any layout restores under any other, with the same hash: from each to the next, around."""

import dataclasses

import jax
import numpy as np
import pytest

import meshes
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, digest
from jaxtrain.train.state import Blueprint
from tests.parity.test_experts import MODELS, _config
from tests.parity.test_table import DENSE, LAYOUTS

RULES = list(meshes.PRESETS.values())


def _blueprints(model, layouts):
    """With the presets in turn where the layout is a mesh of plain axes."""
    for i, layout in enumerate(["fsdp1", *layouts]):
        sizes = {part[:-1]: int(part[-1]) for part in layout.split()}
        plain = not {"stage", "expert"} & sizes.keys()
        rules = RULES[i % len(RULES)] if plain else meshes.DEFAULT
        config = dataclasses.replace(_config("moe"), model=model, rules=rules, mesh=meshes.MeshConfig(**({"fsdp": 1} | sizes)))
        yield Blueprint(config, meshes.make(config.mesh, jax.devices()[: int(np.prod(list(sizes.values())))]))


def _told_apart(state):
    """With other numbers in every place: moments of zeros, as they are born, would be the same wherever they ended up."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.device_put(rng.integers(2**20, size=x.shape).astype(x.dtype), x.sharding), state)


FEW = ["stage2", "expert4 context2", "tensor4 stage2", "replica2 fsdp4"]


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        (DENSE, FEW),
        pytest.param(DENSE, LAYOUTS, marks=pytest.mark.slow),
        pytest.param(MODELS["mla moe"], LAYOUTS, marks=pytest.mark.slow),
    ],
    ids=["dense", "dense everywhere", "mla moe everywhere"],
)
def test_every_layout_restores_what_the_one_before_wrote(model, layouts, tmp_path):
    blueprints = list(_blueprints(model, layouts))
    state = _told_apart(blueprints[0].init())
    written = digest(state)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    for step, blueprint in enumerate([*blueprints[1:], blueprints[0]], start=1):
        checkpoints.save(step, state, config={}, data={}, letters=blueprint.letters)
        state, manifest = checkpoints.latest(blueprint.abstract)
        assert manifest.step == step and digest(state) == written
        wrong = [x for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(blueprint.shardings)) if x.sharding != s]
        assert not wrong
    checkpoints.close()
