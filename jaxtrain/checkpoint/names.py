"""Names of a tree's leaves, "params/blocks/q", and back to trees. It looks at no array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtrain.errors import CheckpointError


def named(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Every leaf by its path: keys, indices and field names joined by "/"; no class names, so a renamed class is harmless.

    Raises CheckpointError where two leaves would share a name, or where a leaf would have none.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    parents = {name[:end] for name in leaves for end in range(len(name)) if name[end] == "/"}
    clash = sorted({*leaves} & {*parents, ""})
    if clash or len(leaves) < len(pairs):
        raise CheckpointError(
            "the state's leaves cannot be told apart by name.",
            got=f"{len(pairs)} leaves, {len(leaves)} names, clashing: {clash}",
            rule="a leaf's name is its path joined by '/', and names one leaf",
            fix="no '/' in keys, and a dict around a bare array",
        )
    return leaves


def renamed(tree: Any, values: Mapping[str, Any]) -> Any:
    """`tree` with each leaf replaced by the value of its name."""
    return jax.tree.unflatten(jax.tree.structure(tree), [values[name] for name in named(tree)])


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"params/blocks/q": x} -> {"params": {"blocks": {"q": x}}}."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree
