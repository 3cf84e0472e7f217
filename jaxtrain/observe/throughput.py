"""The rate that MFU is measured against: the card's published peak, else a matmul's rate, measured here. It times nothing else."""

from __future__ import annotations

import contextlib
import functools
import sys
import time

import jax
import jax.numpy as jnp

from meshes import topology

CPU_SIDE = 1024
GPU_SIDE = 8192  # 1.1 TFLOP: a millisecond of the fastest card, beside which a launch is little; 512 MB in float32


@functools.cache
def peak_flops(dtype: str) -> float:
    """FLOP/s of all devices together in this dtype; a matmul that has to be timed is timed at the first call alone.

    GPUs: the published dense peak; of one that is not listed the measured rate, and that is said. A CPU publishes none
    that matters, so it is timed (0.2 s); fake CPU devices share one machine and count once per process.
    """
    device = jax.devices()[0]
    if published := topology.peak_flops(device.device_kind, dtype):
        return published * jax.device_count()
    if device.platform == "cpu":
        return _matmul_rate(dtype, CPU_SIDE) * jax.process_count()
    rate = _matmul_rate(dtype, GPU_SIDE)
    with contextlib.suppress(OSError):  # stderr may be on a full disk
        said = f"no published {dtype} peak of {device.device_kind} is known here: mfu is of a matmul's {rate / 1e12:.1f} TFLOP/s"
        print(f"{said}, measured, x {jax.device_count()}", file=sys.stderr, flush=True)
    return rate * jax.device_count()


def _matmul_rate(dtype: str, side: int) -> float:
    """FLOP/s of the fastest of five square matmuls on one device."""
    x = jnp.ones((side, side), dtype)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    return 2 * side**3 / min(_seconds(matmul, x) for _ in range(5))


def _seconds(matmul, x) -> float:
    start = time.perf_counter()
    matmul(x, x).block_until_ready()
    return time.perf_counter() - start
