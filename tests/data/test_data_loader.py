"""The loader: the dataset's batches on the mesh, ahead of time, with errors passed on and an end that never hangs."""

import threading
import time

import jax
import numpy as np
import pytest

import meshes
from jaxtrain.data import Loader, Synthetic, open_dataset
from jaxtrain.errors import DataError, RunError
from jaxtrain.protocols import BATCH_FIELDS


@pytest.fixture
def data():
    return open_dataset(Synthetic(num_documents=50), seq_len=16, batch=8, seed=0, vocab_size=256, cache_dir="unused")


@pytest.fixture(
    params=[meshes.MeshConfig(), meshes.MeshConfig(data=2, fsdp=2, tensor=2)], ids=["fsdp 8", "data 2 fsdp 2 tensor 2"]
)
def mesh(request):
    return meshes.make(request.param)


class Wrapped:
    """A dataset that does `act(step)` before each read."""

    def __init__(self, data, act):
        self.batch, self._data, self._act = data.batch, data, act

    def rows(self, step, rows):
        self._act(step)
        return self._data.rows(step, rows)


def loading() -> bool:
    return any(thread.name == "loader" for thread in threading.enumerate())


def test_batches_are_the_datasets_step_by_step_and_sharded_by_the_rules(data, mesh):
    with Loader(data, mesh, meshes.FSDP, 3, 7) as loader:
        got = list(loader)
    assert [step for step, _ in got] == [3, 4, 5, 6]
    for step, batch in got:
        expected = data.rows(step, np.arange(8))
        assert set(batch) == set(BATCH_FIELDS)
        for name, values in batch.items():
            assert np.array_equal(values, expected[name]) and values.dtype == expected[name].dtype
            assert values.sharding == meshes.sharding(mesh, "BS", meshes.FSDP.acts)
    assert not loading()


def test_it_reads_ahead_by_prefetch_and_no_further(data, mesh):
    seen = []
    with Loader(Wrapped(data, seen.append), mesh, meshes.FSDP, 0, 100, prefetch=2) as loader:
        next(loader)
        deadline = time.monotonic() + 5
        while len(seen) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert seen == [0, 1, 2, 3]  # one taken, two in the queue, one in hand


def test_what_the_thread_raises_is_raised_by_next_after_the_good_batches(data, mesh):
    def act(step):
        if step == 2:
            raise DataError("shard is damaged.")

    loader = Loader(Wrapped(data, act), mesh, meshes.FSDP, 0, 9)
    assert [next(loader)[0], next(loader)[0]] == [0, 1]
    with pytest.raises(DataError, match="shard is damaged"):
        next(loader)
    assert list(loader) == [] and not loading()


def test_a_batch_that_does_not_come_is_an_error_at_the_deadline(data, mesh):
    release = threading.Event()
    loader = Loader(Wrapped(data, lambda step: release.wait(20)), mesh, meshes.FSDP, 0, 9, deadline_seconds=0.2)
    with pytest.raises(RunError, match="no batch came in 0.2 s") as caught:
        next(loader)
    assert "still reading" in caught.value.got
    release.set()
    loader._thread.join(10)


def test_closing_does_not_wait_for_a_read_that_is_stuck(data, mesh):
    release = threading.Event()
    loader = Loader(Wrapped(data, lambda step: release.wait(20)), mesh, meshes.FSDP, 0, 9)
    begun = time.monotonic()
    loader.close()
    assert time.monotonic() - begun < 3
    assert list(loader) == []
    release.set()
    loader._thread.join(10)
    assert not loading()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_ends_a_thread_whose_queue_is_full(data, taken):
    loader = Loader(data, meshes.make(meshes.MeshConfig()), meshes.FSDP, 0, 1000)
    for _ in range(taken):
        jax.block_until_ready(next(loader)[1])
    loader.close()
    loader.close()
    assert not loading()
