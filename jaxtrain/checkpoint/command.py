"""`jaxtrain checkpoint ...`: looks at checkpoints from outside a run, on the host's CPU. It deletes nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxtrain.command import wants_help
from jaxtrain.errors import CheckpointError, ConfigError, closest
from jaxtrain.overrides import read

Where = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_DIR[@STEP]")]]


@dataclass(frozen=True, kw_only=True)
class One:
    """Which checkpoint."""

    where: Where  # RUN_DIR, its checkpoints folder or one checkpoint; RUN_DIR@STEP picks one, else the newest


@dataclass(frozen=True, kw_only=True)
class Some:
    """Which checkpoints."""

    where: Where  # RUN_DIR, its checkpoints folder or one checkpoint; RUN_DIR@STEP picks one, else all


@dataclass(frozen=True, kw_only=True)
class Two:
    """Which two checkpoints."""

    a: Where  # as RUN_DIR[@STEP]
    b: Where


@dataclass(frozen=True, kw_only=True)
class Export(One):
    """Which checkpoint, and where its parameters go."""

    out: str  # a folder, made if need be
    shard_gb: float = 5.0  # the size at which another file is begun


def main(argv: list[str]) -> int:
    """jaxtrain checkpoint VERB RUN_DIR[@STEP] [flags]"""
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join([f"usage: {main.__doc__}", "", *(f"  {verb:<8}{run.__doc__}" for verb, (_, run) in VERBS.items())]))
        return 0
    if argv[0] not in VERBS:
        raise ConfigError(f"jaxtrain checkpoint has no command {argv[0]!r}.", fix=closest(argv[0], VERBS))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # beside a run, whose GPUs are full
    kind, run = VERBS[argv[0]]
    _check_folders(argv[0], kind, argv[1:])
    return run(read(f"jaxtrain checkpoint {argv[0]}", kind, argv[1:], description=run.__doc__))


def list_(options: Some) -> int:
    """All checkpoints of a run by step (size, number of arrays, digest, time), and what is damaged or unfinished."""
    from jaxtrain.checkpoint import files, load

    folders = load.located(options.where)
    _print_table(("step", "GB", "arrays", "digest", "saved"), [_row(folder) for folder in folders])
    for why, name in files.no_checkpoints(folders[0].parent):
        print(f"{why:<10}  {name}")
    return 0


def show(options: One) -> int:
    """What a checkpoint's manifest says: step, data position, mesh, config, arrays."""
    from jaxtrain.checkpoint import load, manifest

    found = manifest.read(load.locate(options.where))
    for name in ("step", "digest", "data", "mesh", "processes", "versions", "config"):
        value = getattr(found, name)
        print(f"{name:<10} {value if isinstance(value, (str, int)) else json.dumps(value)}")
    rows = [(n, a.dtype, "x".join(map(str, a.shape)), a.letters or "", _axes(a.spec), a.content) for n, a in found.arrays.items()]
    _print_table(("array", "dtype", "shape", "letters", "sharded over", "content"), rows)
    return 0


def verify(options: Some) -> int:
    """Read every byte of all checkpoints of a run, or of one; name damaged files and arrays (exit code 1)."""
    from jaxtrain.checkpoint import files, load

    return 0 if all([_verified(folder) for folder in load.located(options.where, files.numbered)]) else 1


def diff(options: Two) -> int:
    """Compare two checkpoints array by array (exit code 1 where they differ)."""
    from jaxtrain.checkpoint import load
    from jaxtrain.checkpoint.verify import differences

    rows = differences(load.locate(options.a), load.locate(options.b))
    unequal = {name: what for name, what in rows.items() if what != "equal"}
    _print_table(("array", "difference"), list(rows.items()))
    print(f"{len(rows) - len(unequal)} of {len(rows)} arrays are equal")
    return 1 if unequal else 0


def hash_(options: One) -> int:
    """One digest of parameters, optimizer state and step, from the manifest: equal for bit-identical states on any mesh."""
    from jaxtrain.checkpoint import load, manifest

    print(manifest.read(load.locate(options.where)).digest)
    return 0


def export(options: Export) -> int:
    """Write the parameters as safetensors."""
    from jaxtrain.checkpoint import load
    from jaxtrain.checkpoint.export import export as write

    if options.shard_gb <= 0:
        raise ConfigError(f"--shard-gb {options.shard_gb} is no size.", rule="a positive number")
    for path in write(load.locate(options.where), Path(options.out), int(options.shard_gb * 1e9)):
        print(path)
    return 0


VERBS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "list": (Some, list_),
    "show": (One, show),
    "verify": (Some, verify),
    "diff": (Two, diff),
    "hash": (One, hash_),
    "export": (Export, export),
}


def _check_folders(verb: str, kind: type, argv: list[str]) -> None:
    """Raises ConfigError where fewer are named than the verb looks at."""
    needed = sum(field.type == "Where" for field in fields(kind))
    of_flags = [word.startswith("--") and "=" not in word for word in ["", *argv]]  # the next word is its value
    found = [word for word, is_value in zip(argv, of_flags) if not word.startswith("-") and not is_value]
    if len(found) < needed and not wants_help(argv):
        raise ConfigError(
            f"jaxtrain checkpoint {verb} needs {'a RUN_DIR' if needed == 1 else 'two of RUN_DIR[@STEP]'}.",
            got=" ".join(argv) or "nothing",
            rule=" ".join(["jaxtrain checkpoint", verb, *["RUN_DIR[@STEP]"] * needed, "[flags]"]),
            fix=f"a run's folder such as runs/quickstart; jaxtrain checkpoint {verb} --help says what it takes",
        )


def _row(folder: Path) -> tuple[Any, ...]:
    import time

    from jaxtrain.checkpoint import files, manifest

    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / files.MANIFEST).stat().st_mtime))
    try:
        found = manifest.read(folder)
    except CheckpointError as error:
        return folder.name, "", "", error.what, saved
    size = sum(entry.size for entry in found.files.values())
    return found.step, f"{size / 1e9:.3f}", len(found.arrays), found.digest[:16], saved


def _verified(folder: Path) -> bool:
    """Says what is wrong with one checkpoint; False where something is. One that a run deletes meanwhile was whole."""
    from jaxtrain.checkpoint.verify import damage

    lines = damage(folder) if folder.is_dir() else []
    if not folder.is_dir():
        print(f"step {folder.name} was deleted meanwhile", flush=True)
        return True
    print(f"step {folder.name} is {'damaged' if lines else 'whole'}", *lines, sep="\n  ", flush=True)
    return not lines


def _axes(spec: list[Any]) -> str:
    """[["data", "fsdp"], null] -> "data+fsdp,-"."""
    return ",".join("+".join([axis] if isinstance(axis, str) else axis) if axis else "-" for axis in spec)


def _print_table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.table import Table

    from jaxtrain.observe.console import Stdout

    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(str, row))
    terminal = sys.stdout.isatty()  # elsewhere lines are for grep: as wide as they are
    Stdout(width=None if terminal else 10_000, soft_wrap=not terminal).print(table)
