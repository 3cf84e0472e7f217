"""What a run says on the way, where nobody can be told."""

import contextlib
import os
import sys

import pytest

from jaxtrain.runtime import Process
from jaxtrain.train.run import _say


@pytest.fixture
def said_to(monkeypatch):
    """said_to(file): a line of the lead is said, with that as stdout."""

    def say(file):
        monkeypatch.setattr(sys, "stdout", file)
        try:
            _say(Process(index=0), "a line")
        finally:
            monkeypatch.undo()
            with contextlib.suppress(OSError):  # what is still in its buffer
                file.close()

    return say


def test_a_full_disk_under_stdout_does_not_stop_a_run(said_to):
    said_to(open("/dev/full", "w"))


def test_a_reader_that_has_left_does(said_to):
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        said_to(open(write, "w"))
