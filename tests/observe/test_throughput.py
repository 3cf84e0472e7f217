"""The peak that MFU is a share of, on pretend devices; published numbers against NVIDIA's data sheets."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from jaxtrain import runtime
from jaxtrain.observe import throughput
from jaxtrain.observe.throughput import peak_flops
from jaxtrain.train import run
from jaxtrain.train.notice import Notice
from meshes import topology
from tests.tiny import TINY

# Dense TFLOP/s of bfloat16 (data sheets; with sparsity halved).
PUBLISHED = {
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L40S": 362,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA GH200 480GB": 1979 / 2,
    "NVIDIA B300 SXM6 AC": 36_000 / 8 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA B200": 2250,
}
ROUNDING = 1e-3  # the data sheets round to the TFLOP
UNLISTED = "NVIDIA Unheard-of 96GB"


@pytest.fixture
def machine(monkeypatch):
    """machine(kind, platform, devices, processes): what jax says it has. Each _matmul_rate that is asked for is 1e12 and kept."""
    asked = []

    def has(kind, platform="gpu", devices=8, processes=1):
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind, platform=platform)] * devices)
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(throughput, "_matmul_rate", lambda dtype, side: asked.append((dtype, side)) or 1e12)
        return asked

    peak_flops.cache_clear()
    yield has
    peak_flops.cache_clear()


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_listed_card_has_its_published_peak_as_often_as_it_is_there(machine, kind, capsys):
    asked = machine(kind, devices=16, processes=2)
    assert peak_flops("bfloat16") == pytest.approx(16e12 * PUBLISHED[kind], rel=ROUNDING)
    assert peak_flops("float32") == pytest.approx(8e12 * PUBLISHED[kind], rel=0.02)  # an L40S has 183, half of 366
    assert (asked, capsys.readouterr().err) == ([], "")


def test_no_card_is_listed_in_two_places():
    assert [kind for kind in topology.BOARDS if topology.kind_of(kind)] == []


def test_gpus_that_are_not_listed_count_each_and_what_was_measured_is_said_once(machine, capsys):
    asked = machine(UNLISTED, devices=8, processes=2)
    assert (peak_flops("bfloat16"), peak_flops("bfloat16")) == (8e12, 8e12)
    assert asked == [("bfloat16", 8192)]
    (said,) = capsys.readouterr().err.splitlines()
    assert UNLISTED in said and "mfu is of a matmul's 1.0 TFLOP/s, measured, x 8" in said


def test_fake_devices_share_one_machine_which_is_measured_once_and_in_silence(machine, capsys):
    asked = machine("cpu", "cpu", devices=8, processes=2)
    assert (peak_flops("float32"), peak_flops("float32")) == (2e12, 2e12)
    assert (asked, capsys.readouterr().err) == ([("float32", 1024)], "")


def test_the_rate_of_a_matmul_is_its_work_over_its_shortest_time(monkeypatch):
    seconds = iter([0.5, 0.25, 4.0, 0.5, 0.5])
    monkeypatch.setattr(throughput, "_seconds", lambda matmul, x: next(seconds))
    assert throughput._matmul_rate("float32", 4) == 2 * 4 * 4 * 4 / 0.25


def test_this_machine_has_a_rate():
    peak_flops.cache_clear()
    assert peak_flops("float32") > 1e8


def test_a_cpu_is_timed_before_the_run_has_threads_that_take_its_cores(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(run, "peak_flops", lambda dtype: order.append("timed"))
    monkeypatch.setattr(run, "_run", lambda *_: order.append("opened"))
    run.train(replace(TINY, runs_dir=str(tmp_path)), runtime.Process(index=0, count=1), Notice({}))
    assert order == ["timed", "opened"]
