"""Progress records, learned deadlines and verdicts, without processes."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jaxtrain.errors import RunError
from jaxtrain.resilience import pulse, verdict
from jaxtrain.resilience.deadlines import FACTOR, FEW_S, LEAST, UNKNOWN, Deadlines
from jaxtrain.resilience.pulse import PHASES, Beat, Pulse
from jaxtrain.resilience.verdict import Status
from tests.disk import disk, fill  # noqa: F401

ONE_BEAT_S = 50e-6  # a few microseconds on an idle machine; of a step of 500 ms four beats take 0.04 %


def test_what_a_trainer_wrote_last_is_read_by_another_and_stays_when_it_is_gone(tmp_path):
    path = tmp_path / "p"
    assert pulse.read(path) is None
    code = """if True:
        import os, sys
        from pathlib import Path
        from jaxtrain.resilience.pulse import Pulse
        mine = Pulse(Path(sys.argv[1]), generation=3)
        mine.about("data 1 tensor 0-1", "snapshot")
        mine.beat("compile", 7)
        mine.beat("step", 8)
        os._exit(9)
    """
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2])
    assert child.wait(60) == 9
    beat = pulse.read(path)
    assert (beat.pid, beat.generation, beat.step, beat.phase, beat.about) == (child.pid, 3, 8, "step", "data 1 tensor 0-1")
    assert beat.restored == "snapshot"
    assert beat.counts["compile"] == beat.counts["start"] == 1 and beat.counts["step"] == 0
    assert 0 <= beat.age() < 60


def test_a_record_that_is_being_written_is_not_read(tmp_path):
    path = tmp_path / "p"
    Pulse(path).beat("step", 1)
    raw = bytearray(path.read_bytes())
    raw[0] += 1  # the first sequence number is ahead of the last
    path.write_bytes(raw)
    assert pulse.read(path) is None


def test_a_damaged_byte_is_no_news_wherever_it_is(tmp_path):
    path = tmp_path / "p"
    mine = Pulse(path)
    mine.about("data 1", "snapshot 40")
    mine.beat("step", 7)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x7F]) + whole[at + 1 :])
        assert pulse.read(path) is None
    mine = Pulse(path)  # as the trainer does whose supervisor began it
    mine.beat("step", 8)
    assert pulse.read(path).step == 8


def test_what_was_known_stays_known_when_the_file_is_cut_damaged_or_removed(tmp_path):
    path = tmp_path / "p"
    reader = pulse.begun(path, generation=3)
    try:
        assert (reader.last().phase, reader.last().generation) == ("start", 3)
        mine = Pulse(path, generation=3)
        mine.beat("step", 7)
        before = reader.last()
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert reader.last() == before and before.step == 7
        mine.beat("step", 8)
        assert reader.last().step == 8
        path.unlink()
        mine.beat("step", 9)
        assert reader.last().step == 9
    finally:
        reader.close()


def test_a_reader_survives_a_file_that_is_cut(tmp_path):
    reader = pulse.begun(tmp_path / "p", generation=1)
    (tmp_path / "p").write_bytes(b"")
    assert reader.last() is None  # it never read one
    reader.close()


def test_where_memory_is_full_a_pulse_is_in_the_temporary_directory_as_long_as_it_is_read(disk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = fill(disk)
    reader = pulse.begun(disk / "1.0.pulse", generation=1)
    assert reader.path.parent == tmp_path and reader.last().phase == "start"
    Pulse(reader.path, generation=1).beat("step", 5)
    assert reader.last().step == 5
    reader.close()
    assert not reader.path.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(RunError, match=f"is full(.|\n)*No space left(.|\n)*make room in {tmp_path}"):
        pulse.begun(disk / "1.0.pulse", generation=1)
    room.unlink()
    pulse.begun(disk / "1.0.pulse", generation=1).close()


def test_a_beat_costs_next_to_nothing(tmp_path):
    mine = Pulse(tmp_path / "p")
    rounds = []
    for _ in range(20):
        begin = time.perf_counter()
        for step in range(100):
            mine.beat("step", step)
        rounds.append((time.perf_counter() - begin) / 100)
    assert min(rounds) < ONE_BEAT_S


def beat(step=10, phase="step", age=0.0, longest=None, counts=None, about="", sequence=40):
    longest = dict.fromkeys(PHASES, 0.0) | (longest or {})
    counts = dict.fromkeys(PHASES, 100) | (counts or {})
    return Beat(sequence, 2, 1, step, phase, time.monotonic() - age, about, "", counts, longest)


def test_a_deadline_is_learned_from_the_longest_so_far_and_never_below_the_floor():
    deadlines = Deadlines(floor=10)
    assert deadlines.allowed("step", []) == UNKNOWN["step"]
    assert deadlines.allowed("step", [beat(longest={"step": 0.1})]) == 10
    assert deadlines.allowed("step", [beat(longest={"step": 5.0}), beat(longest={"step": 2.0})]) == FACTOR * 5
    few = beat(longest={"step": 0.1}, counts={"step": 3})
    assert deadlines.allowed("step", [few]) == FEW_S
    assert deadlines.allowed("step", [beat(longest={"step": 20.0}, counts={"step": 3})]) == FACTOR * 20
    assert deadlines.allowed("compile", [beat(longest={"compile": 60.0}, counts={"compile": 1})]) == FACTOR * 60
    for phase, least in LEAST.items():  # a phase that is rare may take longer than it ever did
        assert deadlines.allowed(phase, [beat(longest={phase: 0.1})]) == least


def status(index, code=None, ended=None, stopped=False, frame="", **how):
    return Status(index=index, host=f"h{index}", pid=index, code=code, ended=ended, beat=beat(**how), stopped=stopped, frame=frame)


def test_a_signal_is_the_cause_though_a_neighbour_failed_before_it_was_seen():
    found = verdict.of_exits([status(0, 1, 5.00), status(1, -9, 5.01), status(2)])
    assert found.culprits == (1,) and found.what == "SIGKILL" and "1 more failed" in found.line
    assert verdict.of_exits([status(0), status(1, 0, 5.0)]) is None
    assert verdict.of_exits([status(0, 1, 5.0), status(1, 1, 4.0)]).culprits == (1,)


def test_no_trainer_is_to_blame_where_the_service_that_all_hang_on_ended_before_them():
    aborted = [status(0, -6, 5.0), status(1, -6, 5.1)]
    lost = verdict.of_exits(aborted, -9, 4.9)
    assert lost.culprits == () and "the coordination service ended by SIGKILL, and with it 2 trainers" in lost.line
    assert verdict.of_exits(aborted, 1, 5.2).culprits == verdict.of_exits(aborted).culprits == (0,)


def test_times_do_not_excuse_a_service_that_a_signal_ended_where_trainers_ended_as_its_loss_ends_them():
    aborted, raised, killed = status(0, -6, 5.0), status(1, 1, 5.1), status(2, -9, 5.05)
    assert verdict.of_exits([aborted, raised], -9, 5.2).what == "service lost"
    assert verdict.of_exits([raised, killed], -9, 5.2).culprits == (2,)  # its loss kills nobody


@pytest.mark.parametrize(
    ("statuses", "culprits"),
    [
        ([status(0, sequence=41, age=20), status(1, sequence=40, age=20)], (1,)),
        ([status(0, phase="metrics", sequence=42, age=20), status(1, phase="data", age=20)], (1,)),
        ([status(0, phase="metrics", age=20), status(1, phase="metrics", age=20, stopped=True)], (1,)),
        ([status(0, phase="metrics", age=20), status(1, phase="metrics", age=21)], (1,)),
        ([status(0, phase="data", sequence=41, age=20), status(1, phase="metrics", age=20), status(2, sequence=42, age=20)], (1,)),
        ([status(i, frame="read" if i == 2 else "step", age=20 + i) for i in range(4)], (2,)),
        ([status(i, frame=f"{i}", age=20 + i) for i in range(4)], (3,)),
    ],
)
def test_who_came_least_far_is_to_blame_for_a_hang(statuses, culprits):
    known = [beat(longest={phase: 0.1 for phase in PHASES})]
    found = verdict.of_hang(statuses, Deadlines(floor=10), known)
    assert found.culprits == culprits and found.what == "hang" and f"h{culprits[0]}" in found.line


def test_nobody_is_late_within_the_deadline():
    known = [beat(longest={phase: 0.1 for phase in PHASES})]
    assert verdict.of_hang([status(0, age=9), status(1, age=2)], Deadlines(floor=10), known) is None
    assert verdict.of_hang([status(0, age=500)], Deadlines(floor=10), []) is None  # nothing was learned yet


def test_who_is_late_is_not_to_blame_while_it_waits_for_one_that_has_time_left():
    known = [beat(longest=dict.fromkeys(PHASES, 0.1) | {"save": 5.0})]
    waits, saves = (status(0, phase="step", sequence=41, age=20), status(1, phase="save", age=21))
    assert verdict.of_hang([waits, saves], Deadlines(floor=10), known) is None
    late = status(1, phase="save", age=LEAST["save"] + 1)
    assert verdict.of_hang([waits, late], Deadlines(floor=10), known).culprits == (1,)


def test_thousands_of_trainers_are_judged_at_once():
    known = beat(longest={phase: 0.1 for phase in PHASES}, counts={phase: 100 for phase in PHASES})
    many = [status(i, longest=known.longest, counts=known.counts) for i in range(4096)]
    begin = time.process_time()
    assert verdict.of_hang(many, Deadlines(floor=10), [s.beat for s in many]) is None
    assert time.process_time() - begin < 1.0
