"""What a terminal shows while a run trains: rows, and below them the bar."""

import io
import re
import sys
import time

import pytest

from jaxtrain.errors import RunError
from jaxtrain.observe.console import ConsoleWriter, Stdout
from jaxtrain.observe.recorder import Recorder
from jaxtrain.observe.sinks import Console, Jsonl


def shown(write) -> str:
    """All that `write(writer, now)` and the end put on a terminal; now[0] is its clock."""
    now, file = [0.0], io.StringIO()
    console = Stdout(file=file, force_terminal=True, width=120, get_time=lambda: now[0], soft_wrap=True, highlight=False)
    writer = ConsoleWriter(0, 100, console)
    write(writer, now)
    writer.close()
    return file.getvalue()


def test_the_time_left_is_shown_however_far_apart_rows_are():
    def rows(writer, now):
        for step in (1, 2, 3):
            now[0] += 40
            writer.write({"step": step, "train/loss": 1.0})

    said = shown(rows)
    assert "step   3/100  loss 1.0000" in said
    assert re.findall(r"\d:\d\d:\d\d", said)[-2:] == ["0:02:00", "1:04:40"]  # 97 steps of 40 s


def test_the_cursor_is_never_hidden_so_that_no_kill_leaves_it_so():
    said = shown(lambda writer, now: writer.write({"step": 1, "train/loss": 1.0}))
    assert "training" in said and "\x1b[?25" not in said


def test_where_a_later_sink_cannot_open_the_bar_is_gone_before_the_error_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match="(?s)cannot write metrics.*Is a directory"):
        Recorder((Console(), Jsonl()), tmp_path, first_step=0, steps=10)
    assert sys.stdout is terminal  # rich's own stood there while the bar did
    said = terminal.getvalue()
    time.sleep(0.3)  # it was drawn ten times a second
    assert "training" in said and terminal.getvalue() == said
