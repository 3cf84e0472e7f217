"""What a run chose for its mesh axes, in words: a line for each axis that does more than cut the batch and what is stored.

It chooses nothing: the rules and `replicas` say. A pipeline has its own line (train/pipeline.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import jax

from jaxtrain.train.diloco import AXIS
from jaxtrain.train.state import Blueprint
from meshes import Capacity
from meshes.rules import axes_of

WIDTHS = "FNKV"  # of a layer


def chosen(blueprint: Blueprint) -> Iterator[str]:
    """A line for each axis of several devices: its name, its size, and what it was given to do."""
    for axis, size in blueprint.mesh.shape.items():
        found = [words for say in SAID if size > 1 and (words := say(blueprint, axis))]
        if found:
            yield f"{axis} {size}: {'; '.join(found)}"


def _replicas(blueprint: Blueprint, axis: str) -> str:
    return str(blueprint.config.replicas) if axis == AXIS else ""


def _experts(blueprint: Blueprint, axis: str) -> str:
    rules, mixture = blueprint.rules, any("E" in letters for letters in jax.tree.leaves(blueprint.letters.params))
    if not (mixture and axis in axes_of(rules.acts, "E")):
        return ""
    on_gpus = blueprint.mesh.devices.flat[0].platform in ("gpu", "cuda")
    padded = "ragged_all_to_all" if on_gpus else "an all-to-all padded to the worst case"
    return f"{rules.experts}, tokens by {'an all-to-all' if isinstance(rules.experts, Capacity) else padded}"


def _sequence(blueprint: Blueprint, axis: str) -> str:
    return str(blueprint.rules.context) if axis in axes_of(blueprint.rules.acts, "S") else ""


def _width(blueprint: Blueprint, axis: str) -> str:
    rules = blueprint.rules
    cut = [letter for letter in WIDTHS if axis in axes_of(rules.acts, letter)]
    if not cut:
        return ""
    stream = axis in axes_of(rules.acts, "R")
    way = rules.matmul if stream else "whole"  # without parts of the stream there is nothing to send round
    return f"cuts {' '.join(cut)}, {'and' if stream else 'not'} the sequence between blocks (R); matmul {way!r}"


SAID = (_replicas, _experts, _sequence, _width)
