"""Held-out loss and bits per byte over a fixed, unshuffled list of batches. It changes no state and writes no row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import meshes
from jaxtrain.config import RunConfig
from jaxtrain.data import Dataset, Source, open_dataset
from jaxtrain.data.prepare import default_cache
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import eval_step


def open_data(
    config: RunConfig, source: Source, lead: bool, shuffle: bool = True, moved: Callable[[], None] = lambda: None
) -> Dataset:
    """One of the config's sources as batches; the lead process tokenises it where that has not been done.

    `moved`: called, on any thread, whenever more of it is on disk, in the lead and in those that wait for it.
    """
    return open_dataset(
        source,
        seq_len=config.seq_len,
        batch=config.batch,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        cache_dir=default_cache(config.runs_dir),
        shuffle=shuffle,
        prepare=lead,
        moved=moved,
    )


class Evaluator:
    """Calling it with parameters gives the metrics; every process of the mesh must call it."""

    def __init__(self, blueprint: Blueprint, lead: bool, moved: Callable[[], None]):
        config = blueprint.config
        self._blueprint, self._step = blueprint, eval_step(blueprint)
        self.data = open_data(config, config.eval.data, lead, shuffle=False, moved=moved)
        self._num_batches = min(self.data.num_steps, config.eval.max_batches or self.data.num_steps)
        known = self.data.token_bytes
        self.last: dict[str, float] | None = None  # what it gave when it was called last
        self._token_bytes = np.zeros(config.model.vocab_size, np.float32) if known is None else known.astype(np.float32)

    def __call__(self, params: Any) -> dict[str, float]:
        """{"eval/loss": nats per target, "eval/bits_per_byte" and "eval/bytes" where the bytes of tokens are known}."""
        sums = [self._step(params, self._batch(i), self._token_bytes) for i in range(self._num_batches)]
        nll, count, num_bytes = (math.fsum(float(x) for x in column) for column in zip(*sums))
        in_bytes = {"eval/bits_per_byte": nll / math.log(2) / num_bytes, "eval/bytes": round(num_bytes)} if num_bytes else {}
        self.last = {"eval/loss": nll / count} | in_bytes
        return self.last

    def _batch(self, index: int) -> dict[str, Any]:
        batch, mesh, rules = self._blueprint.config.batch, self._blueprint.mesh, self._blueprint.rules
        rows = meshes.local_rows(mesh, rules, batch)
        return meshes.globalize(self.data.rows(index, rows), mesh, rules, batch)
