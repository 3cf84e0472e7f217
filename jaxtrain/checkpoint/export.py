"""Parameters as safetensors files, in the layout that Hugging Face's loaders expect of sharded ones. It renames nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxtrain.checkpoint import files, manifest, verify
from jaxtrain.checkpoint.manifest import ArrayEntry, Manifest
from jaxtrain.cluster import few
from jaxtrain.errors import CheckpointError

SHARD_BYTES = 5 * 10**9


def export(folder: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes model.safetensors, or numbered shards with model.safetensors.index.json; returns what it wrote.

    Tensors are named by their path below params, joined by ".", and verified as they are read; one shard is in memory
    at a time. Raises CheckpointError, DamagedError.
    """
    found = manifest.read(folder)
    entries = {name: entry for name, entry in found.arrays.items() if name.startswith("params/")}
    if not entries:
        raise CheckpointError(f"nothing to export from {folder}.", rule="a checkpoint with params")
    if there := sorted(path.name for path in out.glob("model*.safetensors*")):
        fix = "another --out, or remove these"
        raise CheckpointError(f"{out} holds a model already.", got=few(there), rule="none is overwritten", fix=fix)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write into {out}.", got=error.strerror, fix="another --out") from error
    groups = list(_groups(entries, shard_bytes))
    paths = [out / _file_name(i, len(groups)) for i in range(len(groups))]
    try:
        for path, names in zip(paths, groups):
            _write(path, {_tensor_name(name): verify.host_array(folder, found, name) for name in names}, found)
        if len(groups) > 1:
            paths.append(_write_index(out, entries, dict(zip(paths, groups))))
    except BaseException as error:
        for path in out.glob("model*.safetensors*"):  # half a model
            path.unlink()
        if isinstance(error, (OSError, SafetensorError)):
            fix = "free space, or another --out"
            raise CheckpointError(f"cannot write into {out}.", got=manifest.in_words(error), fix=fix) from error
        raise
    return paths


def _write(path: Path, tensors: dict[str, np.ndarray], found: Manifest) -> None:
    """safetensors' files are for their owner alone; this one is as the umask says, like any other."""
    save_file(tensors, path, metadata={"format": "pt", "step": str(found.step), "digest": found.digest})
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _groups(entries: dict[str, ArrayEntry], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    for name in entries:
        if names and sum(_num_bytes(entries[n]) for n in [*names, name]) > shard_bytes:
            yield names
            names = []
        names.append(name)
    yield names


def _write_index(out: Path, entries: dict[str, ArrayEntry], shards: dict[Path, list[str]]) -> Path:
    index = {
        "metadata": {"total_size": sum(map(_num_bytes, entries.values()))},
        "weight_map": {_tensor_name(name): path.name for path, names in shards.items() for name in names},
    }
    path = out / "model.safetensors.index.json"
    files.write_durably(path, json.dumps(index, indent=1).encode())
    return path


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def _tensor_name(name: str) -> str:
    return name.removeprefix("params/").replace("/", ".")


def _num_bytes(entry: ArrayEntry) -> int:
    return math.prod(entry.shape) * jnp.dtype(entry.dtype).itemsize
