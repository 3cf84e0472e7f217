"""Arrays to and from a folder by Orbax (OCDBT, Zarr 3, not compressed). The only file that imports orbax; no manifest here.

Orbax's handler is driven directly, without its Checkpointer: that one's barriers are device collectives, which must
not run beside a step, and it waits up to 1200 s on a full disk. Trained weights do not compress: zstd took 2 s of CPU
time per 500 MB.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxtrain.background import Deadline
from jaxtrain.checkpoint import complaints
from jaxtrain.checkpoint.names import named, nested

Shapes = Mapping[str, jax.ShapeDtypeStruct]

complaints.leave_out_echoes()

# A restore holds what it reads twice for a moment: it reads batches of this many bytes, or of an eighth of the whole.
_BATCH_BYTES = 256 * 2**20


def begin_write(folder: Path, arrays: Mapping[str, jax.Array]) -> list[Any]:
    """Starts to write this process's shards; when it returns, accelerators' arrays have been copied to the host."""
    item = nested({name: x for name, x in arrays.items() if x.size})
    return asyncio.run(_handler().async_save(epath.Path(folder), args=ocp.args.PyTreeSave(item)))


def end_write(writes: list[Any], deadline: Deadline) -> None:
    """Returns when the bytes are on the disk. Raises TimeoutError, or what Orbax or TensorStore met."""
    for write in writes:
        write.result(timeout=deadline.left())


def merge(folder: Path) -> None:
    """Makes the processes' parts one whole; the lead calls it after all `end_write`s."""
    _handler().finalize(epath.Path(folder))


def written_by(folder: Path, process: int) -> Iterator[Path]:
    """The files that one process wrote before the merge; all others are the lead's."""
    return folder.glob(f"*process_{process}/**/*")


def read(folder: Path, wanted: Shapes) -> dict[str, jax.Array]:
    """This process's shards of the arrays `wanted`, which say where each goes."""
    arrays: dict[str, jax.Array] = {}
    for batch in _batches({name: shape for name, shape in wanted.items() if shape.size}):
        arrays |= _read(folder, {name: _array_args(shape) for name, shape in batch.items()})
    return arrays | {name: _empty(shape) for name, shape in wanted.items() if not shape.size}


def read_host(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Whole arrays, in host memory; none of them may be empty."""
    return _read(folder, {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Of each shard the first copy is written, whole: it is the one whose hash the manifest has."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=registry
    )


def _read(folder: Path, how: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
    item = nested({name: 0 for name in how})
    args = ocp.args.PyTreeRestore(item=item, restore_args=nested(how), partial_restore=True)
    return named(_handler().restore(epath.Path(folder), args=args))


def _array_args(shape: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    return ocp.ArrayRestoreArgs(sharding=shape.sharding, global_shape=shape.shape, dtype=shape.dtype)


def _batches(shapes: Shapes) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    limit = max(_BATCH_BYTES, sum(map(_local_bytes, shapes.values())) // 8)
    batch: dict[str, jax.ShapeDtypeStruct] = {}
    for name, shape in shapes.items():
        if batch and sum(map(_local_bytes, batch.values())) + _local_bytes(shape) > limit:
            yield batch
            batch = {}
        batch[name] = shape
    if batch:
        yield batch


def _local_bytes(shape: jax.ShapeDtypeStruct) -> int:
    num_devices = len(shape.sharding.addressable_devices)
    return num_devices * math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize


def _empty(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """TensorStore has no arrays without elements."""
    return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: np.empty(shape.shape, shape.dtype)[index])
