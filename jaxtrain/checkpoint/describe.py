"""What a manifest says about a state before its bytes are written. It writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxtrain.checkpoint.files import FileEntry
from jaxtrain.checkpoint.manifest import ArrayEntry, Manifest
from jaxtrain.errors import CheckpointError

ARRAYS = "state"  # the folder of Orbax's files within a checkpoint
_LIBRARIES = ("jax", "orbax-checkpoint", "tensorstore")


def storable(leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The leaves themselves. Raises CheckpointError, naming those that a checkpoint cannot hold."""
    wrong = {name: why for name, leaf in leaves.items() if (why := _unstorable(leaf))}
    if wrong or not leaves:
        raise CheckpointError(
            f"{len(wrong)} of {len(leaves)} leaves of the state cannot be saved.",
            got="\n        ".join(f"{name}: {why}" for name, why in list(wrong.items())[:8]),
            rule="a state is a tree of jax arrays of bools, integers and floats, global where there are several processes",
            fix="jnp.asarray for numbers, jax.random.key_data for keys, a sharding over the whole mesh for local arrays",
        )
    return dict(leaves)


def draft(step: int, arrays: Mapping[str, jax.Array], letters: Mapping[str, str], config: dict, data: dict) -> Manifest:
    """The manifest of these arrays, content hashes and files still missing. Raises CheckpointError for strange letters."""
    for name, text in letters.items():
        if name not in arrays or (text and len(text) != arrays[name].ndim):
            got = f"shape {arrays[name].shape}" if name in arrays else "no such array"
            raise CheckpointError(f"letters {text!r} do not fit {name}.", got=got, rule="one letter per dim")
    return Manifest(
        step=step,
        config=config,
        data=data,
        mesh=_mesh(arrays),
        processes=jax.process_count(),
        versions={name: metadata.version(name) for name in _LIBRARIES},
        arrays={name: _entry(x, letters.get(name)) for name, x in arrays.items()},
    )


def completed(manifest: Manifest, hashes: Mapping[str, str], files: Mapping[str, FileEntry]) -> Manifest:
    """The draft with its arrays' content hashes and its files."""
    arrays = {name: replace(entry, content=hashes[name]) for name, entry in manifest.arrays.items()}
    return replace(manifest, arrays=arrays, files=dict(sorted(files.items())))


def num_bytes(manifest: Manifest) -> int:
    """Of all arrays, each once."""
    return sum(math.prod(entry.shape) * jnp.dtype(entry.dtype).itemsize for entry in manifest.arrays.values())


def _unstorable(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array):
        return f"a {type(leaf).__name__}"
    if not _whole_bytes(leaf.dtype):
        return f"of dtype {leaf.dtype}"
    if jax.process_count() > 1 and leaf.is_fully_addressable:
        return "local to this process"
    return ""


def _whole_bytes(dtype: Any) -> bool:
    """Whether it is a bool, or an integer or float of 8, 16, 32 or 64 bits."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits == 8 * dtype.itemsize
    return dtype == jnp.bool_ or (jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits == 8 * dtype.itemsize)


def _entry(x: jax.Array, letters: str | None) -> ArrayEntry:
    spec = list(x.sharding.spec) if isinstance(x.sharding, NamedSharding) else []
    return ArrayEntry(shape=x.shape, dtype=str(x.dtype), spec=spec, letters=letters, content="")


def _mesh(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Axis sizes of the mesh that the arrays are on; {} where they are on none."""
    meshes = (x.sharding.mesh for x in arrays.values() if isinstance(x.sharding, NamedSharding))
    return dict(next((mesh.shape for mesh in meshes), {}))
