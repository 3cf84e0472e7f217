"""Text to batches: sources, tokenizers, shards, order, packing, loading. It places no array and knows no model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxtrain.data.source import Bytes, HuggingFace, Jsonl, Megatron, Mixture, Parquet, Source, Synthetic, Text

if TYPE_CHECKING:
    from jaxtrain.data.dataset import Dataset, open_dataset, tokenizer_of
    from jaxtrain.data.loader import Loader
    from jaxtrain.data.prepare import prepared

_LATER = {
    "Dataset": "dataset", "Loader": "loader", "open_dataset": "dataset", "prepared": "prepare",
    "tokenizer_of": "dataset",
}  # fmt: skip

__all__ = [
    "Bytes", "HuggingFace", "Jsonl", "Megatron", "Mixture", "Parquet", "Source", "Synthetic", "Text", *_LATER,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """PEP 562: what needs numpy, tokenizers or jax is imported when first used."""
    if name in _LATER:
        return getattr(importlib.import_module(f"jaxtrain.data.{_LATER[name]}"), name)
    raise AttributeError(f"module 'jaxtrain.data' has no attribute {name!r}")
