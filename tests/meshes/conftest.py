"""Pretend GPUs: what meshes reads of a device, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

H100 = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Gpu:
    id: int
    process_index: int
    slice_index: int
    device_kind: str = H100
    platform: str = "cuda"


@pytest.fixture
def pod():
    """pod(hosts, per_host) -> devices of one process per host and one slice per host, as a GPU runtime numbers them."""

    def make(hosts: int, per_host: int, kind: str = H100, hosts_per_slice: int = 1, processes_per_host: int = 1):
        size = per_host // processes_per_host
        return [Gpu(i, i // size, i // per_host // hosts_per_slice, kind) for i in range(hosts * per_host)]

    return make
