"""Typed overrides on the command line: every leaf of a config is a flag. tyro parses; this file picks, names and explains."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import types
import typing
from typing import Any

import meshes
from jaxtrain.errors import ConfigError, closest

Path = tuple[str, ...]


def apply(config: Any, argv: list[str]) -> Any:
    """The config with the flags of `argv` applied: `--mesh.fsdp 2`, `--optim Lion`, `--rules FSDP`, `--name=x`.

    A field that is a choice between dataclasses takes the name of one, with that one's defaults; rules take the name
    of a preset. Raises ConfigError for an unknown flag (naming the closest) and for a value of the wrong type.
    """
    pairs = _pairs(argv)
    typed = []
    for flag, values in pairs:
        choices = _choices(config, _path(flag))
        if choices:
            config = _replaced(config, _path(flag), _chosen(flag, values, choices))
        else:
            typed.append((flag, values))
    _check_names(config, [flag for flag, _ in typed])
    return _parse(config, typed)


def print_help(config: Any, prog: str) -> None:
    """All flags of this config with their types and values."""
    with contextlib.suppress(SystemExit):
        _tyro(config, ["--help"], prog)


def leaves(config: Any) -> dict[str, Any]:
    """{"mesh.fsdp": -1, ...}: the flags of a config (without dashes) and their values."""
    rows: dict[str, Any] = {}
    for name, value in _children(config):
        below = leaves(value) if _children(value) else {"": value}
        rows |= {f"{name}.{path}" if path else name: leaf for path, leaf in below.items()}
    return rows


def sources(config: Any, overridden: Any) -> dict[str, str]:
    """For each leaf where its value comes from: "override", "config" (the file says so) or "default"."""
    before, defaults = leaves(config), _default_leaves(config)
    origin = {path: "config" if path not in defaults or defaults[path] != v else "default" for path, v in before.items()}
    after = leaves(overridden)
    return {p: origin[p] if p in before and _same(before[p], v) else "override" for p, v in after.items()}


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _children(value: Any) -> list[tuple[str, Any]]:
    """Named parts of a dataclass, or of a tuple that holds dataclasses; rules count as one value."""
    if isinstance(value, meshes.Rules):
        return []
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
        return [(str(i), v) for i, v in enumerate(value)]
    return []


def _default_leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves whose dataclass declares a default, with that default."""
    rows: dict[str, Any] = {}
    declared = {f.name: _default(f) for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    for name, child in _children(value):
        if _children(child):
            rows |= _default_leaves(child, f"{prefix}{name}.")
        elif declared.get(name, dataclasses.MISSING) is not dataclasses.MISSING:
            rows[prefix + name] = declared[name]
    return rows


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
        config = dict(_children(config)).get(name)
    return config


def _choices(config: Any, path: Path) -> dict[str, Any]:
    """Named values that the field at `path` takes: presets of rules, or the members of its union of dataclasses."""
    owner = _at(config, path[:-1])
    if isinstance(_at(config, path), meshes.Rules):
        return dict(meshes.PRESETS)
    if not dataclasses.is_dataclass(owner) or path[-1] not in {f.name for f in dataclasses.fields(owner)}:
        return {}
    kind = typing.get_type_hints(type(owner))[path[-1]]
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else ()
    named = {m.__name__: m for m in members if dataclasses.is_dataclass(m)}
    return named | {"None": None} if named and type(None) in members else named


def _chosen(flag: str, values: list[str], choices: dict[str, Any]) -> Any:
    if len(values) != 1 or values[0] not in choices:
        said = " ".join(values) or "no value"
        raise ConfigError(f"{flag} cannot take {said!r}.", rule="it takes a name", fix=closest(said, choices))
    choice = choices[values[0]]
    return _instance(choice) if isinstance(choice, type) else choice


def _replaced(config: Any, path: Path, choice: Any) -> Any:
    if not path:
        return choice
    below = _replaced(_at(config, path[:1]), path[1:], choice)
    if isinstance(config, tuple):
        return tuple(below if str(i) == path[0] else v for i, v in enumerate(config))
    return dataclasses.replace(config, **{path[0]: below})


def _instance(kind: type) -> Any:
    required = [f.name for f in dataclasses.fields(kind) if _default(f) is dataclasses.MISSING]
    if required:
        raise ConfigError(
            f"{kind.__name__} cannot be chosen by name alone.",
            got=f"fields without a default: {', '.join(required)}",
            fix="write it in the config file",
        )
    return kind()


def _check_names(config: Any, flags: list[str]) -> None:
    known = {"--" + path.replace("_", "-") for path in leaves(config)}
    negated = {_negation(path) for path, v in leaves(config).items() if isinstance(v, bool)}
    for flag in flags:
        if flag.replace("_", "-") not in known | negated:
            near = closest(flag.replace("_", "-"), known).split(" known:")[0]
            raise ConfigError(
                f"unknown override {flag}.",
                rule="a flag is the path of a field in the config",
                fix=near if near.startswith("did") else "jaxtrain show CONFIG prints all of them",
            )


def _negation(path: str) -> str:
    *owner, name = path.replace("_", "-").split(".")
    return "--" + ".".join([*owner, "no-" + name])


def _parse(config: Any, pairs: list[tuple[str, list[str]]]) -> Any:
    """All flags at once; where that fails, the one that fails alone is blamed."""
    for group in (pairs, *([pair] for pair in pairs)):
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                changed = _tyro(config, [word for flag, values in group for word in (flag, *values)], "jaxtrain")
        except SystemExit:
            if group is pairs:
                continue
            ((flag, values),) = group
            now = leaves(config).get(".".join(_path(flag)))
            raise ConfigError(
                f"{flag} cannot take {' '.join(values) or 'no value'!r}.",
                got=_reason(said.getvalue()),
                rule=f"a value of its type, as {now!r} is",
            ) from None
        if group is pairs:
            return changed
    raise AssertionError(f"the flags {pairs} parse one by one but not together")


def _tyro(config: Any, argv: list[str], prog: str) -> Any:
    import tyro

    kind = type(config)[type(config.model)]  # RunConfig is generic over the architecture: tyro then sees its fields
    return tyro.cli(kind, default=config, args=argv, prog=prog, config=(tyro.conf.AvoidSubcommands,))


def _reason(said: str) -> str:
    """The sentence of tyro's message, which comes in a box or between rules, with help after it."""
    lines = [line.strip("│╭╰─╮╯- ") for line in said.splitlines()]
    sentences = [line for line in lines if line and not line.endswith(("error", "options", "Error"))]
    return sentences[0] if sentences else "no reason given"
