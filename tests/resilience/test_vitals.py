"""Complaints about disk, memory, GPUs and pace, against machines that are made up."""

import errno
import os
import shutil
import threading
from types import SimpleNamespace

import pytest

from jaxtrain.resilience import vitals


def said(looks):
    """What it says once all that it looks at has answered."""
    first = list(looks.complaints())
    for _, found in looks._asked.values():
        found.result(10)
    return first + list(looks.complaints())


def test_a_disk_that_does_not_answer_is_said_and_holds_nobody_up(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: answer.wait(60) and SimpleNamespace(total=100e9, free=1e9))
    looks = vitals.Vitals(tmp_path, str(tmp_path / "nothing"))
    assert list(looks.complaints()) == list(looks.complaints()) == []
    monkeypatch.setattr(vitals, "ANSWER_S", 0.0)
    for name in looks._asked.keys() - {f"the disk of {tmp_path}"}:
        looks._asked[name][1].result(10)
    assert list(looks.complaints()) == [f"the disk of {tmp_path} does not answer"]
    answer.set()
    looks._asked[f"the disk of {tmp_path}"][1].result(10)
    assert "1.0 GB left of 100 GB" in next(looks.complaints())


def test_a_disk_that_answers_with_an_error_is_said(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(shutil, "disk_usage", stale)
    looks = vitals.Vitals(tmp_path, str(tmp_path / "nothing"))
    assert said(looks) == [f"the disk of {tmp_path} cannot be looked at: [Errno 116] Stale file handle"]


def test_a_machine_that_is_well_has_no_complaint_about_memory_or_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=100e9, free=50e9))
    (tmp_path / "meminfo").write_text("MemTotal: 1000000 kB\nMemAvailable: 500000 kB\n")
    assert said(vitals.Vitals(tmp_path / "runs" / "x", str(tmp_path / "meminfo"))) == []


def test_little_memory_and_little_disk_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=100e9, free=1e9))
    (tmp_path / "meminfo").write_text("MemTotal: 1000000 kB\nMemAvailable: 40000 kB\n")
    disk, memory = said(vitals.Vitals(tmp_path, str(tmp_path / "meminfo")))
    assert "1.0 GB left of 100 GB" in disk and "of memory left" in memory


class Nvml(SimpleNamespace):
    """A driver with two cards, the second of which has errors."""

    class NVMLError(Exception):
        def __init__(self, value):
            super().__init__(f"error {value}")
            self.value = value

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0
    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetCount = staticmethod(lambda: 2)
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
    nvmlDeviceGetTotalEccErrors = staticmethod(lambda device, kind, since: 3 * device)
    nvmlDeviceGetRemappedRows = staticmethod(lambda device: (0, 0, 0, device))


def failing(value, *devices):
    def answer(device=None, *more):
        if device in devices:
            raise Nvml.NVMLError(value)
        return device

    return answer


def lines(nvml):
    return [line for _, line in vitals._gpus(nvml)]


def test_a_card_with_errors_is_named():
    assert lines(Nvml()) == ["GPU 1 has 3 uncorrected memory errors", "GPU 1 could not replace a bad row of its memory"]


@pytest.mark.parametrize("question", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetTotalEccErrors"])
def test_a_card_that_is_lost_is_named_and_the_others_are_looked_at(question):
    lost, *others = lines(Nvml(**{question: failing(15, 0)}))
    assert lost == "GPU 0 answers with an error: error 15" and "GPU 1" in others[-1]


def test_only_a_machine_without_a_driver_and_a_card_without_error_correction_have_nothing_to_say():
    assert lines(Nvml(nvmlInit=failing(9, None))) == lines(Nvml(nvmlInit=failing(12, None))) == []
    assert lines(Nvml(nvmlInit=failing(18, None))) == ["the GPUs' driver answers with an error: error 18"]
    assert lines(Nvml(nvmlDeviceGetTotalEccErrors=failing(3, 0, 1))) == ["GPU 1 could not replace a bad row of its memory"]


def test_what_goes_on_is_said_once_though_its_number_changes(tmp_path, monkeypatch):
    free = iter(range(10**9, 1, -1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=100e9, free=next(free)))
    looks = vitals.Vitals(tmp_path, str(tmp_path / "nothing"), Nvml(nvmlDeviceGetTotalEccErrors=lambda *of: next(free)))
    assert len(said(looks)) == 4  # the disk, the errors of two cards, the row of one
    assert said(looks) == []


def test_a_run_that_slows_down_is_said_once_a_window_and_a_steady_one_never():
    pace, said, now = vitals.Pace(), [], 0.0
    for step in range(400):
        now += 0.5 if step < 300 else 1.0
        said.append(pace.at(now, step))
    slow = [line for line in said if line]
    assert not any(said[:300]) and 1 <= len(slow) <= 3 and "2.0 times as long" in slow[0]


def test_what_lies_between_two_windows_does_not_count():
    pace, now = vitals.Pace(), 0.0
    for step in range(300):
        now += 0.5
        if step % 100 == 50:
            pace.restart()
            now += 100.0
        assert pace.at(now, step) == ""
