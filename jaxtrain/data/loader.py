"""Batches made ahead of the step by a background thread and placed on the mesh. It does not decide what is in them."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

import meshes
from jaxtrain.errors import RunError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtrain.data.dataset import Dataset

POLL_SECONDS = 0.1  # how soon the thread sees that it is to stop while the queue is full


class Loader:
    """An iterator of (step, global batch) for first_step <= step < last_step, at most `prefetch` batches ahead.

    What the thread raises is raised by `next`. Raises RunError where a batch takes longer than `deadline_seconds`.
    """

    def __init__(
        self,
        dataset: Dataset,
        mesh: Mesh,
        rules: meshes.Rules,
        first_step: int,
        last_step: int,
        prefetch: int = 2,
        deadline_seconds: float = 600.0,
    ):
        self._dataset, self._mesh, self._rules = dataset, mesh, rules
        self._steps, self._deadline = range(first_step, last_step), deadline_seconds
        self._queue: queue.Queue = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            rows = meshes.local_rows(self._mesh, self._rules, self._dataset.batch)
            for step in self._steps:
                batch = self._dataset.rows(step, rows)
                self._put((step, meshes.globalize(batch, self._mesh, self._rules, self._dataset.batch)))
                if self._stop.is_set():
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, whole
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[int, dict[str, Any]]:
        if self._stop.is_set():
            raise StopIteration
        try:
            item = self._queue.get(timeout=self._deadline)
        except queue.Empty:
            self.close()
            raise RunError(
                f"no batch came in {self._deadline:g} s.",
                got="the loader's thread is still reading"
                if self._thread.is_alive()
                else "the loader's thread is dead",
                rule="data arrives faster than the deadline",
                fix="look at the storage that the shards lie on",
            ) from None
        if isinstance(item, tuple):
            return item
        self.close()
        raise StopIteration if item is None else item

    def close(self) -> None:
        """Ends the thread; one that is stuck in a read is left behind after a second, as it cannot be ended."""
        self._stop.set()
        self._thread.join(timeout=1.0)
        while not self._queue.empty():
            self._queue.get_nowait()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
