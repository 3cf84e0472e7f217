"""What a run says when it is over, as values: its loss beside baselines that need no model, and samples of its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from jaxtrain import ranges
from jaxtrain.errors import ConfigError


class Finished(Protocol):
    """What an ending reads of a finished run."""

    blueprint: Any
    params: Any
    data: Any  # the training Dataset
    eval_data: Any  # the held-out Dataset, or None
    evaluation: dict[str, float]  # the last evaluation's metrics, and the bytes that it read as "eval/bytes"


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Held-out bits per byte beside gzip -9 and the unigram entropy of the same bytes.

    An evaluation reads the first documents, and of each no first token, which nothing predicts: so these bytes begin a few
    bytes earlier and end as much earlier.
    """

    def lines(self, run: Finished) -> list[str]:
        if run.eval_data is None or "eval/bits_per_byte" not in run.evaluation:
            return []
        if not run.eval_data.has_text:
            return [f"held-out bits per byte: {run.evaluation['eval/bits_per_byte']:.3f}; beside nothing, the data has no text"]
        raw = _raw(run.eval_data, int(run.evaluation["eval/bytes"]))
        return [
            f"held-out bits per byte, {len(raw):,} bytes:",
            f"  this model  {run.evaluation['eval/bits_per_byte']:.3f}",
            f"  gzip -9     {gzip_bits_per_byte(raw):.3f}",
            f"  unigram     {unigram_bits_per_byte(raw):.3f}",
        ]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text that the model writes after each prompt; after "" that of a new document."""

    prompts: tuple[str, ...]
    tokens: int = 128
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts:
            raise ConfigError(f"Sample.prompts = {self.prompts!r} is no tuple of texts.", fix='prompts=("",)')
        ranges.check("Sample", self, tokens=ranges.whole(1), temperature=ranges.FROM_ZERO)

    def lines(self, run: Finished) -> list[str]:
        from jaxtrain.generate import generate

        tokenizer = run.data.tokenizer
        if tokenizer is None:
            return ["sample: none, the data has no tokenizer"]
        ids = [tokenizer.encode(prompt) or [tokenizer.end] for prompt in self.prompts]
        texts = generate(run.blueprint, run.params, ids, self.tokens, self.temperature)
        rows = [tokenizer.decode(text).splitlines() for text in texts]
        return [line for row in rows for line in ("sample:", *(f"  | {text}" for text in row))]


Ending = Baselines | Sample


def gzip_bits_per_byte(raw: bytes) -> float:
    """Bits per byte of gzip at its highest level."""
    import gzip

    return 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)


def unigram_bits_per_byte(raw: bytes) -> float:
    """The entropy of the bytes' own frequencies: what a model of single bytes cannot beat on this text."""
    import numpy as np

    share = np.bincount(np.frombuffer(raw, np.uint8), minlength=256) / len(raw)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def _raw(data: Any, num_bytes: int) -> bytes:
    parts, size = [], 0
    for document in data.documents():
        parts.append(document)
        size += len(document)
        if size >= num_bytes:
            break
    return b"".join(parts)[:num_bytes]
