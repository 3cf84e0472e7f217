"""Whole runs in this process, on fake devices, with examples that spoil their step."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import meshes
from jaxtrain import runtime
from jaxtrain.checkpoint import manifest
from jaxtrain.data.dataset import Dataset, open_dataset
from jaxtrain.observe.sinks import read_rows
from jaxtrain.resilience.health import Health
from jaxtrain.train.notice import Notice
from jaxtrain.train.run import train
from tests.resilience.values import CONFIG


def configured(tmp_path, name="run", health=Health(), **changes):
    return dataclasses.replace(CONFIG, name=name, runs_dir=str(tmp_path), health=health, **changes)


def run(config, monkeypatch, devices=2):
    """The exit code of `jaxtrain train` on so many of the devices."""
    monkeypatch.setattr(runtime, "devices", lambda: jax.devices()[:devices])
    with Notice() as notice:
        return train(config, runtime.Process(), notice)


def data_of(config=CONFIG):
    shape = dict(seq_len=config.seq_len, batch=config.batch, vocab_size=64)
    return open_dataset(config.data, **shape, seed=config.seed, cache_dir=".")


def poison(monkeypatch, is_bad):
    """From now on the weights of the examples that `is_bad(step, source and example)` names are not numbers."""
    rows = Dataset.rows

    def poisoned(self, step, wanted):
        batch = rows(self, step, wanted)
        puts = self.examples(step) if self._shuffle else []
        bad = [i for i, row in enumerate(wanted) if puts and is_bad(step + 1, (puts[row].source, puts[row].example))]
        batch["weights"][bad] = np.nan
        return batch

    monkeypatch.setattr(Dataset, "rows", poisoned)


def poison_examples(monkeypatch, *places):
    """The examples that an undisturbed run meets at these (step, row)."""
    puts = [data_of().examples(step - 1)[row] for step, row in places]
    bad = {(put.source, put.example) for put in puts}
    poison(monkeypatch, lambda _, example: example in bad)


def result(config):
    """What a run computed: its rows without times, and the hash of its last state."""
    rows = read_rows(config.run_dir / "metrics.jsonl")
    kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]
    return kept, manifest.read(config.run_dir / "checkpoints" / str(config.steps)).digest


def flipped(x, devices, bit=3):
    """A sharded array with one bit of the first element changed in the shards of these devices."""
    parts = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device in devices:
            data.reshape(-1).view(np.uint32)[:1] ^= np.uint32(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def after_steps(monkeypatch, steps, change):
    """`change(state, metrics)` takes the place of what the compiled step gives, once at each of these steps."""
    from jaxtrain.train import run as running

    compiled, left = running.compiled_ahead, list(steps)

    def compiled_ahead(blueprint):
        real = compiled(blueprint)

        def changed(*arguments):
            state, metrics = real(*arguments)
            if int(state.step) in left:
                left.remove(int(state.step))
                state, metrics = change(state, metrics)
            return state, metrics

        return changed

    monkeypatch.setattr(running, "compiled_ahead", compiled_ahead)


def flip_at(monkeypatch, step, devices, leaf="final_norm_D", bit=3):
    """After this step of a run a bit of a parameter changes on these devices, once."""

    def flip(state, metrics):
        params = state.params | {leaf: flipped(state.params[leaf], devices, bit)}
        return dataclasses.replace(state, params=params), metrics

    after_steps(monkeypatch, [step], flip)


def record(config):
    return [json.loads(line) for line in (config.run_dir / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Programs are compiled once for all runs of a session."""
    from jax.experimental.compilation_cache import compilation_cache

    kept = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", kept[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", kept[1])
    compilation_cache.reset_cache()


def mesh_of(config, devices):
    return meshes.make(config.mesh, jax.devices()[:devices])
