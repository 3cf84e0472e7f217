"""The shape all commands share: `jaxtrain VERB CONFIG [flags of the verb] [overrides of the config]`. It runs nothing."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain.errors import ConfigError

if TYPE_CHECKING:
    from jaxtrain.config import RunConfig


HELP = {"-h", "--help"}
_FIELD = re.compile(r"    (\w+): .*  # (.*)")


@dataclass(frozen=True, kw_only=True)
class Process:
    """Flags that every command with a CONFIG takes."""

    fake_devices: int | None = None  # run on this many CPU devices, whatever the machine has

    def __post_init__(self) -> None:
        if self.fake_devices is not None and self.fake_devices < 1:
            raise ConfigError(f"--fake-devices {self.fake_devices} is no number of devices.", rule="at least 1")


@dataclass(frozen=True)
class Call:
    """A parsed command line: the config's path, its overrides as text, and the verb's own options."""

    config: Path
    overrides: list[str]
    process: Process
    options: Any

    def load(self, *also: type) -> RunConfig:
        """The config with its overrides. `also`: more flags that an unknown one may have meant. Raises ConfigError."""
        return self.load_both(*also)[1]

    def load_both(self, *also: type) -> tuple[RunConfig, RunConfig]:
        """The config as its file says, of which only the kinds are checked, and as `load` gives it."""
        from jaxtrain.config import load_both

        return load_both(self.config, self.overrides, _names(type(self.options), Process, *also))


def parse(prog: str, options: type, argv: list[str], doc: str) -> Call:
    """Splits `argv` into CONFIG, the fields of `options` and Process, and overrides. --help prints and exits."""
    if wants_help(argv):
        show_help(prog, options, argv, doc)
        raise SystemExit(0)
    from jaxtrain.overrides import check_once, read

    path, pairs = _split(prog, argv)
    own = _names(options, Process)
    mine = [words for words in pairs if _name(words[0]) in own]
    several = {field.name for field in dataclasses.fields(options) if isinstance(field.default, tuple)}
    check_once([word for words in mine for word in words], lambda path: path[-1] in several)
    parsed = [read(prog, kind, _of(mine, kind)) if _of(mine, kind) else kind() for kind in (options, Process)]
    rest = [word for words in pairs if _name(words[0]) not in own for word in words]
    return Call(Path(path), rest, process=parsed[1], options=parsed[0])


def wants_help(argv: list[str]) -> bool:
    return not HELP.isdisjoint(argv)


def show_help(prog: str, options: type, argv: list[str], doc: str, *more: type, note: str = "") -> None:
    """The verb's own flags, those of `more` first; with a CONFIG every field of it too, as the overrides in `argv` make it."""
    from jaxtrain.overrides import print_help

    print(f"usage: {inspect.cleandoc(doc)}\n")
    for kind in (*more, options, Process):
        print("\n".join(_described(kind)))
    if note:
        print(f"\n{note}")
    words = [word for word in argv if word not in HELP]
    if words and not words[0].startswith("-"):
        print()
        print_help(parse(prog, options, words, doc).load(*more), f"{prog} {words[0]}")
    else:
        print(f"\n{prog} CONFIG --help lists the fields of that config.")


def _described(kind: type) -> Iterator[str]:
    """A line for each flag, and one for the comment behind its field."""
    lines = [line for base in kind.__mro__[:-1] for line in inspect.getsource(base).splitlines()]
    comments = dict(found.groups() for line in lines if (found := _FIELD.fullmatch(line)))
    for field in dataclasses.fields(kind):
        yield f"  --{field.name.replace('_', '-'):<20} {field.type} (default: {field.default!r})"
        if field.name in comments:
            yield f"{'':<25}{comments[field.name]}"


def _split(prog: str, argv: list[str]) -> tuple[str, list[list[str]]]:
    """["c.py", "--a", "1", "--b=2"] -> "c.py" and [["--a", "1"], ["--b=2"]]."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError(
            f"{prog} needs a CONFIG first.",
            got=" ".join(argv) or "nothing",
            rule=f"{prog} CONFIG [flags]",
            fix=f"a file such as configs/quickstart.py; {prog} --help lists the flags",
        )
    groups: list[list[str]] = []
    for word in argv[1:]:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise ConfigError(f"{word!r} belongs to no flag.", rule=f"{prog} takes one CONFIG, then flags")
    return argv[0], groups


def _name(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0].replace("-", "_")


def _of(groups: list[list[str]], kind: type) -> list[str]:
    return [word for words in groups if _name(words[0]) in _names(kind) for word in words]


def _names(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}
