"""The manifest of a checkpoint: what is in it and what its bytes must be, as JSON. It is written last and holds no array."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint.files import MANIFEST, FileEntry, is_step, write_durably
from jaxtrain.errors import CheckpointError

FORMAT = 1


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


def in_words(error: BaseException) -> str:
    """Its type and text; of a long text both ends, since TensorStore puts what the system said last."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 300 else f'{text[:80]} ... {text[-200:]}'}"


@dataclass(frozen=True, kw_only=True)
class ArrayEntry:
    """One array. `spec`: the mesh axes of each dim where it was saved; `letters`: one letter per dim, if they were given."""

    shape: tuple[int, ...]
    dtype: str
    spec: list[Any]
    letters: str | None
    content: str  # hashing.content_hash in hex

    @property
    def empty(self) -> bool:
        return 0 in self.shape


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`config`, `data`: as given to save. `mesh`: sizes by axis. `arrays`, `files`: by name; all files but this one."""

    step: int
    config: dict[str, Any]
    data: dict[str, Any]
    mesh: dict[str, int]
    processes: int
    versions: dict[str, str]
    arrays: dict[str, ArrayEntry]
    files: dict[str, FileEntry] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Equal to `digest(state)` of the state that was saved."""
        from jaxtrain.checkpoint.hashing import combined

        return combined({name: (a.shape, a.dtype, a.content) for name, a in self.arrays.items()})


def write(folder: Path, manifest: Manifest) -> None:
    """From here on the folder is a checkpoint. Raises OSError."""
    write_durably(folder / MANIFEST, _bytes(asdict(manifest)))


def read(folder: Path) -> Manifest:
    """Raises CheckpointError where there is no checkpoint, DamagedError where its manifest is gone, was changed or is another step's."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if folder.is_dir() and is_step(folder.name):
            rule, fix = f"{MANIFEST} is written before the folder has its name", "a whole copy of it, or another step"
            raise DamagedError(f"{folder} is damaged.", got=f"{MANIFEST} is missing", rule=rule, fix=fix) from error
        rule, fix = f"a checkpoint is a folder with {MANIFEST}", "jaxtrain checkpoint list RUN_DIR"
        raise CheckpointError(f"{folder} is no checkpoint.", rule=rule, fix=fix) from error
    try:
        fields = json.loads(data)
        intact = _bytes({name: value for name, value in fields.items() if name not in ("format", "sha256")}) == data
    except (ValueError, AttributeError):
        intact = False
    if not intact:
        fix = "another step: jaxtrain checkpoint verify RUN_DIR says which are whole"
        raise DamagedError(f"{path} is damaged.", rule="its sha256 is that of its other fields", fix=fix)
    if fields.pop("format") != FORMAT:
        raise CheckpointError(f"{path} is of another format.", rule=f"format {FORMAT}", fix="a newer jaxtrain")
    if is_step(folder.name) and folder.name != str(fields["step"]):
        got, rule = f"its state is of step {fields['step']}", "a checkpoint's folder has its step as its name"
        raise DamagedError(f"{folder} is damaged.", got=got, rule=rule, fix="remove it, or give it its own name again")
    del fields["sha256"]
    arrays = {name: ArrayEntry(**row | {"shape": tuple(row["shape"])}) for name, row in fields.pop("arrays").items()}
    files = {name: FileEntry(*row) for name, row in fields.pop("files").items()}
    return Manifest(**fields, arrays=arrays, files=files)


def _bytes(fields: dict[str, Any]) -> bytes:
    """The one text of these fields, with a digest of itself: any other byte anywhere is found."""
    fields = {"format": FORMAT, **fields}
    text = json.dumps(fields, indent=1)
    return json.dumps({**fields, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1).encode()
