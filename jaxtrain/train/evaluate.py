"""Held-out loss and bits per byte over a fixed, unshuffled list of batches. It changes no state and writes no row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import meshes
from jaxtrain.data import open_dataset
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import eval_step


class Evaluator:
    """Calling it with parameters gives the metrics; every process of the mesh must call it."""

    def __init__(self, blueprint: Blueprint):
        config = blueprint.config
        self._blueprint, self._step = blueprint, eval_step(blueprint)
        self.data = open_dataset(
            config.eval.data,
            seq_len=config.seq_len,
            batch=config.batch,
            seed=config.seed,
            vocab_size=config.model.vocab_size,
            shuffle=False,
        )
        whole = -(-self.data.num_examples // config.batch)
        self._num_batches = min(whole, config.eval.max_batches or whole)
        known = self.data.token_bytes
        self._token_bytes = np.zeros(config.model.vocab_size, np.float32)
        if known is not None:
            self._token_bytes[: len(known)] = known

    @classmethod
    def of(cls, blueprint: Blueprint) -> Evaluator | None:
        """None where the config evaluates nothing."""
        return cls(blueprint) if blueprint.config.eval else None

    def __call__(self, params: Any) -> dict[str, float]:
        """{"eval/loss": nats per target, "eval/bits_per_byte": where the bytes of tokens are known}."""
        sums = [self._step(params, self._batch(i), self._token_bytes) for i in range(self._num_batches)]
        nll, count, num_bytes = (math.fsum(float(x) for x in column) for column in zip(*sums))
        metrics = {"eval/loss": nll / count}
        return metrics | ({"eval/bits_per_byte": nll / math.log(2) / num_bytes} if num_bytes else {})

    def _batch(self, index: int) -> dict[str, Any]:
        config, mesh = self._blueprint.config, self._blueprint.mesh
        rows = meshes.local_rows(mesh, config.rules, config.batch)
        return meshes.globalize(self.data.rows(index, rows), mesh, config.rules, config.batch)
