"""Checkpoints that verify themselves: saved asynchronously, named by step, restored onto any mesh. It trains nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxtrain.checkpoint.policy import CheckpointConfig

if TYPE_CHECKING:
    from jaxtrain.checkpoint.hashing import digest
    from jaxtrain.checkpoint.load import restore
    from jaxtrain.checkpoint.manifest import Manifest
    from jaxtrain.checkpoint.save import Checkpoints

_HOMES = {"Checkpoints": "save", "Manifest": "manifest", "digest": "hashing", "restore": "load"}

__all__ = ["CheckpointConfig", *_HOMES]


def __getattr__(name: str) -> Any:
    """PEP 562: all but the policy import jax or orbax, so they are looked up when first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxtrain.checkpoint.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'jaxtrain.checkpoint' has no attribute {name!r}")
