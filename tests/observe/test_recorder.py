"""Rows are exact, short, cut on resume, and survive a torn line."""

import contextlib
import errno
import io
import json
import os
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from jaxtrain.errors import RunError
from jaxtrain.observe.console import line
from jaxtrain.observe.recorder import Recorder, StepClock, plain
from jaxtrain.observe.sinks import Console, Jsonl, TensorBoard, Wandb, read_rows
from tests.disk import disk, fill  # noqa: F401


def test_an_fp32_is_written_as_the_shortest_text_that_reads_back_to_it():
    for value in (np.float32(0.1), np.float32(1 / 3), np.float32(2.5e-7), np.float32(123456.79)):
        text = json.dumps(plain(value))
        assert np.float32(json.loads(text)) == value
        assert len(text) <= len(str(float(value)))
    assert json.dumps(plain(np.float32(0.1))) == "0.1"


def test_integers_stay_integers():
    assert json.dumps(plain(np.int32(7))) == "7"


def test_an_array_is_a_list_in_the_file_and_left_out_where_only_scalars_are_drawn(tmp_path, capsys):
    recorder = Recorder((Console(), Jsonl(), TensorBoard()), tmp_path, first_step=0, steps=10)
    recorder.write(5, {"experts/load": np.array([[1, 2], [3, 4]], np.int32), "experts/max_load": np.float32(1.25)})
    recorder.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 5, "experts/load": [[1, 2], [3, 4]], "experts/max_load": 1.25}]
    assert "step  5/10  load 1.25x\n" in capsys.readouterr().out
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b"experts/max_load" in events.read_bytes() and b"experts/load" not in events.read_bytes()


def test_a_resume_cuts_rows_after_its_step_and_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/loss": 3.0}\n{"step": 3}\n{"step": 4, "tr')
    Recorder((Jsonl(),), tmp_path, first_step=2, steps=9).close()
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 2, "eval/loss": 3.0}]


def test_lines_that_are_no_rows_are_said_and_kept_and_stop_nothing(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step":\n 1}\n{"st\xffep": 2}\n{}\nnull\n{"step": "2"}\n{"step": 2\r}\n{"step": 3}\n'
    path.write_bytes(kept + b'{"step": 4}\n[]\n{"step": 5}\n')
    recorder = Recorder((Jsonl(),), tmp_path, first_step=3, steps=9)
    assert "metrics.jsonl: line 1, 2, 3, 4, 5, 6 cannot be read, and stays as it is" in capsys.readouterr().err
    recorder.write(4, {"train/loss": 1.0})
    recorder.close()
    assert path.read_bytes() == kept + b'{"step": 4, "train/loss": 1.0}\n'
    assert read_rows(path) == [{"step": 2}, {"step": 3}, {"step": 4, "train/loss": 1.0}]


def test_rows_reach_every_sink(tmp_path, capsys):
    recorder = Recorder((Console(), Jsonl(), TensorBoard()), tmp_path, first_step=0, steps=10)
    recorder.write(5, {"train/loss": np.float32(2.5), "train/grad_norm": np.float32(0.5)})
    recorder.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 5, "train/loss": 2.5, "train/grad_norm": 0.5}]
    assert "step  5/10  loss 2.5000  grad 0.500" in capsys.readouterr().out
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b"train/loss" in events.read_bytes()


@pytest.mark.parametrize("error", [ValueError("api_key not configured"), ConnectionError("no route")], ids=repr)
def test_a_service_that_does_not_take_the_run_is_an_error_with_a_fix(tmp_path, monkeypatch, error):
    def init(**where):
        raise error

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(RunError, match="(?s)wandb.init failed.*WANDB_MODE=offline") as said:
        Recorder((Wandb(project="p"),), tmp_path, first_step=0, steps=9)
    assert said.value.got == f"{type(error).__name__}: {error}"


def test_a_full_disk_below_a_service_is_waited_for_as_any_other(tmp_path, monkeypatch, capsys):
    errors, rows = [OSError(errno.ENOSPC, "full")], []

    def init(**where):
        if errors:
            raise errors.pop()
        return SimpleNamespace(log=lambda row, step: rows.append(step), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    recorder = Recorder((Wandb(project="p"),), tmp_path, first_step=3, steps=9)
    recorder.write(4, {"train/loss": 1.0})
    recorder.close()
    assert rows == [4] and "METRICS ARE NOT WRITTEN (full)" in capsys.readouterr().err


class ShortOfRoom(io.FileIO):
    """A disk that fills up within a write."""

    def write(self, data):
        return super().write(data[:10])


class Full(io.FileIO):
    """A disk with no room."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("sink", [Jsonl(), TensorBoard()])
@pytest.mark.parametrize("disk", [Full, ShortOfRoom])
def test_rows_wait_for_a_disk_that_is_full_or_fills_up_and_come_in_order_once_it_has_room(tmp_path, capsys, sink, disk):
    recorder = Recorder((sink,), tmp_path, first_step=0, steps=10)
    file, writer = recorder._writers[0]._writer._file, recorder._writers[0]._writer
    recorder.write(1, {"train/loss": 1.0})
    with disk(file.name, "ab") as writer._file:
        for step in (2, 3):
            recorder.write(step, {"train/loss": 1.0})
            recorder.flush()
            assert recorder.waits()
    (said,) = capsys.readouterr().err.splitlines()
    assert "METRICS ARE NOT WRITTEN (No space left on device)" in said
    writer._file = file
    recorder.write(4, {"train/loss": 1.0})
    assert not recorder.waits()
    recorder.close()
    assert "metrics are written again, 3 rows at once" in capsys.readouterr().err
    rows = read_rows(tmp_path / "metrics.jsonl") if isinstance(sink, Jsonl) else []
    steps = [row["step"] for row in rows] or [step for step, *_ in content(tmp_path / "tensorboard")[2]]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("sink", [Jsonl(), TensorBoard()])
def test_rows_that_a_disk_never_takes_end_the_run_with_the_reason(tmp_path, monkeypatch, sink):
    recorder = Recorder((sink, Jsonl()), tmp_path, first_step=0, steps=10)
    writer = recorder._writers[0]._writer
    writer._file.close()
    writer._file = Full("/dev/full", "a")
    recorder.write(1, {"train/loss": 1.0})
    monkeypatch.setattr("jaxtrain.observe.recorder.WAITING_BYTES", 30)
    with pytest.raises(RunError, match="(?s)2 rows of metrics were not written.*No space left on device"):
        recorder.write(2, {"train/loss": 1.0})
    with pytest.raises(RunError, match="2 rows of metrics were not written"):
        recorder.close()
    assert recorder._writers[1]._writer._file.closed


def test_what_a_disk_took_and_cannot_keep_ends_the_run_so_that_it_is_computed_again(tmp_path, monkeypatch):
    recorder = Recorder((Jsonl(),), tmp_path, first_step=0, steps=10)
    recorder.write(1, {"train/loss": 1.0})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(RunError, match="(?s)cannot write metrics.*Input/output error"):
        recorder.flush()
    recorder.close()


def test_a_full_disk_under_stderr_too_keeps_the_rows(tmp_path, monkeypatch):
    recorder = Recorder((Jsonl(),), tmp_path, first_step=0, steps=10)
    writer = recorder._writers[0]._writer
    with open("/dev/full", "w") as full, Full(tmp_path / "metrics.jsonl", "ab") as disk:
        monkeypatch.setattr(sys, "stderr", full)
        file, writer._file = writer._file, disk
        recorder.write(1, {"train/loss": 1.0})
        writer._file = file
        recorder.close()
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]


def test_a_sink_that_cannot_be_opened_is_an_error_with_a_fix(tmp_path):
    with pytest.raises(RunError, match="cannot write metrics") as error:
        Recorder((Jsonl(),), tmp_path / "nowhere", first_step=0, steps=10)
    assert "run the same command again" in error.value.fix


@pytest.mark.parametrize("sink", [Jsonl(), TensorBoard()])
def test_a_run_that_goes_on_cuts_its_rows_on_a_full_disk_and_waits_for_room_for_more(disk, capsys, sink):
    begun = Recorder((sink,), disk, first_step=0, steps=10)
    for step in (1, 2, 3):
        begun.write(step, {"train/loss": 1.0})
    begun.close()
    for path in disk.glob("tensorboard/*"):
        path.rename(path.with_name("events.before"))  # else a start within the same second has its name
    room, file = fill(disk), disk / "metrics.jsonl"
    if file.exists():
        file.write_bytes(file.read_bytes() + b'{"step": 3, "eval/loss": ' + b"1" * (4096 - 25 - file.stat().st_size))  # its page is full
    recorder = Recorder((sink,), disk, first_step=2, steps=10)
    if file.exists():
        assert [row["step"] for row in read_rows(file)] == [1, 2]
    recorder.write(3, {"train/loss": 2.0})
    room.unlink()
    recorder.write(4, {"train/loss": 2.0})
    recorder.close()
    if file.exists():
        assert [row["step"] for row in read_rows(file)] == [1, 2, 3, 4]
    else:
        assert "METRICS ARE NOT WRITTEN (No space left on device)" in capsys.readouterr().err
        assert len([*(disk / "tensorboard").iterdir()]) == 2


def events(folder):
    """The events of the one file below, each with its checksums checked: TFRecord framing, read by hand."""
    (path,) = folder.glob("events*")
    raw = path.read_bytes()
    while raw:
        (size,) = struct.unpack("<Q", raw[:8])
        data = raw[12 : 12 + size]
        assert struct.unpack("<I", raw[8:12]) == (masked_crc32c(raw[:8]),)
        assert struct.unpack("<I", raw[12 + size : 16 + size]) == (masked_crc32c(data),)
        yield Event.FromString(data)
        raw = raw[16 + size :]


def content(folder):
    """What TensorBoard makes of them: versions, where it purges, and (step, name, value) of each scalar."""
    found = list(events(folder))
    scalars = [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]
    purges = [event.step for event in found if event.session_log.status == SessionLog.START]
    return {event.file_version for event in found}, purges, scalars


def test_tensorboard_is_given_what_its_libraries_own_writer_gives(tmp_path):
    rows = {8: {"train/loss": 2.5, "time/step_seconds": 0.125}, 9: {"eval/loss": 3.0}}
    with SummaryWriter(str(tmp_path / "theirs"), purge_step=8) as theirs:
        for step, row in rows.items():
            for name, value in row.items():
                theirs.add_scalar(name, value, step)
    recorder = Recorder((TensorBoard(),), tmp_path, first_step=7, steps=9)
    for step, row in rows.items():
        recorder.write(step, row)
    recorder.flush()
    recorder.close()
    assert content(tmp_path / "tensorboard") == content(tmp_path / "theirs")


def test_the_clock_counts_steps_between_readings(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StepClock(tokens_per_step=1000, flops_per_step=1e9, peak_flops=1e10, first_step=0)
    now[0] = 150.0
    clock.restart(1)  # the first update, with its compilation, is not counted
    now[0] = 152.0
    assert clock.tick(5) == {
        "time/step_seconds": 0.5,
        "throughput/tokens_per_second": 2000.0,
        "throughput/mfu": pytest.approx(0.2),
    }


def test_an_evaluation_row_reads_as_one():
    assert line({"step": 3, "eval/loss": 1.25, "eval/bits_per_byte": 1.8}, 10) == (
        "step  3/10  held-out loss 1.2500  1.8000 bits/byte"
    )
