"""Where text comes from and how it becomes ids, as plain values. It reads no file and imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import ClassVar, Literal

from jaxtrain import ranges
from jaxtrain.errors import ConfigError, closest

Split = Literal["train", "heldout"]


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """The 256 byte values, and 256 for the end of a document: takes anything, loses nothing."""

    vocab_size: ClassVar[int] = 257


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A tokenizer.json. Special tokens written out in a text are read as ordinary text."""

    file: str
    end_of_document: str = "<|endoftext|>"  # the special token put after every document
    errors: Literal["strict", "replace"] = "strict"  # text that is not UTF-8: refused, or read with U+FFFD in its place


Tokenizer = Bytes | HuggingFace


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Folders (read whole, hidden files aside), globs ("corpus/**/*.txt") or single files."""

    files: tuple[str, ...]
    exclude: tuple[str, ...] = ()  # patterns of names, relative to the folder or glob, that are left out
    holdout: float = 0.0  # fraction of the documents kept out of "train", by hash: stable when files are added
    split: Split = "train"
    tokenizer: Tokenizer = Bytes()

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if isinstance(self.files, str) or not self.files:
            raise ConfigError(f"{kind}.files = {self.files!r} is no tuple of globs.", fix='files=("corpus/**/*.txt",)')
        if self.split not in ("train", "heldout"):
            raise ConfigError(
                f"{kind}.split = {self.split!r} is unknown.", fix=closest(str(self.split), ("train", "heldout"))
            )
        if not 0 <= self.holdout < 1:
            raise ConfigError(
                f"{kind}.holdout = {self.holdout} is no fraction.", rule="0 <= holdout < 1", fix="holdout=0.01"
            )
        if self.split == "heldout" and not self.holdout:
            raise ConfigError(
                f"{kind}.split = 'heldout' but nothing is held out.",
                got="holdout = 0",
                fix="holdout=0.01 in both splits",
            )

    def heldout(self):
        """The same source's held-out documents."""
        return replace(self, split="heldout")


@dataclass(frozen=True, kw_only=True)
class Text(_Files):
    """A document a file, plain or .gz or .zst. Held-out files are chosen by a hash of the relative file name."""


@dataclass(frozen=True, kw_only=True)
class Jsonl(_Files):
    """A document a line: .jsonl, .ndjson or .json, plain or .gz or .zst. Held-out ones by a hash of the text."""

    field: str = "text"


@dataclass(frozen=True, kw_only=True)
class Parquet(_Files):
    """A document a row of a string or binary column. Held-out ones are chosen by a hash of the text."""

    column: str = "text"


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """Megatron-LM's PREFIX.bin and PREFIX.idx (MMIDIDX version 1, uint16 or int32), read in place."""

    files: tuple[str, ...]  # prefixes, or globs of them
    tokenizer: Tokenizer | None = None  # the one that made the files, where bytes per token or decoded text are wanted

    def __post_init__(self) -> None:
        if isinstance(self.files, str) or not self.files:
            raise ConfigError(
                f"Megatron.files = {self.files!r} is no tuple of prefixes.", fix='files=("data/x_text_document",)'
            )

    @property
    def indices(self) -> tuple[str, ...]:
        """Its .idx files, or globs of them."""
        return tuple(prefix.removesuffix(".idx").removesuffix(".bin") + ".idx" for prefix in self.files)


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Documents of random ids, computed when read. In nats per token no model can beat

    uniform: log(vocab_size) · walk (each id is the last one plus 1 to 4): log(4) · copy (the second half of a document
    repeats the first): log(vocab_size) in the first half and 0 in the second.
    """

    kind: Literal["uniform", "walk", "copy"] = "walk"
    vocab_size: int = 256
    document: int = 256  # tokens in each
    num_documents: int = 1 << 20
    seed: int = 0  # another one for evaluation

    def __post_init__(self) -> None:
        if self.kind not in (kinds := ("uniform", "walk", "copy")):
            raise ConfigError(f"Synthetic.kind = {self.kind!r} is unknown.", fix=closest(str(self.kind), kinds))
        from_two = dict.fromkeys(("vocab_size", "document"), ranges.whole(2))
        ranges.check("Synthetic", self, **from_two, num_documents=ranges.whole(1), seed=ranges.SEED)


Plain = Text | Jsonl | Parquet | Megatron | Synthetic


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources, in proportion to their weights: examples of each, so tokens of each."""

    sources: tuple[Plain, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.weights):
            raise ConfigError(
                "Mixture's sources and weights do not pair up.",
                got=f"{len(self.sources)} sources, {len(self.weights)} weights",
                rule="one weight for each source, at least one source",
            )
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ConfigError(
                f"Mixture.weights = {self.weights} are not all positive.", fix="leave a source of weight 0 out"
            )


Source = Plain | Mixture


def check_disjoint(train: Source, heldout: Source) -> None:
    """Raises ConfigError where `heldout` reads documents that `train` reads too, although it says split="heldout".

    By the patterns alone: a path that is written in two ways, or a link, is not seen through.
    """
    for seen in (part for part in parts(train) if isinstance(part, _Files) and part.split == "train"):
        for unseen in (part for part in parts(heldout) if isinstance(part, _Files) and part.split == "heldout"):
            if _overlap(seen, unseen) and not (_hash_alike(seen, unseen) and seen.holdout >= unseen.holdout):
                raise ConfigError(
                    f"held-out documents of {', '.join(unseen.files)} are trained on.",
                    got=f"{_said(seen)} in training, {_said(unseen)} in evaluation",
                    rule="training reads the same files in the same way, and holds out at least what evaluation reads",
                    fix="eval data = data.heldout(); on the command line --eval.data.holdout and the like beside --data.holdout",
                )


def check_tokenizers(train: Source, heldout: Source) -> None:
    """Raises ConfigError where an id would mean one text in training and another in evaluation."""
    seen, unseen = tokenizers(train), tokenizers(heldout)
    if seen and unseen and seen != unseen:
        raise ConfigError(
            "training and evaluation have different tokenizers.",
            got=f"{_listed(seen)} in training, {_listed(unseen)} in evaluation",
            rule="an id stands for one text",
            fix="eval data = data.heldout(); on the command line --eval.data.tokenizer and the like beside --data.tokenizer",
        )


def tokenizers(source: Source) -> set[Tokenizer]:
    """Those of its parts, without those that hold bare ids."""
    return {part.tokenizer for part in parts(source) if getattr(part, "tokenizer", None)}


def _listed(values: set[Tokenizer]) -> str:
    return ", ".join(sorted(map(repr, values)))


def _said(part: _Files) -> str:
    return f"{type(part).__name__} of {', '.join(part.files)} with holdout = {part.holdout}"


def _hash_alike(one: _Files, other: _Files) -> bool:
    """Whether a document is held out of both or neither, if as much is: Text hashes names relative to all its files."""
    return type(one) is type(other) and (one.files == other.files or not isinstance(one, Text))


def _overlap(one: _Files, other: _Files) -> bool:
    pairs = [(PurePosixPath(a), PurePosixPath(b)) for a in one.files for b in other.files]
    return any(_matches(a.parts, _pattern(b)) or _matches(b.parts, _pattern(a)) for a, b in pairs)


def _pattern(path: PurePosixPath) -> tuple[str, ...]:
    """A glob's parts; what is none may be a folder, which is read whole."""
    return path.parts if set(str(path)) & set("*?[") else (*path.parts, "**")


def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def check_vocab(source: Source, vocab_size: int, read: int = 0) -> None:
    """Raises ConfigError where the source has ids that a model of this vocab_size lacks.

    `read`: the number of ids of a tokenizer's file, where it was read.
    """
    needed = max(read, *(_num_ids(part) for part in parts(source)))
    if needed > vocab_size:
        raise ConfigError(
            f"the model's vocab_size = {vocab_size} is smaller than the data's.",
            got=f"the data has ids up to {needed - 1}",
            rule="every id has a row in the embedding",
            fix=f"vocab_size = {-(-needed // 128) * 128} ({needed} rounded up to a multiple of 128)",
        )


def _num_ids(part: Plain) -> int:
    """0 where only a file says how many."""
    if isinstance(part, Synthetic):
        return part.vocab_size
    return part.tokenizer.vocab_size if isinstance(part.tokenizer, Bytes) else 0


def parts(source: Source) -> tuple[Plain, ...]:
    """The sources of a mixture; of any other source itself."""
    return source.sources if isinstance(source, Mixture) else (source,)
