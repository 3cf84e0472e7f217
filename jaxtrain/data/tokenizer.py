"""Tokenizers at work: text to ids and back, bytes per token, and training a byte-level BPE. It knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxtrain.data.shards import atomic
from jaxtrain.data.source import Bytes, HuggingFace
from jaxtrain.errors import ConfigError, DataError, closest

# A longer text is encoded in parts that end at a line's end: one encoding takes ~100 bytes of memory per token. Its ids
# are those of the whole but at the cuts: a token that would span one is two (none in GPT-2's or Llama 3's patterns,
# where the next line begins with a word), and what a tokenizer puts before every text, as Metaspace "▁", is there too.
LONGEST_TEXT = 1 << 20
TOGETHER = 4 << 20  # characters that one call encodes, each part on a core: their encodings take some 150 MB
# GPT-4's pattern (tiktoken, cl100k_base), with digits in groups of at most three.
WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class OpenTokenizer(Protocol):
    vocab_size: int
    end: int  # of a document
    key: str  # two tokenizers with one key make the same ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of document."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""

    def encode_documents(self, texts: Sequence[bytes]) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the document, ids), in order; a long document's ids come in several. Raises UndecodableText."""

    def token_bytes(self) -> np.ndarray | None:
        """int32 per id: the UTF-8 bytes that it stands for, 0 for special tokens; None where ids do not tell."""


class UndecodableText(Exception):
    """Document `index` of those given is not UTF-8 at byte `offset`."""

    def __init__(self, index: int, offset: int):
        super().__init__(index, offset)
        self.index, self.offset = index, offset


def open_tokenizer(value: Bytes | HuggingFace) -> OpenTokenizer:
    """Raises ConfigError for a file that is missing, damaged, or without the end-of-document token."""
    return ByteTokenizer() if isinstance(value, Bytes) else BpeTokenizer(value)


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a document."""

    vocab_size = Bytes.vocab_size
    end = 256
    key = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def encode_documents(self, texts: Sequence[bytes]) -> Iterator[tuple[int, np.ndarray]]:
        return ((i, np.frombuffer(text, np.uint8)) for i, text in enumerate(texts))

    def token_bytes(self) -> np.ndarray:
        return np.r_[np.ones(256, np.int32), np.int32(0)]


class BpeTokenizer:
    """A tokenizer.json through the `tokenizers` library."""

    def __init__(self, value: HuggingFace):
        content = _read(value.file)
        self._tokenizer = _parse(value.file, content)
        self._errors = value.errors
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.end = _special(self._tokenizer, value)
        self.key = hashlib.blake2b(
            content + repr(value.end_of_document + value.errors).encode(), digest_size=16
        ).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode_documents(self, texts: Sequence[bytes]) -> Iterator[tuple[int, np.ndarray]]:
        parts = ((i, part) for i, text in enumerate(texts) for part in _parts(self._decoded(i, text)))
        for group in _groups(parts):
            yield from self._encoded(group)

    def _encoded(self, group: list[tuple[int, str]]) -> list[tuple[int, np.ndarray]]:
        """What is much larger than its ids, and lives only here, are the library's encodings."""
        encodings = self._tokenizer.encode_batch_fast([part for _, part in group], add_special_tokens=False)
        return [(i, np.array(e.ids, np.uint32)) for (i, _), e in zip(group, encodings, strict=True)]

    def _decoded(self, index: int, text: bytes) -> str:
        try:
            return text.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            raise UndecodableText(index, error.start) from None

    def token_bytes(self) -> np.ndarray | None:
        import json

        kinds = set(_kinds(json.loads(self._tokenizer.to_str())["decoder"]))
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            return None
        added = {i: token for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(token.encode())
            else:
                sizes[i] = len(token) if "ByteLevel" in kinds else _sentencepiece_bytes(token)
        return sizes


def _parts(text: str) -> Iterator[str]:
    """The text in parts of LONGEST_TEXT at most; one where it is empty."""
    start = 0
    while len(text) - start > LONGEST_TEXT:
        cut = text.rfind("\n", start, start + LONGEST_TEXT) + 1 or start + LONGEST_TEXT
        yield text[start:cut]
        start = cut
    yield text[start:]


def _groups(parts: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Parts in a row, as many as hold TOGETHER characters at most."""
    group: list[tuple[int, str]] = []
    size = 0
    for index, part in parts:
        if group and size + len(part) > TOGETHER:
            yield group
            group, size = [], 0
        group.append((index, part))
        size += len(part)
    if group:
        yield group


def _sentencepiece_bytes(token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace("\u2581", " ").encode())


def _kinds(decoder: dict | None) -> Iterator[str]:
    if decoder:
        yield decoder["type"]
        for below in decoder.get("decoders", ()):
            yield from _kinds(below)


def _read(file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"tokenizer {file!r} cannot be read.",
            got=f"{error.strerror}",
            fix="a path to a tokenizer.json, or make one from the config's data: jaxtrain data train-tokenizer CONFIG",
        ) from error


def _parse(file: str, content: bytes) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception and ValueError
        raise ConfigError(f"{file} is not a tokenizer.json.", got=f"{error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _special(tokenizer: Any, value: HuggingFace) -> int:
    specials = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    if value.end_of_document not in specials:
        raise ConfigError(
            f"{value.file} has no special token {value.end_of_document!r}.",
            rule="`end_of_document` names the special token that ends a document",
            fix=closest(value.end_of_document, specials),
        )
    return specials[value.end_of_document]


def train_bpe(texts: Iterable[str], value: HuggingFace, vocab_size: int) -> None:
    """Trains a byte-level BPE on the texts and writes it to `value.file`.

    Raises ConfigError where the file exists or the vocabulary cannot hold the bytes, DataError for too little text,
    RunError where the disk refuses, before the training.
    """
    path = Path(value.file).expanduser()
    if path.exists():
        raise ConfigError(
            f"{value.file} exists.", rule="a tokenizer is not replaced under data made with it", fix="remove it"
        )
    if vocab_size < 257:
        raise ConfigError(
            f"vocab_size = {vocab_size} is too small.", rule="256 bytes and one special token at the least"
        )
    with atomic(path) as file:
        file.write(_trained(texts, value, vocab_size).encode())


def _trained(texts: Iterable[str], value: HuggingFace, vocab_size: int) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[value.end_of_document],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text is too small for {vocab_size} tokens.",
            got=f"{tokenizer.get_vocab_size()} tokens before no pair was left to merge",
            fix=f"vocab_size = {tokenizer.get_vocab_size()} or less, or more text",
        )
    return tokenizer.to_str(pretty=True)
