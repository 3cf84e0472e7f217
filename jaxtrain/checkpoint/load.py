"""Checkpoints back to arrays on any mesh, each verified against its hash. It saves and deletes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

import meshes
from jaxtrain.background import Deadline, within
from jaxtrain.checkpoint import files, hashing, manifest, peers, storage
from jaxtrain.checkpoint.describe import ARRAYS
from jaxtrain.checkpoint.manifest import ArrayEntry, DamagedError, Manifest, in_words
from jaxtrain.checkpoint.names import named, nested, renamed
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.cluster import few
from jaxtrain.errors import CheckpointError, closest
from meshes.place import aligned

T = TypeVar("T")

_SMALL_BYTES = 2**20  # files up to here are read whole before a restore; larger ones hold arrays, checked by their hashes
_MAX_ROWS = 20


def restore(
    path: str | Path,
    abstract: Any = None,
    *,
    only: str | None = None,
    mesh: Mesh | None = None,
    rules: meshes.Rules = meshes.DEFAULT,
) -> Any:
    """The state of a checkpoint, verified: nested dicts of arrays on this process's first device, unless said otherwise.

    `path`: RUN_DIR, its checkpoints folder or one checkpoint; "@STEP" picks one, else it is the newest. `abstract`: a
    tree of shapes, dtypes and shardings that the answer takes on. `only`: one branch of the state, "params"; `abstract`
    is then of the branch or of the whole. `mesh`: arrays are placed on it by `rules` and the letters they were saved
    with, and replicated where they have none. Raises CheckpointError (a table of what differs), DamagedError, LayoutError.
    """
    folder, deadline = locate(path), Deadline(CheckpointConfig().deadline_seconds)
    shared = _spans_processes(abstract, mesh)
    found = _manifest(folder, shared, deadline)
    branch = f"{only}/" if only else ""
    entries = _branch(found, branch)
    if abstract is None:
        wanted = {name: _shape(entry, _placed(name, entry, mesh, rules)) for name, entry in entries.items()}
        return nested(_fetch(folder, found, wanted, branch, shared, deadline))
    abstract = _branch_of(abstract, only)
    return renamed(abstract, _fetch(folder, found, _matched(folder, entries, abstract), branch, shared, deadline))


class Source(NamedTuple):
    """Of a wanted array: the saved one by name, and what is made of it, traced by jit."""

    name: str
    make: Callable[[jax.Array], jax.Array]


class Change(NamedTuple):
    """How a state is made of one of another form: each wanted array's source, saved ones not needed, all in words."""

    sources: Mapping[str, Source]
    dropped: frozenset[str]
    why: str


Changes = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]], Change | None]


def restore_whole(
    folder: Path, abstract: Any, deadline: Deadline, changes: Changes = lambda saved, wanted: None
) -> tuple[Any, Manifest]:
    """One checkpoint as a tree like `abstract`, and its manifest; every process of the job calls it.

    `changes`, of saved and wanted shapes, says how another form is made of what was saved; that is said on stderr.
    """
    found = _manifest(folder, True, deadline)
    shapes = [{name: tuple(x.shape) for name, x in tree.items()} for tree in (found.arrays, named(abstract))]
    if change := changes(*shapes):
        state = renamed(abstract, _made(folder, found, named(abstract), change, deadline))
        if peers.is_lead():
            print(f"the checkpoint of step {found.step}: {change.why}", file=sys.stderr, flush=True)
        return state, found
    return renamed(abstract, _fetch(folder, found, _matched(folder, found.arrays, abstract), "", True, deadline)), found


def locate(path: str | Path) -> Path:
    """The folder of one checkpoint, the newest where `path` names none. Raises CheckpointError."""
    return located(path)[-1]


def located(path: str | Path, steps_of: Callable[[Path], list[int]] = files.steps) -> list[Path]:
    """The folders of the checkpoints that `path` names, by step: RUN_DIR or its checkpoints folder names all of them.

    `steps_of`: `files.numbered` counts those whose manifest is gone. Raises CheckpointError where there is none, naming what there is.
    """
    run, step = _split(path)
    if step is None and (run / files.MANIFEST).is_file():
        return [run.absolute()]
    directory = (run / "checkpoints" if (run / "checkpoints").is_dir() else run).absolute()
    steps = steps_of(directory)
    chosen = [directory / str(s) for s in steps if step in (None, s)]
    if not chosen:
        others = few([f"{why} {name}" for why, name in files.no_checkpoints(directory)])
        raise CheckpointError(
            f"no checkpoint {'' if step is None else f'of step {step} '}in {directory}.",
            got=f"steps {few(steps)}" if steps else others or "none",
            rule=f"a checkpoint is a folder STEP with {files.MANIFEST}, which is written last",
            fix=f"{run}@{min(steps, key=lambda s: abs(s - step))}" if steps else _elsewhere(run),
        )
    return chosen


def _elsewhere(run: Path) -> str:
    """Where a user who finds no checkpoint gets one."""
    near = (path for folder in (run, run.parent) for path in folder.glob(f"*/checkpoints/*/{files.MANIFEST}"))
    runs = sorted({str(path.parents[2]) for path in near})
    saves = "a run saves one every checkpoint.every steps and at its end"
    return f"{saves}; these have some: {few(runs)}" if runs else saves


def damaged_files(folder: Path, found: Manifest, *, up_to: float, part: slice = slice(None)) -> list[str]:
    """A line for each file, or each of a part of them, that is not as written; contents are read up to a size."""
    rows = list(found.files.items())[part]
    seen = ((name, files.difference(folder / name, entry, content=entry.size <= up_to)) for name, entry in rows)
    return [f"{name} {why}" for name, why in seen if why]


def differing(found: Manifest, hashes: Mapping[str, list[str]]) -> list[str]:
    """A line for each array of which a copy does not have the content hash that was saved."""
    wrong = [name for name, copies in hashes.items() if {*copies} != {found.arrays[name].content}]
    return [f"{name} does not have the content that was saved" for name in wrong]


def _split(path: str | Path) -> tuple[Path, int | None]:
    """"runs/x@300" -> runs/x, 300."""
    directory, at, step = str(path).rpartition("@")
    return (Path(directory), int(step)) if at and step.isdecimal() else (Path(path), None)


def _branch(found: Manifest, branch: str) -> dict[str, ArrayEntry]:
    entries = {name.removeprefix(branch): entry for name, entry in found.arrays.items() if name.startswith(branch)}
    if not entries:
        known = {name.split("/")[0] for name in found.arrays}
        raise CheckpointError(f"the checkpoint has no branch {branch[:-1]!r}.", fix=closest(branch[:-1], known))
    return entries


def _branch_of(abstract: Any, only: str | None) -> Any:
    """The branch of a whole state (a dataclass or a dict); anything else is taken for the branch itself."""
    if only is None:
        return abstract
    return abstract.get(only, abstract) if isinstance(abstract, dict) else getattr(abstract, only, abstract)


def _placed(name: str, entry: ArrayEntry, mesh: Mesh | None, rules: meshes.Rules) -> Sharding:
    if mesh is None:
        return _first_device()
    if entry.letters:
        meshes.check(mesh, rules.params, entry.letters, entry.shape, name)
    return meshes.sharding(mesh, entry.letters or "", rules.params)


def _first_device() -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _shape(entry: ArrayEntry, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(entry.shape, jnp.dtype(entry.dtype), sharding=sharding)


def _matched(folder: Path, entries: Mapping[str, ArrayEntry], abstract: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What `abstract` wants, if the checkpoint has just that; else CheckpointError with a table of what differs."""
    wanted = named(abstract)
    there = {name: f"{entry.dtype}{list(entry.shape)}" for name, entry in entries.items()}
    here = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()}
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if names:
        width = max(map(len, names))
        rows = [f"{name:<{width}}  {there.get(name, '-'):<20}  {here.get(name, '-')}" for name in names[:_MAX_ROWS]]
        more = [f"and {len(names) - _MAX_ROWS} more"] if len(names) > _MAX_ROWS else []
        raise CheckpointError(
            f"{folder} holds another state than the one to restore: {len(names)} arrays differ.",
            got="\n        ".join([f"{'array':<{width}}  {'checkpoint':<20}  wanted", *rows, *more]),
            rule="names, shapes and dtypes are equal; the mesh and the rules may differ",
            fix="the config that the checkpoint was made with (jaxtrain checkpoint show), or only='params'",
        )
    return {name: _shape(entries[name], getattr(leaf, "sharding", None) or _first_device()) for name, leaf in wanted.items()}


def _made(
    folder: Path, found: Manifest, wanted: Mapping[str, Any], change: Change, deadline: Deadline
) -> dict[str, jax.Array]:
    """The wanted arrays of a checkpoint of another form, one after the other: a device holds one as saved at a time."""
    kept = {name: entry for name, entry in found.arrays.items() if name not in change.dropped}
    forms = {name: _form(kept[source.name], source) for name, source in change.sources.items() if source.name in kept}
    used = {source.name for source in change.sources.values()}
    _matched(folder, forms | {name: entry for name, entry in kept.items() if name not in used}, wanted)
    arrays = {}
    for name, leaf in wanted.items():
        source = change.sources[name]
        saved = _shape(found.arrays[source.name], aligned(leaf.sharding, found.arrays[source.name].shape))
        read = _fetch(folder, found, {source.name: saved}, "", True, deadline)
        arrays[name] = jax.block_until_ready(jax.jit(source.make, out_shardings=leaf.sharding)(read.pop(source.name)))
    return arrays


def _form(entry: ArrayEntry, source: Source) -> ArrayEntry:
    """What the source's array becomes."""
    made = jax.eval_shape(source.make, jax.ShapeDtypeStruct(entry.shape, jnp.dtype(entry.dtype)))
    return replace(entry, shape=made.shape, dtype=str(made.dtype))


def _spans_processes(abstract: Any, mesh: Mesh | None) -> bool:
    """Whether the arrays to make lie on devices of several processes, which then restore together."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(abstract)]
    devices = {device for sharding in shardings if sharding for device in sharding.device_set}
    devices |= set() if mesh is None else set(mesh.devices.flat)
    return any(device.process_index != jax.process_index() for device in devices)


def _manifest(folder: Path, shared: bool, deadline: Deadline) -> Manifest:
    """Read by every process; one that cannot makes it an error on all."""
    found: list[Manifest] = []
    _together(shared, lambda: found.append(_in_time(folder, lambda: manifest.read(folder), deadline)), lambda _: None, deadline)
    return found[0]


def _fetch(
    folder: Path,
    found: Manifest,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    branch: str,
    shared: bool,
    deadline: Deadline,
) -> dict[str, jax.Array]:
    """The arrays of a branch, read and verified."""
    arrays: dict[str, jax.Array] = {}
    part = slice(jax.process_index(), None, jax.process_count()) if shared else slice(None)

    def read() -> hashing.Sums:
        damaged = _in_time(folder, lambda: damaged_files(folder, found, up_to=_SMALL_BYTES, part=part), deadline)
        _raise_if(damaged, folder)
        arrays.update(_read(folder, {branch + name: shape for name, shape in wanted.items()}, deadline))
        return hashing.Hashing(arrays).sums()

    def judge(parts: list[hashing.Sums]) -> None:
        _raise_if(differing(found, hashing.total(parts)), folder)

    _together(shared, read, judge, deadline)
    return {name.removeprefix(branch): x for name, x in arrays.items()}


def _together(shared: bool, report: Callable[[], Any], decide: Callable[[list[Any]], None], deadline: Deadline) -> None:
    """`peers.agree` where the arrays are of several processes."""
    if shared:
        peers.agree(peers.new_round(), report, decide, deadline)
    else:
        decide([report()])


def _read(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], deadline: Deadline) -> dict[str, jax.Array]:
    try:
        return _in_time(folder, lambda: storage.read(folder / ARRAYS, wanted), deadline)
    except (CheckpointError, jax.errors.JaxRuntimeError):
        raise  # the deadline, or the devices' trouble (out of memory): not the checkpoint's
    except Exception as error:  # for damage, Orbax and TensorStore raise ValueError and bare Exception too
        raise DamagedError(
            f"{folder} is damaged.",
            got=f"its arrays cannot be read: {in_words(error.__cause__ or error)}",
            fix=f"jaxtrain checkpoint verify {folder} names the files and arrays",
        ) from error


def _in_time(folder: Path, work: Callable[[], T], deadline: Deadline) -> T:
    try:
        return within(deadline, work)
    except TimeoutError as error:
        raise CheckpointError(
            f"{folder} was not read in time.",
            got=f"{deadline.seconds:.0f} s",
            rule="a restore ends within checkpoint.deadline_seconds",
            fix="a faster disk, or a larger checkpoint.deadline_seconds",
        ) from error


def _raise_if(damage: list[str], folder: Path) -> None:
    if damage:
        more = [f"and {len(damage) - _MAX_ROWS} more"] if len(damage) > _MAX_ROWS else []
        raise DamagedError(
            f"{folder} is damaged.",
            got="\n        ".join([*damage[:_MAX_ROWS], *more]),
            rule="every byte is as it was written",
            fix=f"jaxtrain checkpoint verify {folder} reads all of it",
        )
