"""A small corpus on disk, in words so that a BPE has something to learn."""

from pathlib import Path

import numpy as np
import pytest

from jaxtrain.data.source import HuggingFace
from jaxtrain.data.tokenizer import train_bpe

WORDS = ["the", "cat", "sat", "on", "a", "mat;", "größer", "数据", "is\n", "", "not", "42", "'quoted'", "data\t"]


def text(seed: int, words: int) -> bytes:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words)).encode()


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, bytes]:
    """Forty files below tmp_path/"corpus", by relative name."""
    texts = {f"{'abc'[i % 3]}/{i:02}.txt": text(i, 20 + 13 * i) for i in range(40)}
    for name, content in texts.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return texts


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    """A byte-level BPE of 300 tokens."""
    value = HuggingFace(file=str(tmp_path_factory.mktemp("bpe") / "tokenizer.json"))
    train_bpe((text(seed, 500).decode() for seed in range(20)), value, vocab_size=300)
    return value
