"""Prepared shards: the bytes they hold, found again, resumed after a kill, waited for, and damage of every kind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.data import prepare, reading
from jaxtrain.data.prepare import find, prepared, token_dtype
from jaxtrain.data.shards import BLOCK, Shards
from jaxtrain.data.source import Jsonl, Text
from jaxtrain.data.tokenizer import open_tokenizer
from jaxtrain.errors import DataError, RunError


@pytest.fixture
def source(tmp_path, corpus) -> Text:
    return Text(files=(str(tmp_path / "corpus"),))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(reading, "SMALLEST_SHARD", 3000)


def tokens(folder: Path) -> list[int]:
    stream = Shards(folder)
    out = np.empty(stream.num_tokens, np.int32)
    stream.read(0, out)
    return out.tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_every_documents_ids_and_its_end_in_order(source, corpus, tmp_path, bpe, small_shards):
    for value in (source.tokenizer, bpe):
        folder = prepared(replace(source, tokenizer=value), tmp_path / "cache", prepare=True)
        tokenizer = open_tokenizer(value)
        expected = [[*tokenizer.encode(corpus[name].decode()), tokenizer.end] for name in sorted(corpus)]
        assert tokens(folder) == [i for ids in expected for i in ids]
        stream = Shards(folder)
        assert np.array_equal(stream.start_of(np.arange(40)), np.cumsum([0, *map(len, expected)])[:-1])
        assert [stream.document_name(i) for i in range(40)] == sorted(corpus)
        assert len(list(folder.glob("*.tokens"))) > 3 and not list(folder.glob("*.tmp"))


def test_ids_are_as_wide_as_the_vocabulary_needs():
    class Sized:
        def __init__(self, vocab_size):
            self.vocab_size = vocab_size

    assert [token_dtype(Sized(n)).str for n in (257, 65536, 65537)] == ["<u2", "<u2", "<u4"]


def test_lines_are_named_by_their_byte_offset(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two"}\n')
    stream = Shards(prepared(Jsonl(files=(str(tmp_path / "x.jsonl"),)), tmp_path / "cache", prepare=True))
    assert [stream.document_name(i) for i in range(2)] == ["x.jsonl@0", "x.jsonl@16"]


def test_the_same_source_is_found_at_once_and_nothing_is_written(source, tmp_path, monkeypatch):
    folder = prepared(source, tmp_path / "cache", prepare=True)
    before = contents(folder)
    monkeypatch.setattr(prepare, "write_shard", lambda *args: pytest.fail("tokenised again"))
    assert prepared(source, tmp_path / "cache", prepare=True) == folder
    assert contents(folder) == before


def test_another_source_split_tokenizer_or_file_is_another_folder(source, tmp_path, bpe):
    variants = [source, replace(source, tokenizer=bpe), replace(source, exclude=("a/*",)), replace(source, holdout=0.3)]
    variants.append(replace(source, holdout=0.3).heldout())
    folders = [find(variant, tmp_path) for variant in variants]
    os.utime(tmp_path / "corpus/a/00.txt", ns=(1, 1))
    folders.append(find(source, tmp_path))
    assert len(set(folders)) == len(variants) + 1


def test_several_processes_write_the_same_bytes_as_one(source, tmp_path, small_shards, monkeypatch):
    one = prepared(source, tmp_path / "one", prepare=True, workers=1)
    monkeypatch.setattr(prepare, "SPAWN_BYTES", 0)
    two = prepared(source, tmp_path / "two", prepare=True, workers=2)
    assert contents(one) == contents(two)


PREPARE = """
import sys
from jaxtrain.data import Text, prepare, prepared, reading
reading.SMALLEST_SHARD, prepare.SPAWN_BYTES = 3000, 0
if __name__ == "__main__":
    prepared(Text(files=(sys.argv[1],)), sys.argv[2], prepare=True, workers=int(sys.argv[3]))
"""


def start(tmp_path: Path, source: Text, workers: int) -> subprocess.Popen:
    (tmp_path / "run.py").write_text(PREPARE)
    command = [sys.executable, str(tmp_path / "run.py"), source.files[0], str(tmp_path / "killed"), str(workers)]
    env = os.environ | {"PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_keeps_finished_shards_and_the_next_run_ends_with_the_same_bytes(
    source, tmp_path, small_shards, workers
):
    for i in range(60):
        (tmp_path / "corpus" / f"more{i}.txt").write_bytes(b"more text " * 300)
    folder = find(source, tmp_path / "killed")
    process = start(tmp_path, source, workers)
    while len(finished := list(folder.glob("0*.json"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in finished}
    assert prepared(source, tmp_path / "killed", prepare=True, workers=1) == folder
    assert {path: path.stat().st_mtime_ns for path in finished} == kept
    assert contents(folder) == contents(prepared(source, tmp_path / "whole", prepare=True, workers=1))


def test_workers_do_not_outlive_a_killed_parent(source, tmp_path):
    for i in range(200):
        (tmp_path / "corpus" / f"more{i}.txt").write_bytes(b"more text " * 3000)
    process = start(tmp_path, source, workers=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list((tmp_path / "killed").glob("*/0*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    workers = children.read_text().split()
    process.kill()
    process.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_process_waits_until_the_lead_has_finished(source, tmp_path):
    lead = threading.Timer(0.3, lambda: prepared(source, tmp_path / "cache", prepare=True))
    lead.start()
    folder = prepared(source, tmp_path / "cache", prepare=False, stall_seconds=30)
    assert (folder / "index.json").exists()
    lead.join()


def test_waiting_for_nobody_ends(source, tmp_path):
    with pytest.raises(RunError, match="no process is preparing the data"):
        prepared(source, tmp_path / "cache", prepare=False, stall_seconds=0.1)


def test_files_that_change_while_they_are_read_are_noticed(source, tmp_path, monkeypatch):
    write = prepare.write_shard

    def write_and_touch(*args):
        write(*args)
        os.utime(tmp_path / "corpus/a/00.txt", ns=(1, 1))

    monkeypatch.setattr(prepare, "write_shard", write_and_touch)
    with pytest.raises(DataError, match="changed while they were read"):
        prepared(source, tmp_path / "cache", prepare=True)


def test_text_that_is_not_utf8_is_refused_by_file_and_offset(source, tmp_path, bpe, small_shards, monkeypatch):
    (tmp_path / "corpus" / "bad.txt").write_bytes(b"fine \xff")
    for spawn in (prepare.SPAWN_BYTES, 0):  # in this process, and through a worker's
        monkeypatch.setattr(prepare, "SPAWN_BYTES", spawn)
        with pytest.raises(DataError) as caught:
            prepared(replace(source, tokenizer=bpe), tmp_path / "cache", prepare=True, workers=2)
        assert "bad.txt is not UTF-8 at byte 5" in str(caught.value) and "0xff" in caught.value.got
    assert tokens(prepared(replace(source, tokenizer=replace(bpe, errors="replace")), tmp_path / "cache", prepare=True))


def test_a_lone_surrogate_in_json_is_refused_by_bpe_and_taken_by_bytes(tmp_path, bpe):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "a\\ud800"}\n')
    source = Jsonl(files=(str(tmp_path / "x.jsonl"),))
    with pytest.raises(DataError, match="not UTF-8 at byte 1 of the document @15"):
        prepared(replace(source, tokenizer=bpe), tmp_path / "cache", prepare=True)
    assert tokens(prepared(source, tmp_path / "cache", prepare=True))[3:] == [97, 0xED, 0xA0, 0x80, 256]


# Damage. Each of these edits one file of a finished folder; reading every token and name must then fail and say where.


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


HARM = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"xx"),
    "damaged": lambda path: flip(path, path.stat().st_size // 2),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    for i in range(4):
        (root / f"{i}.txt").write_bytes(bytes([i]) * 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SMALLEST_SHARD", 1000)
        return prepared(Text(files=(str(root / "*.txt"),)), root, prepare=True)


@pytest.mark.parametrize("name", ["00001.tokens", "00001.crc", "00001.docs", "00001.json", "starts", "index.json"])
@pytest.mark.parametrize("harm", HARM)
def test_damage_is_found_before_it_is_trained_on(finished, tmp_path, name, harm):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    HARM[harm](folder / name)
    with pytest.raises(DataError) as caught:
        Shards(folder).verify()
    assert name in caught.value.what and "jaxtrain data prepare" in caught.value.fix
    if name not in ("00001.docs", "00001.json"):  # these say where a document comes from: no token passes through them
        with pytest.raises(DataError, match=name):
            tokens(folder)


def test_one_flipped_bit_is_found_in_the_block_that_is_read_and_only_there(tmp_path):
    (tmp_path / "x.txt").write_bytes(bytes(range(256)) * (3 * BLOCK // 2 // 256))  # three blocks of uint16
    folder = prepared(Text(files=(str(tmp_path / "x.txt"),)), tmp_path / "cache", prepare=True)
    flip(folder / "00000.tokens", BLOCK + 5)
    stream, out = Shards(folder), np.empty(1000, np.int32)
    stream.read(0, out)
    stream.read(2 * BLOCK // 2, out)
    with pytest.raises(DataError, match=f"bytes {BLOCK} to {2 * BLOCK}"):
        stream.read(BLOCK // 2 - 999, out)


def test_a_disk_that_refuses_leaves_no_half_written_file(source, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="cannot be written"):
        prepared(source, tmp_path / "cache", prepare=True)
    assert not list(tmp_path.glob("cache/*/*"))
