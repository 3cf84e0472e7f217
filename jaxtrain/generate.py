"""Text written by a model, token by token. For looking at a model, not for serving one: it keeps no KV cache."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import meshes
from jaxtrain.train.pipeline import without_pipeline
from jaxtrain.train.state import Blueprint


def generate(
    blueprint: Blueprint, params: Any, prompts: list[list[int]], tokens: int, temperature: float, seed: int = 0
) -> list[list[int]]:
    """Each prompt's ids followed by `tokens` new ones. Every process of the mesh must call it.

    Token t is drawn with fold_in(key(seed), t); temperature 0 takes the most likely one. The whole text is computed
    anew for each token, so the cost grows with its square.
    """
    rules = without_pipeline(blueprint)
    rows, inside, between = (rules.shards(letter, dict(blueprint.mesh.shape)) for letter in "BSR")
    columns = math.lcm(inside, between)
    length = -(-(max(map(len, prompts)) + tokens) // columns) * columns
    text_BS = np.zeros((-(-len(prompts) // rows) * rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        text_BS[row, : len(prompt)] = prompt
    starts_B = np.array([len(p) for p in prompts] + [1] * (len(text_BS) - len(prompts)), np.int32)
    out = meshes.sharding(blueprint.mesh, "", blueprint.rules.acts)
    write = jax.jit(partial(_write, blueprint, temperature, seed), out_shardings=out)
    text_BS = np.asarray(write(params, text_BS, starts_B))
    return [text_BS[row, : len(prompt) + tokens].tolist() for row, prompt in enumerate(prompts)]


def _write(blueprint: Blueprint, temperature: float, seed: int, params: Any, text_BS: Array, starts_B: Array) -> Array:
    key = jax.random.key(seed)

    def one(t: Array, text_BS: Array) -> Array:
        text_BS = meshes.constrain(text_BS, "BS")
        model = blueprint.model(blueprint.compute_copy(params))
        h_BD = lax.dynamic_index_in_dim(model(text_BS, None, None)[0], t - 1, axis=1, keepdims=False)
        logits_BV = (h_BD @ meshes.constrain(model.unembedding(), "DV")).astype(jnp.float32)
        drawn_B = jax.random.categorical(jax.random.fold_in(key, t), logits_BV / max(temperature, 1e-6))
        chosen_B = drawn_B if temperature else logits_BV.argmax(-1)
        kept_B = lax.dynamic_index_in_dim(text_BS, t, axis=1, keepdims=False)
        next_B = jnp.where(t < starts_B, kept_B, chosen_B.astype(jnp.int32))
        return lax.dynamic_update_index_in_dim(text_BS, next_B, t, axis=1)

    with meshes.use(blueprint.mesh, without_pipeline(blueprint)):
        # Layers stored over `stage` are moved to other dims: a scan over a sharded dim would gather them all.
        params = jax.tree.map(meshes.store, params, blueprint.letters.params)
        return lax.fori_loop(starts_B.min(), text_BS.shape[1], one, text_BS)
