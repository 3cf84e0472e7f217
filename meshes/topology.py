"""What a pod looks like: hosts, NVLink domains, device order, link speeds and peaks. It measures nothing.

Numbers are those of NVIDIA's data sheets; peaks are dense, without sparsity. KINDS has the A100, H100, H200 (SXM), HGX B200
and GB200 NVL72; of other boards, whose links are their machine's, BOARDS has the peaks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of device: dense peak FLOP/s by dtype, bytes, and bytes per second and device (links: one way)."""

    name: str
    pattern: str  # of jax's device_kind, whole
    flops: dict[str, float]  # float32: what jax's default matmul precision runs, TF32
    memory_bytes: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float  # the usual NIC: 400 Gb/s a device, A100 200 Gb/s
    nvlink_domain: int  # most devices that one NVLink domain joins


def _flops(bf16: float, fp8: float | None = None) -> dict[str, float]:
    peaks = {"bfloat16": bf16, "float16": bf16, "float32": bf16 / 2}
    return peaks if fp8 is None else peaks | {"float8": fp8}


_AMPERE = dict(flops=_flops(312e12), nvlink_bandwidth=300e9, network_bandwidth=25e9, nvlink_domain=8)
_HOPPER = dict(flops=_flops(989.4e12, 1978.9e12), nvlink_bandwidth=450e9, network_bandwidth=50e9, nvlink_domain=8)
_B200 = dict(flops=_flops(2250e12, 4500e12), nvlink_bandwidth=900e9, network_bandwidth=50e9, nvlink_domain=8)
_GB200 = dict(flops=_flops(2500e12, 5000e12), nvlink_bandwidth=900e9, network_bandwidth=50e9, nvlink_domain=72)
_ROWS = (  # name, device_kind, memory in bytes and bytes per second, the rest
    ("a100", r"NVIDIA A100-SXM4-80GB", 80 * 2**30, 2039e9, _AMPERE),
    ("a100_40gb", r"NVIDIA A100-SXM4-40GB", 40 * 2**30, 1555e9, _AMPERE),
    ("h100", r"NVIDIA H100( 80GB HBM3)?", 84_942_979_072, 3352.32e9, _HOPPER),
    ("h200", r"NVIDIA H200", 151_397_597_184, 4800e9, _HOPPER),
    ("b200", r"NVIDIA B200", 191_514_411_008, 7672.32e9, _B200),
    ("gb200", r"NVIDIA GB200", 197_897_748_480, 7928.064e9, _GB200),
)
KINDS: dict[str, Kind] = {
    name: Kind(name=name, pattern=pattern, memory_bytes=memory, memory_bandwidth=bandwidth, **rest)
    for name, pattern, memory, bandwidth, rest in _ROWS
}
BOARDS = {  # peaks by jax's device_kind
    "NVIDIA A100-PCIE-40GB": _flops(312e12),
    "NVIDIA A100 80GB PCIe": _flops(312e12),
    "NVIDIA L40S": _flops(362.05e12) | {"float32": 183e12},
    "NVIDIA H100 PCIe": _flops(756e12),
    "NVIDIA H100 NVL": _flops(835e12),
    "NVIDIA H200 NVL": _flops(835e12),
    "NVIDIA GH200 480GB": _flops(989.4e12),
    "NVIDIA B300 SXM6 AC": _flops(2250e12),
}
_UNKNOWN_DOMAIN = 8  # devices; boards of kinds not listed join at most this many


def kind_of(device_kind: str) -> Kind | None:
    """The row of KINDS for jax's `device.device_kind` (or a name in KINDS); None for a kind not listed."""
    matches = (kind for kind in KINDS.values() if kind.name == device_kind or re.fullmatch(kind.pattern, device_kind))
    return next(matches, None)


def peak_flops(device_kind: str, dtype: Any) -> float | None:
    """Dense matmul FLOP/s of one device in `dtype` (a name or a dtype); None where not known, as on a CPU."""
    kind, name = kind_of(device_kind), dtype if isinstance(dtype, str) else _dtype_name(dtype)
    peaks = kind.flops if kind else BOARDS.get(device_kind, {})
    return peaks.get("float8" if name.startswith("float8") else name)


def _dtype_name(dtype: Any) -> str:
    import numpy as np

    return np.dtype(dtype).name


def _slice(device: Any) -> int | None:
    """What the GPU runtime calls slice or partition: a host by its boot id, or an NVLink fabric of several hosts."""
    return getattr(device, "slice_index", getattr(device, "partition_index", None))


def ordered(devices: Sequence[Any]) -> list[Any]:
    """Devices by (slice, process, id): neighbours in the list are close in the machine."""
    return sorted(devices, key=lambda d: (_slice(d) or 0, d.process_index, d.id))


def domains(devices: Sequence[Any]) -> list[int]:
    """The NVLink domain of each device, numbered from 0 in order of appearance.

    A slice no larger than the kind allows is one domain; that holds for one process per GPU as well. Otherwise a
    domain is one process's devices, which is right for one process per host.
    """
    kind = kind_of(devices[0].device_kind)
    limit = kind.nvlink_domain if kind else _UNKNOWN_DOMAIN
    members = Counter(map(_slice, devices))
    keys = [_slice(d) if _slice(d) is not None and members[_slice(d)] <= limit else (d.process_index,) for d in devices]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The shape of a pod. Where hosts or domains differ in size, the largest counts."""

    device_kind: str
    kind: Kind | None  # peaks and links; None for a kind not listed
    num_devices: int
    num_hosts: int
    devices_per_host: int
    num_domains: int
    devices_per_domain: int


def of(devices: Sequence[Any]) -> Topology:
    """The pod that these devices make up. A host is a process's devices, or with one process per device a domain."""
    by_domain = Counter(domains(devices))
    by_process = Counter(d.process_index for d in devices)
    by_host = by_process if max(by_process.values()) > 1 else by_domain
    return Topology(
        device_kind=devices[0].device_kind,
        kind=kind_of(devices[0].device_kind),
        num_devices=len(devices),
        num_hosts=len(by_host),
        devices_per_host=max(by_host.values()),
        num_domains=len(by_domain),
        devices_per_domain=max(by_domain.values()),
    )
