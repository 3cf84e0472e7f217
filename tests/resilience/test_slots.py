"""The files of a snapshot under fire: writers killed at random moments, and more of them than one. No jax in the children."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtrain.resilience import slots
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
