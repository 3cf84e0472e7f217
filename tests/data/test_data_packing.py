"""Packing against a loop that reads one token after another."""

import numpy as np
import pytest

from jaxtrain.data.packing import pack
from jaxtrain.protocols import BATCH_FIELDS

END = 99


def documents(seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(0, END, rng.integers(0, 12)).tolist(), END] for _ in range(count)]


def one_by_one(docs: list[list[int]], begin: int, size: int) -> dict[str, list]:
    """The window's fields by the definition in protocols.py."""
    stream = [(token, number) for number, doc in enumerate(docs) for token in doc]
    fields = {name: [] for name in BATCH_FIELDS}
    segment, position, previous = 0, 0, None
    for at in range(begin, begin + size):
        token, doc = stream[at] if at < len(stream) else (0, None)
        following = stream[at + 1] if at + 1 < len(stream) else (0, None)
        if doc is None:
            segment_here, position = 0, 0
        elif doc != previous:
            segment, position = segment + 1, 0
            segment_here = segment
        counts = doc is not None and following[1] == doc
        row = (token, following[0], segment_here, position, float(counts))
        for name, value in zip(BATCH_FIELDS, row, strict=True):
            fields[name].append(value)
        previous, position = doc, position + 1
    return fields


def vectorised(docs: list[list[int]], begins: list[int], size: int) -> dict[str, np.ndarray]:
    stream = np.concatenate(docs).astype(np.int32)
    starts = np.cumsum([0, *map(len, docs)])[:-1]
    windows = np.zeros((len(begins), size + 1), np.int32)
    valid = np.zeros(len(begins), np.int64)
    row, column = [], []
    for i, begin in enumerate(begins):
        part = stream[begin : begin + size + 1]
        windows[i, : len(part)], valid[i] = part, len(part)
        inside = starts[(starts > begin) & (starts < begin + len(part))] - begin
        row, column = [*row, *[i] * len(inside)], [*column, *inside.tolist()]
    return pack(windows, valid, np.array(row, np.int64), np.array(column, np.int64))


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize("seed", range(5))
def test_fields_are_those_of_a_loop_over_tokens(seed, size):
    docs = documents(seed, 30)
    total = sum(map(len, docs))
    begins = [*range(0, total - 1, size)]
    packed = vectorised(docs, begins, size)
    for i, begin in enumerate(begins):
        expected = one_by_one(docs, begin, size)
        for name in BATCH_FIELDS:
            assert packed[name][i].tolist() == expected[name], (name, begin)


def test_the_end_of_a_document_is_predicted_and_the_next_ones_first_token_is_not():
    packed = vectorised([[1, 2, END], [3, 4, END]], [0], 5)
    assert packed["targets"].tolist() == [[2, END, 3, 4, END]]
    assert packed["weights"].tolist() == [[1, 1, 0, 1, 1]]
    assert packed["segments"].tolist() == [[1, 1, 1, 2, 2]]
    assert packed["positions"].tolist() == [[0, 1, 2, 0, 1]]


def test_windows_count_every_token_once_except_each_documents_first():
    docs = documents(7, 50)
    total, size = sum(map(len, docs)), 8
    packed = vectorised(docs, [*range(0, total - 1, size)], size)
    assert packed["weights"].sum() == total - len(docs)


def test_fields_have_the_protocols_types():
    packed = vectorised(documents(0, 9), [0, 4], 4)
    assert list(packed) == list(BATCH_FIELDS)
    kinds = {name: packed[name].dtype for name in packed}
    assert kinds.pop("weights") == np.float32
    assert set(kinds.values()) == {np.dtype(np.int32)}
    assert all(packed[name].flags.c_contiguous and packed[name].shape == (2, 4) for name in packed)


def test_an_empty_row_is_padding():
    packed = pack(np.zeros((1, 5), np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert not any(values.any() for values in packed.values())
