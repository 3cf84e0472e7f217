"""A small state of every kind of leaf: what tests of checkpoints save and restore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import meshes

FSDP_4X2 = dict(config=meshes.MeshConfig(fsdp=4, tensor=2), rules=meshes.FSDP_TP)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt: Any


LETTERS = {"embed": "VD", "blocks": {"q": "LDNH", "up": "LDF", "scale": "LD"}, "mask": "_"}
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))


def make_state(seed: int = 0) -> State:
    """fp32, bf16, int32, uint32, bool, scalars and an array without elements; not sharded."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "embed": jax.random.normal(keys[0], (16, 8)),
        "blocks": {
            "q": jax.random.normal(keys[1], (2, 8, 4, 2)),
            "up": jax.random.normal(keys[2], (2, 8, 16)).astype(jnp.bfloat16),
            "scale": jnp.zeros((0, 8)),
        },
        "mask": jax.random.bits(keys[3], (5,), jnp.uint32),
    }
    flags = {"seen": jnp.array([True, False, True]), "count": jnp.uint32(2**32 - 1)}
    return State(step=jnp.int32(seed), params=params, opt=(TX.init(params), flags))


def letters() -> State:
    opt = optax.tree_map_params(TX, lambda _, text: text, TX.init(make_state().params), LETTERS, transform_non_params=lambda _: "")
    return State(step="", params=LETTERS, opt=(opt, {"seen": "_", "count": ""}))


def placed(state: State, config: meshes.MeshConfig, rules: meshes.Rules) -> State:
    mesh = meshes.make(config)
    return jax.tree.map(jax.device_put, state, meshes.shardings(mesh, rules.params, letters()))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
