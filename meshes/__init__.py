"""Where things live on devices: named meshes, rules from letters to axes, placement. Importing it imports no jax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from meshes.axes import AXES, LETTERS, NAMELESS
from meshes.errors import LayoutError, UserError, closest
from meshes.mesh import MeshConfig, describe, make, product
from meshes.rules import (
    DEFAULT,
    DP,
    FSDP,
    FSDP_TP,
    HSDP,
    PRESETS,
    TP,
    TP_SP,
    ZERO1,
    ZERO2,
    Capacity,
    Gathered,
    GPipe,
    Interleaved,
    OneFOneB,
    Ragged,
    Ring,
    Rules,
    Ulysses,
    ZeroBubble,
)

if TYPE_CHECKING:
    from meshes.place import (
        Layout,
        axis_size,
        check,
        constrain,
        current,
        globalize,
        local_rows,
        per_device,
        platform,
        sharding,
        shardings,
        spec,
        store,
        use,
    )

_PLACE = (
    "Layout", "axis_size", "check", "constrain", "current", "globalize", "local_rows", "per_device", "platform",
    "sharding", "shardings", "spec", "store", "use",
)  # fmt: skip

__all__ = [
    "AXES", "Capacity", "DEFAULT", "DP", "FSDP", "FSDP_TP", "GPipe", "Gathered", "HSDP", "Interleaved", "LETTERS", "LayoutError",
    "MeshConfig", "NAMELESS", "OneFOneB", "PRESETS", "Ragged", "Ring", "Rules", "TP", "TP_SP", "Ulysses", "UserError", "ZERO1", "ZERO2", "ZeroBubble", "closest",
    "describe", "make", "product", *_PLACE,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """PEP 562: `place` imports jax, so its names are looked up when first used."""
    if name in _PLACE:
        return getattr(importlib.import_module("meshes.place"), name)
    raise AttributeError(f"module 'meshes' has no attribute {name!r}")
