"""A checkpoint's files: sizes and checksums, atomic writing, which folders are checkpoints. It reads no array."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from zlib_ng import zlib_ng

MANIFEST = "manifest.json"
SAVING = ".saving"  # the suffix of a folder whose checkpoint is not there yet
DELETING = ".deleting"  # and of one whose checkpoint is not there any more
DAMAGED = ".damaged"  # and, with a number, of one that had a checkpoint's name and no manifest


class FileEntry(NamedTuple):
    """What a file must be: bytes, and CRC-32 as hex. A CRC finds every change of up to 32 neighbouring bits."""

    size: int
    crc32: str


def checksum(path: Path) -> FileEntry:
    """Reads the whole file: 14 GB/s from memory (zlib: 3.5; SHA-256: 1.5; on the loop's time), without holding the GIL."""
    size = crc = 0
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc = size + count, zlib_ng.crc32(buffer[:count], crc)
    return FileEntry(size, f"{crc:08x}")


def checksums(folder: Path, paths: Iterable[Path]) -> dict[str, FileEntry]:
    """By name relative to `folder`."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in sorted(paths) if path.is_file()}


def difference(path: Path, entry: FileEntry, *, content: bool) -> str | None:
    """In words how a file differs from its entry, None if it does not. Without `content` only the size is looked at."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != entry.size:
        return f"has {size:,} bytes, written were {entry.size:,}"
    if content and checksum(path) != entry:
        return "does not have the bytes that were written (CRC-32)"
    return None


def write_durably(path: Path, data: bytes) -> None:
    """Atomic, and on the disk when it returns."""
    fresh = path.with_name(f"{path.name}.tmp")
    with open(fresh, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_step(name: str) -> bool:
    """Whether a checkpoint may be called so: "80", not "080"."""
    return name.isdecimal() and name == str(int(name))


def steps(directory: Path) -> list[int]:
    """The steps, ascending, that have a checkpoint: a numbered folder with a manifest."""
    return sorted(int(path.parent.name) for path in directory.glob(f"*/{MANIFEST}") if is_step(path.parent.name))


def numbered(directory: Path) -> list[int]:
    """The steps, ascending, of all folders with a checkpoint's name. One without a manifest, which is there before the
    name is, is damaged: by hand, by another program, or a copy that was cut short."""
    return sorted(int(path.name) for path in directory.glob("*") if is_step(path.name) and path.is_dir())


def leftovers(directory: Path) -> list[Path]:
    """What saves and deletions that did not finish have left behind; folders of other programs are none."""
    return sorted(path for path in directory.glob("*") if path.suffix in (SAVING, DELETING) and is_step(path.stem))


def no_checkpoints(directory: Path) -> list[tuple[str, str]]:
    """What is no checkpoint but has a checkpoint's name, and why: ("damaged", "20"), ("unfinished", "30.saving")."""
    damaged = sorted({*numbered(directory)} - {*steps(directory)})
    return [*(("damaged", str(step)) for step in damaged), *(("unfinished", path.name) for path in leftovers(directory))]


def remove(leftover: Path) -> None:
    """A folder, or a file or a link in its place."""
    shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink(missing_ok=True)


def delete(folder: Path) -> None:
    """Removes a checkpoint; killed in between, it leaves something that is no checkpoint."""
    shutil.rmtree(doomed(folder))


def doomed(folder: Path) -> Path:
    """Takes a checkpoint's name away; -> what is to be removed."""
    other = folder.with_name(f"{folder.name}{DELETING}")
    remove(other)
    os.replace(folder, other)
    return other


def put_aside(folder: Path) -> None:
    """Out of a checkpoint's way, and kept: what has no manifest may be another program's."""
    names = (folder.with_name(f"{folder.name}{DAMAGED}.{number}") for number in count(1))
    folder.rename(next(path for path in names if not path.exists()))
