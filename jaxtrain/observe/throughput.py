"""The rate that MFU is measured against: the card's published peak, or a CPU's own matmul rate. It times nothing else."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from meshes import topology


def peak_flops(dtype: str) -> float:
    """FLOP/s of all devices together in this dtype.

    GPUs: the published dense peak. A CPU publishes none that matters, so its matmul is timed (0.2 s); fake CPU devices
    share one machine and count once per host.
    """
    kind = jax.devices()[0].device_kind
    published = topology.peak_flops(kind, dtype)
    return published * jax.device_count() if published else _matmul_rate(dtype) * jax.process_count()


def _matmul_rate(dtype: str, side: int = 1024) -> float:
    """FLOP/s of the fastest of five square matmuls."""
    x = jnp.ones((side, side), dtype)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    return 2 * side**3 / min(_seconds(matmul, x) for _ in range(5))


def _seconds(matmul, x) -> float:
    start = time.perf_counter()
    matmul(x, x).block_until_ready()
    return time.perf_counter() - start
