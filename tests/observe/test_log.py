"""A process leaves its end and, when asked or when it crashes, its stacks."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.errors import RunError
from jaxtrain.observe.log import process_log

ROOT = Path(__file__).parents[2]


def _text(run_dir, index=0):
    return (run_dir / f"logs/process_{index}.log").read_text()


def test_warnings_of_libraries_and_the_error_that_ended_the_run_are_kept(tmp_path):
    with pytest.raises(ValueError, match="the reason"), process_log(tmp_path, 3):
        logging.getLogger("some.library").warning("look here")
        raise ValueError("the reason")
    for words in ("WARNING some.library: look here", "ValueError: the reason", "started", "ended"):
        assert words in _text(tmp_path, 3)


def test_a_full_disk_hides_neither_how_the_run_ended_nor_fills_the_terminal(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/process_0.log").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="the reason"), process_log(tmp_path, 0):
        logging.getLogger("some.library").warning("look here")
        raise ValueError("the reason")
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_made_is_an_error_with_a_fix(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(RunError, match="(?s)cannot write .*process_0.log.*fix"), process_log(tmp_path, 0):
        pass


def test_a_signal_adds_the_stacks_of_a_process_that_goes_on(tmp_path):
    with process_log(tmp_path, 0):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert "test_a_signal_adds_the_stacks" in _text(tmp_path)


def test_a_crash_in_native_code_leaves_the_python_stack(tmp_path):
    code = (
        "import ctypes, pathlib, sys; from jaxtrain.observe.log import process_log\n"
        "def reads_null(): ctypes.string_at(0)\n"
        "with process_log(pathlib.Path(sys.argv[1]), 0): reads_null()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in _text(tmp_path)
    assert "reads_null" in _text(tmp_path)
