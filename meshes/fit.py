"""Whether arrays can be laid out: letters, mesh axes, sizes. A config is checked by what arrays are placed by. No jax."""

from __future__ import annotations

import math
from collections.abc import Mapping

from meshes.axes import AXES, LETTERS, NAMELESS
from meshes.errors import LayoutError, closest
from meshes.mesh import product
from meshes.rules import Axes, Experts, Letters, Ragged, axes_of, dims_of


def cuts(sizes: Mapping[str, int], mapping: Mapping[str, Axes], letters: Letters) -> list[dict[str, int]]:
    """By dim the mesh axes of several devices that shard it, with their sizes."""
    return [{axis: sizes[axis] for axis in axes if sizes.get(axis, 1) > 1} for axes in dims_of(mapping, letters)]


def check_alphabet(letters: Letters, name: str) -> None:
    """Raises LayoutError for no letter of the alphabet."""
    for letter in letters:
        if letter != NAMELESS and letter not in LETTERS:
            fix = closest(letter, (*LETTERS, NAMELESS))
            raise LayoutError(f"{name} {letters!r}: {letter!r} is no letter of the alphabet.", fix=fix)


def check_letters(letters: Letters, mapping: Mapping[str, Axes], name: str) -> None:
    """Raises LayoutError for no letter of the alphabet, and where two dims are on one mesh axis."""
    check_alphabet(letters, name)
    owner: dict[str, str] = {}
    for letter, axes in zip(letters, dims_of(mapping, letters)):
        for axis in axes:
            if axis in owner:
                raise LayoutError(
                    f"{name} {letters!r}: {owner[axis]} and {letter} are both on mesh axis {axis!r}.",
                    got=f"{owner[axis]} -> {axes_of(mapping, owner[axis])}, {letter} -> {axes_of(mapping, letter)}",
                    rule="a mesh axis shards one dim of an array",
                    fix=f"rules that keep them apart, or '{NAMELESS}' for the dim that need not be sharded",
                )
            owner[axis] = letter


def check_mesh(sizes: Mapping[str, int], mapping: Mapping[str, Axes]) -> None:
    """Raises LayoutError for an axis of several devices that is neither in AXES nor in the mapping."""
    known = {*AXES, *(axis for letter in mapping for axis in axes_of(mapping, letter))}
    for axis in sizes:
        if sizes[axis] > 1 and axis not in known:
            raise LayoutError(
                f"the mesh has an axis {axis!r}, which no rules can name.",
                got=product(sizes),
                rule="the axes of a mesh have the names in AXES; along another every device would do the same work",
                fix=closest(axis, AXES),
            )


def check_axes(sizes: Mapping[str, int], mapping: Mapping[str, Axes], letters: Letters) -> None:
    """Raises LayoutError for no mesh axis."""
    if letters:  # without any it is whole, on whatever mesh
        check_mesh(sizes, mapping)
    known = (*sizes, *AXES)
    for letter in letters:
        for axis in axes_of(mapping, letter):
            if axis not in known:
                raise LayoutError(f"{letter} is put on {axis!r}, which is no mesh axis.", fix=closest(axis, set(known)))


def check_shape(
    sizes: Mapping[str, int], mapping: Mapping[str, Axes], letters: Letters, shape: tuple[int, ...], name: str
) -> None:
    """Raises LayoutError where a dim does not divide over its axes."""
    if len(letters) != len(shape):
        raise LayoutError(f"{name} {letters!r} has {len(shape)} dims.", got=f"shape {shape}", rule="one letter per dim")
    for letter, dim, over in zip(letters, shape, cuts(sizes, mapping, letters), strict=True):
        if dim % (shards := math.prod(over.values())):
            over = " x ".join(f"{axis} {size}" for axis, size in over.items())
            raise LayoutError(
                f"{name} {letters!r}: {letter} ({LETTERS[letter]}) = {dim} does not divide into {shards} shards.",
                got=f"shape {shape}, {letter} over {over}",
                rule="a sharded dim is a multiple of the devices along its axes",
                fix=f"{letter} a multiple of {shards}, a smaller axis, or rules that do not shard {letter}",
            )


def check_experts(acts: Mapping[str, Axes], over: tuple[str, ...], tokens: tuple[str, ...]) -> None:
    """Raises LayoutError where experts over these mesh axes have no one to exchange these axes' tokens with."""
    if len(over) > 1 or not set(over) <= set(tokens):
        raise LayoutError(
            f"experts cannot be on {' x '.join(over)}.",
            got=f"E -> {axes_of(acts, 'E')}, B -> {axes_of(acts, 'B')}, S -> {axes_of(acts, 'S')}",
            rule="one mesh axis holds the experts, and tokens (B or S) are on it too, to be exchanged over it",
            fix="acts: E on expert, and expert among the axes of B, as in DEFAULT",
        )


def check_exchange(way: Experts, platform: str) -> str:
    """Why dropless tokens take another way to experts on other devices, or "". Raises LayoutError where it is required."""
    if not isinstance(way, Ragged) or platform == "gpu":
        return ""
    reason = f"ragged_all_to_all runs on GPUs, and these devices are {platform}"
    if way.require:
        fix = "Ragged(require=False) or Capacity()"
        raise LayoutError(f"experts = Ragged is required and cannot run: {reason}.", fix=fix)
    return reason
