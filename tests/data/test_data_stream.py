"""Streams read in place: Megatron files written by another writer, and synthetic ids with a known entropy."""

import math
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.data.source import Megatron, Synthetic
from jaxtrain.data.stream import MegatronStream, SyntheticStream
from jaxtrain.errors import ConfigError, DataError

DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [], [[7, 8, 9, 10]]]  # of sequences of ids


def write_megatron(prefix: Path, documents: list, code: int) -> None:
    """By the layout of Megatron-LM's indexed_dataset.py, a field at a time."""
    letter = {8: "H", 4: "i"}[code]
    sequences = [s for d in documents for s in d]
    pointers, firsts = [], [0]
    with open(f"{prefix}.bin", "wb") as binary:
        for sequence in sequences:
            pointers.append(binary.tell())
            binary.write(struct.pack(f"<{len(sequence)}{letter}", *sequence))
    for document in documents:
        firsts.append(firsts[-1] + len(document))
    with open(f"{prefix}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts)))
        index.write(struct.pack(f"<{len(sequences)}i", *map(len, sequences)))
        index.write(struct.pack(f"<{len(pointers)}q", *pointers))
        index.write(struct.pack(f"<{len(firsts)}q", *firsts))


def read(stream, start: int, count: int) -> list[int]:
    out = np.empty(count, np.int32)
    stream.read(start, out)
    return out.tolist()


@pytest.mark.parametrize("code", [8, 4])
def test_megatron_files_are_read_in_place_with_their_documents(tmp_path, code):
    write_megatron(tmp_path / "a", DOCUMENTS, code)
    write_megatron(tmp_path / "b", DOCUMENTS[::-1], code)
    stream = MegatronStream(Megatron(files=(str(tmp_path / "?"),)))
    flat = [i for documents in (DOCUMENTS, DOCUMENTS[::-1]) for d in documents for s in d for i in s]
    assert stream.num_tokens == 20
    for start in range(20):
        assert read(stream, start, 20 - start) == flat[start:]
    owners = [0] * 4 + [1] * 2 + [2] * 4 + [3] * 4 + [4] * 2 + [5] * 4
    assert stream.document_at(np.arange(20)).tolist() == owners
    assert stream.start_of(np.arange(6)).tolist() == [0, 4, 6, 10, 14, 16]
    assert [stream.document_name(i) for i in range(6)] == ["a#0", "a#1", "a#2", "b#0", "b#1", "b#2"]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_prefix_may_be_written_with_either_ending(tmp_path, suffix):
    write_megatron(tmp_path / "a", DOCUMENTS, 8)
    assert MegatronStream(Megatron(files=(f"{tmp_path}/a{suffix}",))).num_tokens == 10


def rewrite(path: Path, edit) -> None:
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("a.idx", lambda raw: b"TNTIDX\x00\x00\x00" + raw[9:], "no Megatron index"),
        ("a.idx", lambda raw: b"", "no Megatron index"),
        ("a.idx", lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:], "version 2"),
        ("a.idx", lambda raw: raw[:17] + b"\x06" + raw[18:], "dtype 6"),
        ("a.idx", lambda raw: raw[:-4], "cut short"),
        ("a.idx", lambda raw: raw[:18] + b"\xff" * 8 + raw[26:], "cut short"),
        ("a.idx", lambda raw: raw[:34] + struct.pack("<i", 2) + raw[38:], "gaps"),
        ("a.idx", lambda raw: raw[:-8] + struct.pack("<q", 99), "damaged"),
        ("a.idx", lambda raw: raw[:-40] + struct.pack("<q", -1) + raw[-32:], "damaged"),
        ("a.bin", lambda raw: raw[:-2], "does not fit its index"),
        ("a.bin", lambda raw: raw + b"xx", "does not fit its index"),
        ("a.bin", None, "is missing"),
    ],
)
def test_megatron_files_that_do_not_fit_are_refused(tmp_path, file, edit, said):
    write_megatron(tmp_path / "a", DOCUMENTS, 8)
    (tmp_path / file).unlink() if edit is None else rewrite(tmp_path / file, edit)
    with pytest.raises(DataError, match=said):
        MegatronStream(Megatron(files=(f"{tmp_path}/a",)))


@pytest.mark.parametrize("file", ["a.idx", "a.bin"])
def test_files_that_were_written_again_are_another_corpus(tmp_path, file):
    write_megatron(tmp_path / "a", DOCUMENTS, 8)
    key = lambda: MegatronStream(Megatron(files=(f"{tmp_path}/a",))).key  # noqa: E731
    before = key()
    assert key() == before
    os.utime(tmp_path / file, ns=(1, 1))
    assert key() != before


def test_opening_makes_no_python_object_for_each_sequence(tmp_path):
    sequences = 50_000
    write_megatron(tmp_path / "a", [[[7]] * sequences], 8)
    tracemalloc.start()
    try:
        MegatronStream(Megatron(files=(f"{tmp_path}/a",)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The index has 12 bytes of each, its begins and what they are compared with 8 each; an object has 32 and its place 8.
    assert peak < 40 * sequences


def test_a_missing_prefix_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        MegatronStream(Megatron(files=(f"{tmp_path}/a",)))
    with pytest.raises(ConfigError):
        Megatron(files="a")


def synthetic(**fields) -> tuple[SyntheticStream, np.ndarray]:
    source = Synthetic(num_documents=200, **fields)
    stream = SyntheticStream(source)
    return stream, np.array(read(stream, 0, stream.num_tokens)).reshape(200, source.document)


@pytest.mark.parametrize("kind", ["uniform", "walk", "copy"])
def test_synthetic_ids_are_the_same_wherever_reading_begins(kind):
    stream, documents = synthetic(kind=kind, vocab_size=11, document=13)
    flat = documents.reshape(-1).tolist()
    for start, count in ((0, 1), (12, 2), (13, 13), (5, 100), (2599, 1)):
        assert read(stream, start, count) == flat[start : start + count]
    assert set(flat) == set(range(11))
    assert not np.array_equal(documents, synthetic(kind=kind, vocab_size=11, document=13, seed=1)[1])


def test_walks_step_by_one_to_four_with_equal_chances():
    _, documents = synthetic(kind="walk", vocab_size=50, document=64)
    steps = np.diff(documents, axis=1) % 50
    shares = np.bincount(steps.reshape(-1), minlength=50) / steps.size
    # 12,600 steps: a share of 1/4 has deviation 0.004
    assert abs(shares[1:5] - 0.25).max() < 0.02 and shares[1:5].sum() == pytest.approx(1)
    assert -(shares[1:5] * np.log(shares[1:5])).sum() == pytest.approx(math.log(4), abs=1e-3)


@pytest.mark.parametrize("length", [12, 13])
def test_the_second_half_of_a_copy_repeats_the_first(length):
    _, documents = synthetic(kind="copy", vocab_size=1000, document=length)
    half = length - length // 2
    assert np.array_equal(documents[:, half:], documents[:, : length - half])
    assert len(np.unique(documents[:, :half])) > 600


def test_synthetic_documents_begin_at_multiples_of_their_length():
    stream, _ = synthetic(document=7)
    assert stream.document_at(np.array([0, 6, 7, 20])).tolist() == [0, 0, 1, 2]
    assert stream.start_of(np.array([0, 3])).tolist() == [0, 21]
    assert stream.document_name(3) == "walk#3"
