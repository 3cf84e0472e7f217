"""The files of a snapshot under fire: writers killed at random moments, and more of them than one. No jax in the children."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxtrain.errors import RunError
from jaxtrain.resilience import slots
from jaxtrain.resilience.say import flush
from jaxtrain.resilience.slots import Header, Kind, Moment, Piece, Slots, Snapshot

ROOT = Path(__file__).parents[2]
NUM_BYTES = 1 << 18
WRITER = """
import sys
from pathlib import Path
from jaxtrain.resilience.slots import Header, Kind, Moment, Piece, Slots, checksum

folder, first, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
writer, keep = Slots(folder, 0), None
assert "jax" not in sys.modules
print("up", flush=True)
for step in range(first, first + 10**9):
    view = writer.begin(size, keep)
    for start in range(0, size, 4096):  # page by page, as a copy of many arrays would
        view[start : start + 4096] = bytes([step % 256]) * len(view[start : start + 4096])
    piece = Piece("x", ((0, size),), 0, size, checksum(view))
    keep = Moment(step, 1)
    kinds = {"x": Kind("uint8", (size,))}
    header = dict(run="r", moment=keep, since=0, keep=None, process=0, processes=1, data={}, arrays=kinds, pieces=[piece])
    writer.commit(Header(**header))
    print(step, flush=True)
"""


def killed_after(folder, first, seconds):
    """The last step that the writer said was whole."""
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(NUM_BYTES)]
    # Not buffered: `communicate` does not see what `readline` has read beyond its line.
    writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0)
    try:
        assert writer.stdout.readline() == b"up\n"
        time.sleep(seconds)
    finally:
        writer.send_signal(signal.SIGKILL)
        said, _ = writer.communicate(timeout=30)
    whole = [line for line in said.splitlines(keepends=True) if line.endswith(b"\n")]
    return int(whole[-1]) if whole else first - 1


def check(folder, last):
    """What stands is whole: the last that was said, or the one after it."""
    found = slots.newest([folder])
    assert found in (last, last + 1)
    for part in slots.snapshots(folder):
        step = part.header.moment.step
        assert bytes(part.read(part.header.pieces[0])) == bytes([step % 256]) * NUM_BYTES
    return found


def killed_often(folder, times, seed):
    draw, last, seconds = random.Random(seed), None, 0.1
    while last is None and seconds < 60:  # a busy machine may not let it write at once
        killed_after(folder, 1, seconds)
        last, seconds = slots.newest([folder]), 2 * seconds
    assert last
    for _ in range(times):
        last = check(folder, max(last, killed_after(folder, last + 1, draw.uniform(0, 0.05))))


def test_a_writer_killed_at_any_moment_leaves_the_newest_whole_one(tmp_path):
    killed_often(tmp_path, times=12, seed=3)


@pytest.mark.slow
def test_a_writer_killed_two_hundred_times_leaves_the_newest_whole_one(tmp_path):
    killed_often(tmp_path, times=200, seed=4)


def header_of(step, process=0, box=((0, 4),), num=4, crc32=None):
    piece = Piece("x", box, 0, 4, crc32 or slots.checksum(bytes([step]) * 4))
    fields = dict(run="r", moment=Moment(step, 1), since=0, keep=None, process=process, processes=2, data={})
    return Header(**fields, arrays={"x": Kind("uint8", (num,))}, pieces=[piece])


def write(folder, step, process=0, keep=None, **fields):
    folder.mkdir(exist_ok=True)
    writer = Slots(folder, process)
    writer.begin(4, keep)[:] = bytes([step]) * 4
    writer.commit(header_of(step, process, **fields))


def test_the_slot_to_keep_is_never_overwritten_even_by_another_writer(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=Moment(1, 1) if step > 1 else None)
    assert sorted(part.header.moment.step for part in slots.snapshots(tmp_path)) == [1, 4]


def test_processes_of_unequal_steps_have_the_newest_that_all_have(tmp_path):
    left, right = ((0, 4),), ((4, 8),)
    for process, box, steps in ((0, left, (1, 2)), (1, right, (2, 3))):
        for step in steps:
            write(tmp_path / f"host{process}", step, process, box=box, num=8)
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    assert slots.newest(hosts) == 2 and slots.newest(hosts[:1]) is None and slots.newest([]) is None


def test_a_slots_memory_is_used_again_not_fetched_anew(tmp_path):
    write(tmp_path, 1)
    before = (tmp_path / "0-a.data").stat().st_ino
    for step in (2, 3, 4, 5):
        write(tmp_path, step)
    assert (tmp_path / "0-a.data").stat().st_ino == before


def test_a_disk_without_room_is_an_error_not_a_death(tmp_path):
    with pytest.raises(OSError):
        Slots(tmp_path, 0).begin(1 << 50, None)


def test_damage_names_file_array_and_place(tmp_path):
    write(tmp_path, 1, crc32="00000000")
    part = slots.snapshots(tmp_path)[0]
    with pytest.raises(slots.DamagedError, match=r"0-a.data is damaged(.|\n)*x\[0:4\]"):
        part.read(part.header.pieces[0])


def test_boxes_overlap_where_both_are():
    assert slots.overlap(((0, 4), (2, 6)), ((2, 8), (0, 4))) == ((2, 4), (2, 4))
    assert slots.volume(slots.overlap(((0, 2),), ((2, 4),))) == 0 and slots.volume(()) == 1


def test_offsets_are_aligned_and_do_not_overlap():
    sizes = [1, 64, 65, 3]
    offsets = list(slots.laid_out(sizes))
    assert all(at % slots.ALIGNMENT == 0 for at in offsets)
    assert all(a + size <= b for a, size, b in zip(offsets, sizes, offsets[1:]))


def test_a_part_without_bytes_is_a_whole_part(tmp_path):
    writer = Slots(tmp_path, 0)
    writer.begin(0, None)
    writer.commit(Header(**{**vars(header_of(1)), "arrays": {}, "pieces": []}))
    assert slots.newest([tmp_path]) == 1 and isinstance(slots.snapshots(tmp_path)[0], Snapshot)


def memory(tmp_path, name, *, hours=0.0):
    """A supervisor's folder with 1 MB of a snapshot in it that nobody has touched for so long."""
    folder = tmp_path / f"jaxtrain-7-{name}"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / "0-a.data").write_bytes(bytes(1_000_000))
    (folder / "lock").touch()
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    return folder


def test_what_dead_runs_left_in_memory_is_removed_and_said_when_another_starts(tmp_path, capsys):
    own, mate, fresh, held = (memory(tmp_path, name, hours=h) for name, h in (("own", 90), ("mate", 90), ("fresh", 23), ("held", 90)))
    gone = [memory(tmp_path, name, hours=25) for name in ("gone", "gone-too")]
    (gone[1] / "lock").unlink()
    for path in (gone[1], touched := memory(tmp_path, "touched", hours=90)):
        os.utime(path, (time.time() - 3600 * 25,) * 2)
    os.utime(touched / "snapshots" / "0-a.data")
    link, other = tmp_path / "jaxtrain-7-link", memory(tmp_path / "else", "where", hours=90)
    link.symlink_to(other)
    with open(held / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with slots.starting(own, mate):
            assert {*tmp_path.glob("jaxtrain-7-*")} == {own, mate, fresh, held, touched, link} and other.exists()
    flush()
    assert capsys.readouterr().err == "[host] removed what 2 runs untouched for 24 h left in memory: 0.002 GB\n"
    with slots.starting(own):
        assert not held.exists() and not mate.exists()


def test_a_supervisor_that_starts_at_the_same_moment_keeps_what_it_resumes_from(tmp_path):
    """Between its folder's being opened and locked the other waits."""
    old, own = memory(tmp_path, "old", hours=90), memory(tmp_path, "own")
    swept = threading.Event()

    def sweep():
        with slots.starting(own):
            swept.set()

    thread = threading.Thread(target=sweep)
    with slots.starting(old), open(old / "lock") as lock:
        thread.start()
        assert not swept.wait(0.3)
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock = os.dup(lock.fileno())
    assert swept.wait(20) and (old / "snapshots" / "0-a.data").exists()
    thread.join()
    os.close(lock)


def test_a_lock_that_cannot_be_had_says_what_to_do(tmp_path):
    (tmp_path / "jaxtrain-7.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="remove .*jaxtrain-7.lock"), slots.starting(tmp_path / "jaxtrain-7-own"):
        pass
