"""A source as a Dataset: the batch of any step, read at random. It keeps no position and places nothing on devices."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxtrain.data import reading
from jaxtrain.data.order import Sequential, Shuffled, Without
from jaxtrain.data.packing import pack
from jaxtrain.data.prepare import prepared
from jaxtrain.data.quarantine import Put, Record
from jaxtrain.data.reading import Document
from jaxtrain.data.shards import Shards
from jaxtrain.data.source import Megatron, Mixture, Plain, Source, Synthetic, check_vocab, parts, tokenizers
from jaxtrain.data.stream import MegatronStream, Stream, SyntheticStream
from jaxtrain.data.tokenizer import OpenTokenizer, open_tokenizer
from jaxtrain.errors import ConfigError, DataError

_IDS_ALONE = (Megatron, Synthetic)  # sources without text


def open_dataset(
    source: Source,
    *,
    seq_len: int,
    batch: int,
    seed: int,
    vocab_size: int,
    cache_dir: str | Path,
    shuffle: bool = True,
    prepare: bool = True,
    moved: Callable[[], None] = lambda: None,
) -> Dataset:
    """The source as a Dataset, tokenised first where that has not been done: by another process with prepare=False.

    shuffle=False reads every example once, in the order of the files. `moved` is as in `prepared`. Raises ConfigError
    where the tokenizer makes ids that the model lacks, DataError for data that is missing, damaged or too short.
    """
    tokenizer = tokenizer_of(source, vocab_size)
    streams = [_open(part, cache_dir, prepare, moved) for part in parts(source)]
    for part, stream in zip(parts(source), streams, strict=True):
        _check_length(part, stream, seq_len if shuffle else 1)
    return Dataset(
        source, streams, tokenizer, seq_len=seq_len, batch=batch, seed=seed, vocab_size=vocab_size, shuffle=shuffle
    )


def tokenizer_of(source: Source, vocab_size: int | None = None) -> OpenTokenizer | None:
    """The one tokenizer of a source, None where it holds bare ids. Raises ConfigError for several, or too few ids."""
    values = tokenizers(source)
    if len(values) > 1:
        raise ConfigError(
            "the sources of a mixture have different tokenizers.", got=", ".join(sorted(map(repr, values)))
        )
    tokenizer = open_tokenizer(values.pop()) if values else None
    if vocab_size is not None:
        check_vocab(source, vocab_size, tokenizer.vocab_size if tokenizer else 0)
    return tokenizer


def _open(part: Plain, cache_dir: str | Path, prepare: bool, moved: Callable[[], None]) -> Stream:
    if isinstance(part, Synthetic):
        return SyntheticStream(part)
    if isinstance(part, Megatron):
        return MegatronStream(part)
    return Shards(prepared(part, cache_dir, prepare=prepare, moved=moved))


def _check_length(part: Plain, stream: Stream, seq_len: int) -> None:
    if stream.num_tokens <= seq_len:
        raise DataError(
            "the corpus is shorter than one example.",
            got=f"{stream.num_tokens} tokens in {getattr(part, 'files', part)}",
            rule=f"an example is seq_len + 1 = {seq_len + 1} tokens",
            fix="more text, or a smaller seq_len",
        )


class Dataset:
    """Examples of seq_len + 1 tokens over the sources' streams: example i begins at token i x seq_len.

    Every read is a pure function of (seed, step, row): any process may read any rows of any step.
    """

    def __init__(
        self,
        source: Source,
        streams: list[Stream],
        tokenizer: OpenTokenizer | None,
        *,
        seq_len: int,
        batch: int,
        seed: int,
        vocab_size: int,
        shuffle: bool,
    ):
        self.source, self.tokenizer, self.seq_len, self.batch = source, tokenizer, seq_len, batch
        self._streams, self._vocab_size, self._shuffle = streams, vocab_size, shuffle
        # The last, shorter example is dropped in training and padded in evaluation.
        sizes = [(s.num_tokens - 1 + (0 if shuffle else seq_len - 1)) // seq_len for s in streams]
        weights = source.weights if isinstance(source, Mixture) else (1.0,)
        self._order = self._whole_order = Shuffled(sizes, weights, seed) if shuffle else Sequential(sizes)
        self._sizes = sizes

    def without(self, record: Record) -> Dataset:
        """The same batches, but for the examples that the events of this record put aside: others stand in for them.

        Events of other data (by `fingerprint`) do not count. Called on what it returned, the new record takes over.
        """
        assert self._shuffle, "only what is trained on is put aside"
        aside: dict[tuple[int, int], int] = {}
        for event in (event for event in record if event.data == self.fingerprint):
            for put in event.examples:
                key = put.source, put.example
                aside[key] = min(event.position, aside.get(key, event.position))
        other = copy.copy(self)
        other._order = Without(self._whole_order, self._sizes, self.batch, aside) if aside else self._whole_order
        return other

    @property
    def num_examples(self) -> int:
        return sum(self._sizes)

    @property
    def num_steps(self) -> int:
        """Batches that hold every example once, the last one filled up."""
        return -(-self.num_examples // self.batch)

    @property
    def token_bytes(self) -> np.ndarray | None:
        """int32 (vocab_size,): the UTF-8 bytes that each id stands for; 0 for special tokens and for ids not in use."""
        sizes = self.tokenizer.token_bytes() if self.tokenizer else None
        return None if sizes is None else np.pad(sizes, (0, self._vocab_size - len(sizes)))

    def rows(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """These rows of the step's global batch: protocols.BATCH_FIELDS, each (len(rows), seq_len).

        Without shuffling, rows behind the last example are padding of weight 0. Raises DataError for damaged data.
        """
        part, example = self._order.locate(step * self.batch + np.asarray(rows, np.int64))
        windows = np.zeros((len(rows), self.seq_len + 1), np.int32)
        valid = np.zeros(len(rows), np.int64)
        starts = [self._read(p, np.flatnonzero(part == p), example, windows, valid) for p in range(len(self._streams))]
        row, column = (np.concatenate(both) for both in zip(*starts, strict=True))
        if windows.size and windows.view(np.uint32).max() >= self._vocab_size:
            raise self._foreign_id(step, rows, windows)
        return pack(windows, valid, row, column)

    def _read(
        self, p: int, rows: np.ndarray, example: np.ndarray, windows: np.ndarray, valid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fills the rows that source `p` provides; -> (row, column) of the documents that begin within them."""
        stream = self._streams[p]
        begins = example[rows] * self.seq_len
        valid[rows] = np.minimum(stream.num_tokens - begins, self.seq_len + 1)
        for row, begin, count in zip(rows.tolist(), begins.tolist(), valid[rows].tolist(), strict=True):
            stream.read(begin, windows[row, :count])
        first, last = stream.document_at(begins), stream.document_at(begins + valid[rows] - 1)
        counts = last - first
        ends = np.cumsum(counts)
        documents = np.arange(counts.sum()) + np.repeat(first + 1 - (ends - counts), counts)
        return np.repeat(rows, counts), stream.start_of(documents) - np.repeat(begins, counts)

    def _foreign_id(self, step: int, rows: np.ndarray, windows: np.ndarray) -> DataError:
        bad = int(np.argmax((windows.view(np.uint32) >= self._vocab_size).any(axis=1)))
        return DataError(
            f"example {self._names(step, np.asarray(rows)[[bad]])[0]} holds an id that the model does not have.",
            got=f"id {windows.view(np.uint32)[bad].max()}, vocab_size = {self._vocab_size}",
            rule="0 <= id < vocab_size",
            fix="the tokenizer's vocab_size in the model's config, or other data",
        )

    def ids(self, step: int) -> list[str]:
        """The examples of a step by row: the document that each begins in and the token within it, "a/b.txt+512"."""
        return self._names(step, np.arange(self.batch))

    def examples(self, step: int) -> list[Put]:
        """The examples of a step by row, as they are put aside. Batches count from 0, a run's steps from 1."""
        located = self._order.locate(step * self.batch + np.arange(self.batch))
        rows = zip(self.ids(step), *(x.tolist() for x in located), strict=True)
        return [Put(step=step + 1, row=row, id=name, source=p, example=e) for row, (name, p, e) in enumerate(rows)]

    def _names(self, step: int, rows: np.ndarray) -> list[str]:
        located = self._order.locate(step * self.batch + rows.astype(np.int64))
        return [self._name(int(p), int(e)) for p, e in zip(*located, strict=True)]

    def _name(self, p: int, example: int) -> str:
        if p < 0:
            return "padding"
        stream, begin = self._streams[p], example * self.seq_len
        document = stream.document_at(np.array([begin]))
        name = f"{stream.document_name(int(document[0]))}+{begin - int(stream.start_of(document)[0])}"
        return f"{p}:{name}" if len(self._streams) > 1 else name

    def position(self, step: int) -> dict:
        """Where training stands before `step`, for a checkpoint's manifest: examples seen and epochs of each source.

        With the `fingerprint` a resume on other data can be noticed.
        """
        seen = self._order.seen(step * self.batch)
        return {
            "step": step,
            "examples": step * self.batch,
            "seen": seen,
            "epochs": [count / size for count, size in zip(seen, self._sizes, strict=True)],
            "fingerprint": self.fingerprint,
        }

    @property
    def fingerprint(self) -> str:
        """Equal for equal data, tokenizer and length."""
        content = repr(([s.key for s in self._streams], self.seq_len, self._shuffle))
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def has_text(self) -> bool:
        """Whether `documents` can be read."""
        return not any(isinstance(part, _IDS_ALONE) for part in parts(self.source))

    def documents(self) -> Iterator[bytes]:
        """The raw bytes of the split's documents, in order, as the files hold them. Raises DataError without text."""
        for part in parts(self.source):
            yield from (document.text for document in source_documents(part))


def source_documents(part: Plain) -> Iterator[Document]:
    """One source's documents. Raises DataError where the source holds ids and no text."""
    if isinstance(part, _IDS_ALONE):
        raise DataError(
            f"{type(part).__name__} holds ids and no text.", rule="documents() reads Text, Jsonl or Parquet"
        )
    for pieces in reading.shards(part):
        for piece in pieces:
            yield from reading.documents(part, piece)
