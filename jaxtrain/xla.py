"""XLA compiler flags as a config value, checked against the installed XLA before it reads them. It sets no more.

XLA ends the process at a flag that it does not know (jax issue 25404), so names are looked up first, in the libraries'
own constants: 309 of 309 flags of jaxlib 0.10.2, 350 of 350 of 0.12.0 and the CUDA plugin's are there, found in 0.03 s.
"""

from __future__ import annotations

import difflib
import importlib.util
import mmap
import os
import re
import shlex
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jaxtrain.errors import ConfigError

_NAME = re.compile(rb"xla_[a-z0-9_]+(?=\0)")


@dataclass(frozen=True, kw_only=True)
class XlaFlags:
    """Flags "name=value" added to XLA_FLAGS where the devices are GPUs; what XLA_FLAGS already sets stays as it is.

    None by default. The latency-hiding scheduler, which lists of recommended flags begin with, is on by itself: with
    the flag a step of two layers for 8 H200 compiles to the same bytes as without (jax 0.10.2 and 0.12.0.1, no GPU
    there). Of the 21 collectives of a scanned step, 5 stand over a matmul; pipelined all-gathers make that 4 of 25,
    double-buffered loops besides 9 of 41, combining up to 1 GB 3 of 16. Which is faster only your own run can say.
    """

    gpu: tuple[str, ...] = ()


def add_flags(flags: XlaFlags, env: MutableMapping[str, str] = os.environ) -> None:
    """Writes XLA_FLAGS into `env`, before the first use of a device. Raises ConfigError for a name unknown to XLA."""
    _check(_words(_text(env.get("XLA_FLAGS", ""))), "XLA_FLAGS")
    check(flags)
    if on_gpu(env):
        _add(flags.gpu, env)


def add_known(flags: Mapping[str, str], env: MutableMapping[str, str] = os.environ) -> None:
    """The same of flags by name, but for those that an XLA here does not know."""
    known = [known_flags(library) for library in libraries()]
    _add([f"{name}={value}" for name, value in flags.items() if all(name in each for each in known)], env)


def check(flags: XlaFlags) -> None:
    """Raises ConfigError for a name unknown to the XLA that is installed here, GPU or not."""
    _check(list(flags.gpu), "xla.gpu of the config")


def on_gpu(env: Mapping[str, str]) -> bool:
    """Whether jax will run on NVIDIA GPUs here: as JAX_PLATFORMS says, else a CUDA plugin and a card are there."""
    platforms = env.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] in ("cuda", "gpu")
    return bool(_plugins()) and any(Path("/dev").glob("nvidia[0-9]*"))


@cache
def known_flags(library: Path) -> frozenset[str]:
    """Every name that may be a flag of the XLA inside this library: its constant strings `xla_...`."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return frozenset(match.group().decode() for match in _NAME.finditer(data, *_constants(data)))


def libraries() -> list[Path]:
    """The libraries that read XLA_FLAGS: jaxlib's own and each CUDA plugin's."""
    folders = [Path(folder) for folder in _locations("jaxlib")] + _plugins()
    found = [max(folder.glob("*.so"), key=lambda path: path.stat().st_size, default=None) for folder in folders]
    return [path for path in found if path]


def _add(words: Iterable[str], env: MutableMapping[str, str]) -> None:
    theirs = _text(env.get("XLA_FLAGS", ""))
    taken = {_name(word) for word in _words(theirs)}
    ours = [f"--{word.lstrip('-')}" for word in words if _name(word) not in taken]
    if ours:
        env["XLA_FLAGS"] = " ".join([*([theirs] if theirs else []), *ours])


def _plugins() -> list[Path]:
    return [path for root in _locations("jax_plugins") for path in Path(root).glob("xla_cuda*")]


def _locations(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []


def _check(words: list[str], source: str) -> None:
    if not words:
        return
    found = libraries()
    if not found:
        print(f"{source}: flags are not checked, jaxlib's library was not found", file=sys.stderr)
    for library in found:
        known = known_flags(library)
        for word in words:
            if _name(word) not in known:
                raise ConfigError(
                    f"{source} has {_name(word)!r}, which this XLA does not know.",
                    got=word,
                    rule=f"a flag of {library.parent.name}/{library.name}: XLA ends the process at any other",
                    fix=_near(_name(word), known),
                )


def _near(name: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "remove it"


def _text(value: str) -> str:
    """XLA_FLAGS is the flags themselves or, where it does not start with a dash, a file that holds them."""
    if not value.strip() or value.lstrip().startswith("-"):
        return value.strip()
    try:
        return Path(value).read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"XLA_FLAGS names a file that cannot be read: {error.strerror}.",
            got=value,
            rule='XLA_FLAGS is "--name=value ..." or the path of a file with that',
        ) from error


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"XLA_FLAGS cannot be read: {str(error)[:1].lower()}{str(error)[1:]}.",
            got=text,
            rule="quotes in it come in pairs",
            fix="close the quote, or leave it out",
        ) from error


def _name(word: str) -> str:
    return word.lstrip("-").partition("=")[0]


def _constants(data: mmap.mmap) -> tuple[int, int]:
    """Where an ELF file's .rodata begins and ends (a 20th of the file); all of a file of another kind."""
    if data[:5] != b"\x7fELF\x02":
        return 0, len(data)
    return dict(_sections(data)).get(b".rodata", (0, len(data)))


def _sections(data: mmap.mmap) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(name, (first byte, end)) of each section: System V ABI, ELF-64 object file format, "Sections"."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<3H", data, 0x3A)
    headers = [struct.unpack_from("<2I4Q", data, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    for name, _, _, _, offset, length in headers:
        start = names + name
        yield data[start : data.find(b"\0", start)], (offset, offset + length)
