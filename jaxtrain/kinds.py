"""Whether the values of a config are of the kinds that its fields take, by the fields' own types. Which numbers and which
values together a run can mean, it leaves to ranges.py and config.py."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.errors import ConfigError
from jaxtrain.loading import full_name
from meshes import PRESETS, Rules

Wrong = tuple[str, Any, Any]  # a path, what is there, and the type that should be

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None", Path: "a path"}
WORDS |= {Any: "anything", dict: "a dict", list: "a list", Rules: f"Rules: {', '.join(PRESETS)} of meshes, or others"}
LONG = 60  # characters of a value in a message


def check(config: Any) -> None:
    """Raises ConfigError for the first value that its field does not take."""
    for path, value, hint in _below("", config, type(config)):
        raise ConfigError(
            f"{path} = {_said(value)} is of another kind.",
            got=_got(value, hint),
            rule=f"{path} is {_words(hint)}",
            fix=f"{path} = {better}" if (better := _better(value, hint)) else "",
        )


def hints(kind: type) -> dict[str, Any]:
    """Types of a class's fields by name. Raises ConfigError where they name what is not there."""
    try:
        return typing.get_type_hints(kind)
    except NameError as error:
        raise ConfigError(
            f"the types of {full_name(kind)}'s fields cannot be read.",
            got=str(error),
            rule="what they name is bound at the top level of the class's file, also when it runs",
        ) from error


def members(hint: Any) -> tuple[Any, ...]:
    """The types of which a union is one or the other; of another type itself."""
    if isinstance(hint, typing.TypeVar):
        hint = hint.__bound__ or Any
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _wrong(path: str, value: Any, hint: Any) -> list[Wrong]:
    """What is wrong with a value, or within it: by the member of a union that finds the least."""
    fitting = [member for member in members(hint) if _is(value, member)]
    if not fitting and not _is_own(type(value), hint):
        return [(path, value, hint)]
    return min((list(_below(path, value, member)) for member in fitting or [hint]), key=len)


def _below(path: str, value: Any, hint: Any) -> Iterator[Wrong]:
    for name, part, kind in _fields(value) if _is_value(value) else _items(value, typing.get_args(hint)):
        yield from _wrong(f"{path}.{name}".removeprefix("."), part, kind)


def _fields(value: Any) -> list[Wrong]:
    """Without those at the default that their class declares: that it takes, whatever the type says."""
    own = hints(type(value))
    parts = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return [(f.name, part, own[f.name]) for f, part in parts if part is not f.default]


def _items(value: Any, args: tuple[Any, ...]) -> list[Wrong]:
    if isinstance(value, dict) and len(args) == 2:
        return [(str(name), part, args[1]) for name, part in value.items()]
    if isinstance(value, (tuple, list)) and args:
        each = args if isinstance(value, tuple) and args[-1] is not ... else args[:1] * len(value)
        return [(str(i), part, kind) for i, (part, kind) in enumerate(zip(value, each))]
    return []


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of this type, what it holds aside. Types that nothing is known of take all."""
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return isinstance(value, (str, int, type(None))) and value in typing.get_args(kind)
    if origin in (int, float):  # True and False are no numbers
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if origin is tuple and isinstance(value, tuple):
        args = typing.get_args(kind)
        return not args or args[-1] is ... or len(args) == len(value)
    if origin is Any or not isinstance(origin, type) or typing.is_typeddict(origin):
        return True
    return _is_own(type(value), kind) if _is_protocol(origin) else isinstance(value, origin)


def _is_own(kind: type, hint: Any) -> bool:
    """Whether this is a dataclass of the user's own that has what a protocol asks, or the methods that all of a union have."""
    needed = _needed(hint)
    return bool(needed) and dataclasses.is_dataclass(kind) and needed <= _public(kind)


def _needed(hint: Any) -> set[str]:
    choices = _dataclasses(hint)
    if len(choices) > 1:
        return set.intersection(*(_public(kind) - hints(kind).keys() for kind in choices))
    return set().union(*(_public(kind) for kind in members(hint) if _is_protocol(kind)))


def _public(kind: type) -> set[str]:
    return {name for name in (*dir(kind), *hints(kind)) if not name.startswith("_")}


def _is_protocol(kind: Any) -> bool:
    return getattr(kind, "_is_protocol", False)


def _is_value(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _dataclasses(hint: Any) -> list[type]:
    return [kind for kind in members(hint) if dataclasses.is_dataclass(kind)]


def _words(hint: Any) -> str:
    """What a type takes, as words after "is"."""
    kinds = [_word(kind) for kind in members(hint) if not _is_protocol(kind)]
    if needed := _needed(hint):
        kinds.append(f"a dataclass{' of your own' * bool(kinds)} that has {', '.join(sorted(needed))}")
    return " or ".join([*([", ".join(kinds[:-1])] if kinds[1:] else []), kinds[-1]])


def _word(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin is tuple and args and args[-1] is ...:
        return f"a tuple; each of it is {_words(args[0])}"
    if origin is tuple:
        return f"a tuple of {len(args)}: {'; '.join(map(_words, args))}"
    return WORDS.get(origin or kind) or getattr(kind, "__name__", str(kind))


def _said(value: Any) -> str:
    """As it would be written, without what it holds where that is long."""
    if isinstance(value, type):
        return value.__name__
    if _is_value(value):
        return f"{type(value).__name__}({'...' * bool(dataclasses.fields(value))})"
    if isinstance(value, list):
        return f"[{', '.join(map(_said, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_said, value))}{',' * (len(value) == 1)})"
    text = repr(value)
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def _got(value: Any, hint: Any) -> str:
    if isinstance(value, type):
        return "a class"
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else full_name(kind)
    lacks = _needed(hint) - _public(kind) if _is_value(value) else ()
    return f"{name}, without {', '.join(sorted(lacks))}" if lacks else name


def _better(value: Any, hint: Any) -> str:
    """What may have been meant, as it is written."""
    if isinstance(value, type):
        fits = issubclass(value, tuple(_dataclasses(hint))) or _is_own(value, hint)
        return _made(value) if fits else ""
    if isinstance(value, str) and hint is Rules and value in PRESETS:
        return value
    for kind in _dataclasses(hint):
        if value == kind.__name__:
            return _made(kind)
    for other in _others(value):
        if not _wrong("", other, hint):
            return _said(other)
    return _within(value, hint)


def _made(kind: type) -> str:
    required = any(f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(kind))
    return f"{kind.__name__}({'...' * required})"


def _others(value: Any) -> Iterator[Any]:
    """Values that are nearly the same."""
    if isinstance(value, list):
        yield tuple(value)
    if isinstance(value, float) and value.is_integer() or isinstance(value, str) and value.isdecimal():
        yield int(value)
    if isinstance(value, Path):
        yield str(value)
    yield (value,)


def _within(value: Any, hint: Any) -> str:
    """The one choice of which one field takes this, with it there; a dict's items are fields."""
    found = []
    for kind in _dataclasses(hint):
        own = hints(kind)
        names = [f.name for f in dataclasses.fields(kind) if value is not None and not _wrong("", value, own[f.name])]
        given = value if isinstance(value, dict) and value.keys() <= own.keys() else dict.fromkeys(names, value)
        if given is value or len(names) == 1:
            found.append(f"{kind.__name__}({', '.join(f'{name}={_said(part)}' for name, part in given.items())})")
    return found[0] if len(found) == 1 else ""
