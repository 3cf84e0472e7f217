"""Data that is tokenised while trainers' pulses are watched: it may take long while more of it is written, and no longer."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxtrain.data import prepare, tokenizer
from jaxtrain.data.prepare import prepared
from jaxtrain.data.source import HuggingFace, Text
from jaxtrain.data.tokenizer import BpeTokenizer, train_bpe
from jaxtrain.resilience import deadlines, pulse, say, verdict
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.lead import Lead
from jaxtrain.resilience.pulse import PHASES, Beat, Pulse
from jaxtrain.resilience.verdict import Status, Verdict
from jaxtrain.runtime import Process
from jaxtrain.train import run as running
from tests.resilience.ends import Still
from tests.resilience.runs import cache, configured, run  # noqa: F401
from tests.resilience.values import CONFIG as SMALL

ROOT = Path(__file__).parents[2]
ALLOWED_S = 2.0  # for either phase: 20 times what a part of the file takes here
PARTS = 50
KNOWN = Beat(1, 1, 1, 0, "step", 0.0, "", "", dict.fromkeys(PHASES, 1), dict.fromkeys(PHASES, 0.01))
LINE = "the cat sat on the mat\n"


@pytest.fixture
def huge(tmp_path, monkeypatch) -> Text:
    """A single file that is one document, in PARTS, for all of which one process writes one temporary file."""
    (tmp_path / "corpus.txt").write_text(LINE * PARTS * 1000)
    value = HuggingFace(file=str(tmp_path / "tokenizer.json"))
    train_bpe([LINE], value, vocab_size=257)
    monkeypatch.setattr(tokenizer, "LONGEST_TEXT", len(LINE) * 1000)
    monkeypatch.setattr(tokenizer, "TOGETHER", len(LINE) * 1000)
    monkeypatch.setattr(prepare, "POLL_SECONDS", 0.02)
    return Text(files=(str(tmp_path / "corpus.txt"),), tokenizer=value)


class Slowly:
    """A part takes a while; from part `stuck` on, until it is let go, nothing comes."""

    def __init__(self, monkeypatch, stuck=sys.maxsize):
        self.number, self.stuck, self.free, self.real = 0, stuck, threading.Event(), BpeTokenizer._encoded
        monkeypatch.setattr(BpeTokenizer, "_encoded", lambda opened, group: self.encode(opened, group))

    def encode(self, opened, group):
        self.number += 1
        assert self.number < self.stuck or self.free.wait(60)
        time.sleep(ALLOWED_S / 20)
        return self.real(opened, group)


class Two:
    """A lead that prepares and another that waits for it, each in a thread, with pulses; and what a supervisor sees."""

    def __init__(self, source, folder, monkeypatch):
        for table in (deadlines.UNKNOWN, deadlines.LEAST):
            for phase in ("prepare", "restore"):
                monkeypatch.setitem(table, phase, ALLOWED_S)
        self._paths = [folder / name for name in ("lead.pulse", "other.pulse")]
        lead, other = map(Pulse, self._paths)
        lead.beat("prepare", 0)
        other.beat("prepare", 0)
        other.beat("restore", 0)
        work = lambda number, mine: prepared(source, folder / "cache", prepare=not number, moved=mine.renew)  # noqa: E731
        self.threads = [threading.Thread(target=work, args=each) for each in enumerate((lead, other))]
        for thread in self.threads:
            thread.start()

    def running(self):
        return any(thread.is_alive() for thread in self.threads)

    def hang(self):
        statuses = [Status(index=i, host="h", pid=i, beat=pulse.read(path)) for i, path in enumerate(self._paths)]
        assert all(status.beat for status in statuses)
        return verdict.of_hang(statuses, Deadlines(floor=0.1), [KNOWN])


def test_neither_who_prepares_data_nor_who_waits_is_taken_for_hung_while_one_huge_file_grows(huge, tmp_path, monkeypatch):
    Slowly(monkeypatch)
    begin, two = time.monotonic(), Two(huge, tmp_path, monkeypatch)
    while two.running():
        assert (found := two.hang()) is None, found.line
        time.sleep(0.02)
    assert time.monotonic() - begin > 2 * ALLOWED_S


def test_who_prepares_data_is_taken_for_hung_when_nothing_more_is_written(huge, tmp_path, monkeypatch):
    slowly = Slowly(monkeypatch, stuck=10)
    two, end = Two(huge, tmp_path, monkeypatch), time.monotonic() + 60
    try:
        while not (found := two.hang()):
            assert two.running() and time.monotonic() < end, "nobody was noticed"
            time.sleep(0.02)
    finally:
        slowly.free.set()
        for thread in two.threads:
            thread.join()
    assert slowly.number >= 10, "it was noticed before anything stood still"
    assert found.culprits == (0,) and "in phase prepare" in found.line and "1 others wait for it" in found.line


def test_what_workers_write_is_seen_by_the_process_that_waits_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(prepare, "SPAWN_BYTES", 0)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * (5 << 20))
    seen = []
    prepared(Text(files=(f"{tmp_path}/*.txt",)), tmp_path / "cache", prepare=True, workers=2, moved=lambda: seen.append(1))
    assert len(seen) > 1


def test_a_renewal_while_stacks_are_gathered_ends_no_trainer(tmp_path, capsys):
    before = dataclasses.replace(KNOWN, phase="prepare", since=100.0)
    slow = Status(index=0, host="h", pid=1, beat=before)
    hang = Verdict(what="hang", culprits=(0,), line="it made no progress", statuses=[slow])
    host = Still()
    watched = Lead(host, tmp_path, threading.Event(), Deadlines(floor=10.0))
    for since, moved in ((100.0, False), (100.2, False), (700.0, True)):  # as told; by a late message; renewed
        host.statuses = lambda since=since: [dataclasses.replace(slow, beat=dataclasses.replace(before, since=since))]
        assert watched._went_on(hang) is moved
    say.flush()
    assert "no incident, it went on" in capsys.readouterr().err


def test_a_renewal_counts_time_anew_and_the_longest_of_them_is_known_but_is_no_beat(tmp_path):
    mine = Pulse(tmp_path / "p")
    mine.beat("prepare", 0)
    before = pulse.read(tmp_path / "p")
    time.sleep(0.2)
    mine.renew()
    after = pulse.read(tmp_path / "p")
    assert after.since >= before.since + 0.2 and after.longest["prepare"] >= 0.2
    assert (after.sequence, after.phase, after.counts) == (before.sequence, "prepare", before.counts)
    mine.beat("restore", 0)
    last = pulse.read(tmp_path / "p")
    assert last.counts["prepare"] == 1 and 0.19 < last.longest["prepare"]


@pytest.mark.parametrize("lead", [True, False])
def test_a_run_prepares_in_that_phase_and_waits_ahead_of_it(huge, tmp_path, monkeypatch, lead):
    Slowly(monkeypatch)
    did = []
    monkeypatch.setattr(Pulse, "beat", lambda self, phase, step: did.append(phase))
    monkeypatch.setattr(Pulse, "renew", lambda self: did.append("renewed"))
    model = dataclasses.replace(SMALL.model, vocab_size=257)
    config = configured(tmp_path, data=huge, model=model, steps=1)
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if not lead:
            real = running._open

            def opened(config, mesh, process, *more):
                other = threading.Thread(target=lambda: prepared(huge, tmp_path / ".data", prepare=True))
                other.start()
                stack.callback(other.join)
                return real(config, mesh, Process(index=1, count=2), *more)

            patch.setattr(running, "_open", opened)
        run(config, monkeypatch)
    begin = did[: did.index("data")]
    assert [phase for phase in begin if phase != "renewed"] == ["prepare", "restore"]
    assert begin.count("renewed") > 5 and begin.index("renewed") == (1 if lead else 2)


CONFIG = """
import dataclasses, os, time
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.data import Text, prepare, tokenizer
from jaxtrain.resilience import deadlines
from tests.tiny import TINY

for table in (deadlines.UNKNOWN, deadlines.LEAST):
    table["prepare"] = table["restore"] = 8.0
deadlines.FEW_S = 8.0
prepare.BATCH_DOCUMENTS = 1
encode = tokenizer.ByteTokenizer.encode_documents


def slowly(self, texts):
    time.sleep(1000 if "5.txt" in texts[0].decode() and os.environ.get("JAXTRAIN_GENERATION") == "1" else 0.5)
    return encode(self, texts)


tokenizer.ByteTokenizer.encode_documents = slowly
config = dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, vocab_size=257), data=Text(files=("corpus",)), eval=None, steps=20,
)
"""


@pytest.mark.slow
def test_a_launch_ends_a_lead_that_hangs_while_it_prepares_and_lets_the_next_prepare_for_longer_than_its_deadline(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_bytes(f"{number}.txt".encode() * 2_000)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAXTRAIN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "jaxtrain", "launch", "--processes", "2", "config.py", "--name", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = map(json.loads, (tmp_path / "runs/run/incidents.jsonl").read_text().splitlines())
    assert (row["what"], row["culprits"]) == ("hang", [0]) and "in phase prepare" in done.stdout + done.stderr
