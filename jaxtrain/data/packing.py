"""Windows of the token stream to the five fields of a batch. It reads no file and knows no order."""

from __future__ import annotations

import numpy as np


def pack(windows: np.ndarray, valid: np.ndarray, row: np.ndarray, column: np.ndarray) -> dict[str, np.ndarray]:
    """windows int32 (rows, S + 1), zero behind a row's first `valid`; document starts (row, column >= 1), sorted
    -> the fields of protocols.BATCH_FIELDS (rows, S): targets are the windows moved by one.

    The first token of a document is never a target that counts, its end-of-document token is.
    """
    rows, size = windows.shape[0], windows.shape[1] - 1
    segments, positions = _runs(rows, size, row, column)
    weights = np.ones((rows, size), np.float32)
    weights[row, column - 1] = 0
    for short in np.flatnonzero(valid <= size):
        weights[short, max(valid[short] - 1, 0) :] = 0
        segments[short, valid[short] :] = positions[short, valid[short] :] = 0
    tokens, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
    return {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions, "weights": weights}


def _runs(rows: int, size: int, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the document within its row, from 1, and position within the document; both int32 (rows, size)."""
    inside = column < size
    starts = np.sort(np.concatenate([np.arange(rows) * size, row[inside] * size + column[inside]]))
    lengths = np.diff(starts, append=rows * size)
    of_row = starts // size
    number = np.arange(len(starts)) - np.searchsorted(starts, of_row * size) + 1
    segments = np.repeat(number.astype(np.int32), lengths)
    positions = np.arange(rows * size, dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
    return segments.reshape(rows, size), positions.reshape(rows, size)
