"""What one process hears (notice.py) as a flag that travels through the step, so that all stop after the same update."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

import meshes
from jaxtrain.train.notice import HEARD, Notice


class StopFlag:
    """While it is open, a signal waits until the state is saved."""

    def __init__(self, mesh: Mesh, notice: Notice):
        self._notice, sharding = notice, meshes.per_device(mesh)

        def array(number: int) -> jax.Array:
            values = np.full(mesh.devices.size, number, np.int32)
            return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

        self._flags = {number: array(number) for number in (0, *HEARD)}
        notice.guard()

    def flags(self) -> jax.Array:
        """int32, one per device of the mesh: the signal that this process heard, or 0."""
        return self._flags[self._notice.signal]

    def agreed(self, number: int) -> None:
        """All processes know by now that they stop, and why."""
        self._notice.agreed(number)

    def close(self) -> None:
        """The state is saved: a signal acts at once."""
        self._notice.release()
