"""A copy of a state on CPU devices, so that the next step may have the state's own buffers. Accelerators need none.

Orbax writes a CPU array from a view of its buffer. While a view lives, XLA cannot give the buffer to the step that
donates it and allocates a second state instead: with 500 MB the next step took 4 s in place of 0.4. An accelerator's
arrays are copied to the host by Orbax itself before its call returns.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

_ALIGNMENT = 64  # bytes; a numpy array that begins at such an address becomes a CPU device's buffer without another copy


class HostBuffers:
    """Host memory for one copy of a state, kept for the next one.

    Touching memory that a process has given back costs up to 2 s per GB on a virtual machine, copying into memory
    that it has kept 0.1 s.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], np.ndarray] = {}

    def copy(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The same values and shardings, in memory that is overwritten by the next call."""
        return {name: self._copy(name, x) for name, x in arrays.items()}

    def clear(self) -> None:
        """Lets go of the memory; copies in use keep theirs."""
        self._buffers = {}

    def _copy(self, name: str, x: jax.Array) -> jax.Array:
        shards = x.addressable_shards
        once = {str(shard.index): shard for shard in shards}
        held = {index: self._filled((name, index), np.asarray(shard.data)) for index, shard in once.items()}
        parts = [jax.device_put(held[str(shard.index)], shard.device) for shard in shards]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)

    def _filled(self, key: tuple[str, str], source: np.ndarray) -> np.ndarray:
        kept = self._buffers.get(key)
        if kept is None or kept.shape != source.shape or kept.dtype != source.dtype:
            kept = self._buffers[key] = _aligned(source)
        np.copyto(kept, source)
        return kept


def on_cpu(arrays: Mapping[str, jax.Array]) -> bool:
    """Whether the arrays' buffers are host memory."""
    return any(device.platform == "cpu" for x in arrays.values() for device in x.sharding.addressable_devices)


def _aligned(like: np.ndarray) -> np.ndarray:
    """Large ones are on huge pages (numpy asks for them): 10 GB/s instead of 2 when first written."""
    raw = np.empty(like.nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + like.nbytes].view(like.dtype).reshape(like.shape)
