"""Reads all of a checkpoint and names what is not as it was written; compares two. It repairs nothing."""

from __future__ import annotations

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoint import hashing, load, manifest, storage
from jaxtrain.checkpoint.describe import ARRAYS
from jaxtrain.checkpoint.manifest import ArrayEntry, DamagedError, Manifest, in_words

_BLOCK = 2**22  # elements compared at a time
_RULE = "every byte is as it was written"
_FIX = "another step: jaxtrain checkpoint verify RUN_DIR says which are whole"


class UnreadableError(DamagedError):
    """An array of which not even damaged bytes can be had."""


def damage(folder: Path) -> list[str]:
    """A line for each damaged file and array, one for all arrays that cannot be read; [] for a whole checkpoint.

    Raises CheckpointError if there is none.
    Files are read once for their checksums, then every array by itself for its content hash: host memory holds one.
    """
    try:
        found = manifest.read(folder)
    except DamagedError as error:
        return [f"file   {error.got or error.what}"]
    lines = [f"file   {line}" for line in load.damaged_files(folder, found, up_to=math.inf)]
    unreadable = {}
    for name in found.arrays:
        try:
            host_array(folder, found, name)
        except UnreadableError as error:
            unreadable[name] = error.got
        except DamagedError as error:
            lines.append(f"array  {error.got}")
    if unreadable:  # the same damage says much the same of each
        names = ", ".join(unreadable) if len(unreadable) < len(found.arrays) else f"all {len(unreadable)}"
        lines.append(f"array  {names} cannot be read: {next(iter(unreadable.values()))}")
    return lines


def host_array(folder: Path, found: Manifest, name: str) -> np.ndarray:
    """One whole array in host memory, verified. Raises DamagedError."""
    entry = found.arrays[name]
    if entry.empty:
        return np.zeros(entry.shape, jnp.dtype(entry.dtype))
    try:
        x = storage.read_host(folder / ARRAYS, [name])[name]
    except Exception as error:  # for damage, Orbax and TensorStore raise ValueError and bare Exception too
        why = in_words(error.__cause__ or error)
        raise UnreadableError(f"{folder}: {name} cannot be read.", got=why, rule=_RULE, fix=_FIX) from error
    if (x.shape, str(x.dtype)) != (entry.shape, entry.dtype):
        raise _damaged(folder, f"{name} is {x.dtype}{list(x.shape)}, written was {_kind(entry)}")
    if lines := load.differing(found, hashing.total([hashing.Hashing({name: jnp.asarray(x)}).sums()])):
        raise _damaged(folder, lines[0])
    return x


def differences(a: Path, b: Path) -> dict[str, str]:
    """By array: "equal", "max |a - b| = 0.1", "f32[2] and f32[3]", "only in a", "only in b". Reads what is not equal."""
    first, second = manifest.read(a), manifest.read(b)
    rows = {name: _difference(a, first, b, second, name) for name in {**first.arrays, **second.arrays}}
    return dict(sorted(rows.items()))


def _damaged(folder: Path, line: str) -> DamagedError:
    return DamagedError(f"{folder} is damaged.", got=line, rule=_RULE, fix=_FIX)


def _difference(a: Path, first: Manifest, b: Path, second: Manifest, name: str) -> str:
    here, there = first.arrays.get(name), second.arrays.get(name)
    if here is None or there is None:
        return f"only in {b if here is None else a}"
    if _kind(here) != _kind(there):
        return f"{_kind(here)} and {_kind(there)}"
    if here.content == there.content:
        return "equal"
    return f"max |a - b| = {_largest_gap(host_array(a, first, name), host_array(b, second, name)):.3g}"


def _largest_gap(x: np.ndarray, y: np.ndarray) -> float:
    """In float64, block by block; nan where one of them is."""
    blocks = range(0, x.size, _BLOCK)
    x, y = x.reshape(-1), y.reshape(-1)
    with np.errstate(invalid="ignore"):
        gaps = [np.max(np.abs(x[i : i + _BLOCK].astype(np.float64) - y[i : i + _BLOCK])) for i in blocks]
    return float(np.max(gaps))


def _kind(entry: ArrayEntry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"
