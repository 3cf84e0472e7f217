"""What a pod looks like, on pretend GPUs; peaks against NVIDIA's published numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from meshes import topology

# Dense TFLOP/s as NVIDIA prints them (data sheets; with sparsity halved).
PUBLISHED = {
    "NVIDIA A100-SXM4-80GB": dict(bfloat16=312, float32=156),
    "NVIDIA A100-SXM4-40GB": dict(bfloat16=312, float32=156),
    "NVIDIA H100 80GB HBM3": dict(bfloat16=989, float32=494.7, float8_e4m3fn=1979),
    "NVIDIA H200": dict(bfloat16=989, float32=494.7, float8_e5m2=1979),
    "NVIDIA B200": dict(bfloat16=2250, float32=1125, float8_e4m3fn=4500),
    "NVIDIA GB200": dict(bfloat16=2500, float32=1250, float8_e4m3fn=5000),
}
ROUNDING = 1e-3  # the data sheets round to the TFLOP


@pytest.mark.parametrize("kind", PUBLISHED)
def test_peaks_are_the_published_ones(kind):
    for dtype, tera in PUBLISHED[kind].items():
        assert topology.peak_flops(kind, dtype) == pytest.approx(tera * 1e12, rel=ROUNDING)


def test_a_peak_can_be_asked_for_by_name_or_by_dtype():
    by_name = topology.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    for dtype in (jnp.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        assert topology.peak_flops("h100", dtype) == by_name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe 96GB", "NVIDIA L4", "NVIDIA RTX A5000", "TPU v5p"])
def test_a_kind_that_is_not_listed_has_no_peak(kind):
    assert topology.peak_flops(kind, "bfloat16") is None


def test_a_dtype_that_the_kind_does_not_multiply_has_no_peak():
    assert topology.peak_flops("NVIDIA A100-SXM4-80GB", "float8_e4m3fn") is None
    assert topology.peak_flops("NVIDIA H100 80GB HBM3", "int4") is None


@pytest.mark.parametrize("processes_per_host", [1, 8])
def test_hosts_are_counted_for_one_process_per_host_and_one_per_gpu(pod, processes_per_host):
    seen = topology.of(pod(4, 8, processes_per_host=processes_per_host))
    assert (seen.num_devices, seen.num_hosts, seen.devices_per_host) == (32, 4, 8)
    assert (seen.num_domains, seen.devices_per_domain, seen.kind.name) == (4, 8, "h100")


def test_a_slice_of_gb200_is_one_nvlink_domain_of_several_hosts(pod):
    seen = topology.of(pod(36, 4, "NVIDIA GB200", hosts_per_slice=18))
    assert (seen.num_hosts, seen.devices_per_host) == (36, 4)
    assert (seen.num_domains, seen.devices_per_domain) == (2, 72)


def test_a_slice_larger_than_the_board_allows_is_cut_into_hosts(pod):
    seen = topology.of(pod(16, 8, hosts_per_slice=16))  # a compile-only topology calls everything one slice
    assert (seen.num_domains, seen.devices_per_domain) == (16, 8)


def test_cpu_devices_are_one_host_of_an_unlisted_kind():
    seen = topology.of(jax.devices())
    assert (seen.num_hosts, seen.devices_per_host, seen.num_domains, seen.kind) == (1, 8, 1, None)
