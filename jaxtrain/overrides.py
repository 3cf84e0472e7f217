"""Typed overrides on the command line: every leaf of a config is a flag. tyro parses; this file picks, names and explains."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import shlex
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import meshes
from jaxtrain.errors import ConfigError, UserError, closest
from jaxtrain.kinds import hints, members
from meshes.rules import WAYS

Path = tuple[str, ...]


def apply(config: Any, argv: list[str], also: Iterable[str] = ()) -> Any:
    """The config with the flags of `argv` applied: `--mesh.fsdp 2`, `--optim Lion`, `--rules FSDP`, `--name=x`.

    A field that is a choice between dataclasses takes the name of one, with that one's defaults; rules take the name
    of a preset. Raises ConfigError for an unknown flag, naming the closest, also of the command's own flags `also`,
    and for a value of the wrong type.
    """
    pairs = _pairs(argv)
    typed = []
    for flag, values in pairs:
        choices = _choices(config, _path(flag))
        if choices:
            config = _replaced(config, _path(flag), _chosen(flag, values, choices))
        else:
            typed.append(_as_tyro_reads(config, flag, values))
    _check_names(config, [flag for flag, _ in typed], also)
    check_once(argv, lambda path: _holds_several(config, path))
    return _parse(config, typed)


def read(prog: str, kind: type, argv: list[str], **how: Any) -> Any:
    """An instance of `kind` from its flags, as tyro reads them; --help prints and exits. Raises ConfigError."""
    try:
        return _tyro(kind, argv, prog=prog, **how)
    except _Refused as error:
        words = " ".join([prog, *argv])
        raise ConfigError(f"`{words}` cannot be run.", got=str(error), fix=f"{prog} --help says what it takes") from None


def check_once(argv: list[str], holds_several: Callable[[Path], bool]) -> None:
    """Raises ConfigError where a flag of several values is repeated: only those of the last would count."""
    given: dict[Path, list[list[str]]] = {}
    for flag, values in _pairs(argv):
        given.setdefault(_path(flag), []).append([flag, *values])
    for path, groups in given.items():
        if len(groups) > 1 and holds_several(path):
            (flag, *first), *rest = groups
            raise ConfigError(
                f"{flag} is given {len(groups)} times.",
                got=shlex.join(word for group in groups for word in group),
                rule="a flag of several values is given once, with all of them",
                fix=shlex.join([flag, *first, *(word for _, *values in rest for word in values)]),
            )


def print_help(config: Any, prog: str) -> None:
    """All flags of this config with their types and values, and all choices with their names, which tyro leaves out."""
    with contextlib.suppress(SystemExit):
        _changed(config, ["--help"], prog)
    rows = {_flag(path): _row(config, path) for path in _paths(config) if _choices(config, path)}
    wide = max(map(len, rows), default=0) + 2
    print("\nchoices, by name: --FLAG NAME takes that one with its defaults\n")
    print("\n".join(f"  {flag:<{wide}}{row}" for flag, row in rows.items()))


def _row(config: Any, path: Path) -> str:
    choices, value = _choices(config, path), _at(config, path)
    bare = [name for name, choice in choices.items() if isinstance(choice, type) and _required(choice)]
    named = ", ".join(name for name in choices if name not in bare)
    now = next((name for name, choice in choices.items() if type(value) is choice or value == choice), type(value).__name__)
    return f"{named or 'none by name'}{'; in the config file also ' * bool(bare)}{', '.join(bare)}; now {now}"


def leaves(config: Any) -> dict[str, Any]:
    """{"mesh.fsdp": -1, "optim": Lion, "optim.peak_lr": ...}: the flags of a config (without dashes) and their values.

    Of a dataclass in whose place another could stand the value is its class; its fields follow.
    """
    return {".".join(path): _leaf(_at(config, path)) for path in _shown(config)}


def sources(config: Any, overridden: Any) -> dict[str, str]:
    """For each leaf where its value comes from: "override", "config" (the file says so) or "default"."""
    return {".".join(path): _source(config, overridden, path) for path in _shown(overridden)}


def _source(config: Any, overridden: Any, path: Path) -> str:
    before, after = (_leaf(_at(value, path)) for value in (config, overridden))
    if not _same(before, after):
        return "override"
    return "default" if _same(_leaf(_default_at(config, path)), before) else "config"


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _leaf(value: Any) -> Any:
    return type(value) if dataclasses.is_dataclass(value) and not isinstance(value, meshes.Rules) else value


def _shown(config: Any) -> Iterator[Path]:
    """Paths of the values that are shown, and of dataclasses that are there by choice; rules that have a name are one."""
    fixed = hints(type(config))
    for name, value in _parts(config):
        below = [] if value in meshes.PRESETS.values() else list(_shown(value))
        if not below or (dataclasses.is_dataclass(value) and fixed.get(name) is not type(value)):
            yield (name,)
        yield from ((name, *path) for path in below)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """Named parts of a dataclass, of a mapping, or of a tuple that holds dataclasses."""
    if isinstance(value, dict):
        return list(value.items())
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
        return [(str(i), v) for i, v in enumerate(value)]
    return []


def _default_at(config: Any, path: Path) -> Any:
    """What is there where nobody says otherwise: in its owner's default if that is of the owner's class, else as the
    class declares; MISSING where it declares none."""
    owner, above = _at(config, path[:-1]), _default_at(config, path[:-1]) if path[1:] else dataclasses.MISSING
    if type(owner) is type(above):
        return dict(_parts(above)).get(path[-1], dataclasses.MISSING)
    fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
    return {f.name: _default(f) for f in fields}.get(path[-1], dataclasses.MISSING)


def _default(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _pairs(argv: list[str]) -> list[tuple[str, list[str]]]:
    """["--a", "1", "2", "--b=3"] -> [("--a", ["1", "2"]), ("--b", ["3"])]; a negative number is a value."""
    pairs: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            pairs.append((flag, [value] if equals else []))
        elif not pairs:
            raise ConfigError(f"{word!r} belongs to no flag.", rule="overrides are --path.to.field VALUE")
        else:
            pairs[-1][1].append(word)
    return pairs


def _path(flag: str) -> Path:
    return tuple(part.replace("-", "_") for part in flag.removeprefix("--").split("."))


def _at(config: Any, path: Path) -> Any:
    for name in path:
        config = dict(_parts(config)).get(name)
    return config


def _holds_several(config: Any, path: Path) -> bool:
    """Whether a tuple stands at `path`, or could."""
    owner, value = _at(config, path[:-1]), _at(config, path)
    kinds = members(hints(type(owner)).get(path[-1]))
    return isinstance(value, (tuple, list)) or any(typing.get_origin(kind) in (tuple, list) for kind in kinds)


def _choices(config: Any, path: Path) -> dict[str, Any]:
    """Named values that the field at `path` takes: presets of rules, their ways, the members of a union of dataclasses."""
    owner = _at(config, path[:-1])
    if isinstance(_at(config, path), meshes.Rules):
        return dict(meshes.PRESETS)
    if isinstance(owner, meshes.Rules) and path[-1] in WAYS:
        return {way: way for way in WAYS[path[-1]]}
    if not dataclasses.is_dataclass(owner) or path[-1] not in {f.name for f in dataclasses.fields(owner)}:
        return {}
    kinds = members(hints(type(owner))[path[-1]])
    named = {kind.__name__: kind for kind in kinds if dataclasses.is_dataclass(kind)} if kinds[1:] else {}
    return named | {"None": None} if named and type(None) in kinds else named


def _chosen(flag: str, values: list[str], choices: dict[str, Any]) -> Any:
    if len(values) != 1 or values[0] not in choices:
        said = " ".join(values) or "no value"
        raise ConfigError(f"{flag} cannot take {said!r}.", rule="it takes a name", fix=closest(said, choices))
    choice = choices[values[0]]
    return _instance(choice) if isinstance(choice, type) else choice


def _as_tyro_reads(config: Any, flag: str, values: list[str]) -> tuple[str, list[str]]:
    """`--model.tied False` is --model.no-tied; a letter that lies on no mesh axis, None, is a tuple without values."""
    path, said = _path(flag), " ".join(values)
    if said == "None" and isinstance(_at(config, path[:-1]), dict):
        return flag, []
    if isinstance(_at(config, path), bool) and said.lower() in ("true", "false"):
        return (flag if said.lower() == "true" else _flag(_negated(path))), []
    plain = (*path[:-1], path[-1].removeprefix("no_"))
    if values and plain != path and isinstance(_at(config, plain), bool):
        raise ConfigError(f"{flag} takes no value.", got=said, fix=f"{flag} or {_flag(plain)}, with nothing after it")
    return flag, values


def _negated(path: Path) -> Path:
    return *path[:-1], f"no_{path[-1]}"


def _replaced(config: Any, path: Path, choice: Any) -> Any:
    if not path:
        return choice
    below = _replaced(_at(config, path[:1]), path[1:], choice)
    if isinstance(config, tuple):
        return tuple(below if str(i) == path[0] else v for i, v in enumerate(config))
    return dataclasses.replace(config, **{path[0]: below})


def _instance(kind: type) -> Any:
    if required := _required(kind):
        raise ConfigError(
            f"{kind.__name__} cannot be chosen by name alone.",
            got=f"fields without a default: {', '.join(required)}",
            fix="write it in the config file",
        )
    return kind()


def _required(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if _default(f) is dataclasses.MISSING]


def _check_names(config: Any, flags: list[str], also: Iterable[str]) -> None:
    paths, own = list(_paths(config)), [(name,) for name in also]
    negated = {_flag(_negated(path)) for path in paths if isinstance(_at(config, path), bool)}
    for flag in flags:
        if flag.replace("_", "-") not in negated.union(map(_flag, paths)):
            raise ConfigError(
                f"unknown override {flag}.",
                rule="a flag is the path of one value; what a tuple holds is written in the config file",
                fix=_nearest(_path(flag), paths + own),
            )


def _paths(config: Any, path: Path = ()) -> Iterator[Path]:
    """Of everything below `path` that a flag can set: values, and choices between dataclasses."""
    for name, value in _parts(_at(config, path)):
        below = (*path, name)
        if _choices(config, below) or not (_parts(value) or dataclasses.is_dataclass(value)):
            yield below
        yield from _paths(config, below)


def _flag(path: Path) -> str:
    return "--" + ".".join(path).replace("_", "-")


def _nearest(path: Path, known: list[Path]) -> str:
    """The closest name where the path leaves the known ones, else its last name elsewhere, else all names that are there."""
    depth = max(d for d in range(len(path) + 1) if any(p[:d] == path[:d] for p in known if len(p) > d))
    there = [p for p in known if p[:depth] == path[:depth] and len(p) > depth]
    here = {p[depth]: _flag(p[: depth + 1]) + ".*" * (len(p) > depth + 1) for p in there}
    near = []
    if depth < len(path):
        near = [(*path[:depth], name) for name in difflib.get_close_matches(path[depth], here, n=1)]
        near = near or [p for p in known if difflib.get_close_matches(path[-1], p[-1:], cutoff=0.8)]
    if near:
        return f"did you mean {' or '.join(repr(_flag(p)) for p in near)}?"
    return f"known: {', '.join(sorted(here.values()))}"


def _parse(config: Any, pairs: list[tuple[str, list[str]]]) -> Any:
    """All flags at once; where that fails, the one that fails alone is blamed. Without any, the config as it is."""
    if not pairs:
        return config
    for group in (pairs, *([pair] for pair in pairs)):
        try:
            changed = _changed(config, [word for flag, values in group for word in (flag, *values)], "jaxtrain")
        except UserError:
            if group is pairs:
                raise
        except _Refused as error:
            if group is pairs:
                continue
            ((flag, values),) = group
            now = _at(config, _path(flag))
            raise ConfigError(
                f"{flag} cannot take {' '.join(values) or 'no value'!r}.",
                got=str(error),
                rule=f"a value of its type, as {now!r} is",
                fix=f"such as {flag} {now}",
            ) from None
        if group is pairs:
            return changed
    raise AssertionError(f"the flags {pairs} parse one by one but not together")


def _changed(config: Any, argv: list[str], prog: str) -> Any:
    import tyro

    kind = type(config)[type(config.model)]  # RunConfig is generic over the architecture: tyro then sees its fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes of the user's own, which kinds.py has let pass
        return _tyro(kind, argv, prog=prog, default=config, config=(tyro.conf.AvoidSubcommands,))


class _Refused(Exception):
    """Why tyro did not take a command line."""


def _tyro(kind: Any, argv: list[str], **how: Any) -> Any:
    import tyro

    if "--help" in argv or "-h" in argv:
        return tyro.cli(kind, args=argv, **how)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(kind, args=argv, **how)
    except SystemExit:
        raise _Refused(_reason(said.getvalue())) from None


def _reason(said: str) -> str:
    """What tyro's message says, which comes in a box or between rules, below a title and above help."""
    lines = [line.strip("│╭╰╮╯ ").strip("─") for line in said.strip().splitlines()[1:]]
    words = itertools.dropwhile(lambda line: not line.strip("-"), lines)
    return " ".join(itertools.takewhile(lambda line: line.strip("-"), words)) or "no reason given"
