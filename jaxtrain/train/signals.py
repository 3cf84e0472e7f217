"""Ctrl-C and SIGTERM as a flag that travels through the step, so that all processes stop after the same update."""

from __future__ import annotations

import os
import signal
from types import FrameType

import jax
import numpy as np
from jax.sharding import Mesh

import meshes


class StopFlag:
    """Catches the first SIGINT or SIGTERM; a second one ends the process where it stands, with 128 + its number."""

    def __init__(self, mesh: Mesh):
        self._sharding = meshes.per_device(mesh)
        self._count, self._signal = mesh.devices.size, 0
        self._flags = self._array()
        self._old = {number: signal.signal(number, self._caught) for number in (signal.SIGINT, signal.SIGTERM)}

    def flags(self) -> jax.Array:
        """int32, one per device of the mesh: the signal that this process caught, or 0."""
        return self._flags

    def close(self) -> None:
        """Signals act again as before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        print(f"{signal.Signals(number).name}: saving and stopping after this step; again to stop at once", flush=True)
        self._signal = number
        for each in self._old:
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        self._flags = self._array()

    def _array(self) -> jax.Array:
        values = np.full(self._count, self._signal, np.int32)
        return jax.make_array_from_callback(values.shape, self._sharding, lambda index: values[index])
