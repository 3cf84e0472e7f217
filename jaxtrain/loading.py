"""Executes a config's Python file as a module, and keeps what code of the user's that brought in. What the file has to
bind, it does not know."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType

from jaxtrain.errors import ConfigError, UserError
from jaxtrain.runtime import PACKAGES

_PREFIX = "config file "  # no import can ask for a module of such a name, so none is hidden
_STDLIB = Path(sysconfig.get_path("stdlib")).resolve()
_own_code: dict[str, str] = {}


def execute(path: Path) -> ModuleType:
    """The module that a file makes; while it runs it may import its neighbours. Raises ConfigError, and its own UserErrors.

    It stays in sys.modules: there typing looks up what the annotations of its classes name.
    """
    before = set(sys.modules)
    module = ModuleType(f"{_PREFIX}{path.resolve()}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        text = path.read_bytes()
        exec(compile(text, str(path), "exec", dont_inherit=True), vars(module))
    except UserError:
        raise
    except Exception as error:  # it is the user's code
        raise _does_not_load(path, error) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may change sys.path too
            sys.path.remove(folder)
    _own_code[f"file {path.name}"] = _digest(text)
    _own_code.update(_imported(set(sys.modules) - before - {module.__name__}))
    return module


def own_code() -> dict[str, str]:
    """{"file my.py": 16 hex digits, "module my_model": ...}: of the configs loaded so far, and of what they imported.

    Not of installed packages and the standard library, nor of ours, which `runtime.code_fingerprint` covers.
    """
    return dict(_own_code)


def _imported(names: set[str]) -> dict[str, str]:
    files = {name: Path(getattr(sys.modules.get(name), "__file__", None) or "") for name in names}
    own = {name: file for name, file in files.items() if name.partition(".")[0] not in PACKAGES and _is_own(file)}
    return {f"module {name}": _digest(file.read_bytes()) for name, file in own.items()}


def _is_own(file: Path) -> bool:
    installed = {"site-packages", "dist-packages"}.intersection(file.parts) or _STDLIB in file.resolve().parents
    return file.is_file() and not installed


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _does_not_load(path: Path, error: Exception) -> ConfigError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    parent, file = _parent(error)
    beside = file and path.parent.resolve() in file.parents
    return ConfigError(
        f"{path} does not load.",
        got=f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {error}{f'; {parent} is {file}' if file else ''}",
        rule="a config is a Python file that runs",
        fix=f"where another {parent} is meant, rename {_whole(file)}" if beside else "",
    )


def _parent(error: Exception) -> tuple[str, Path | None]:
    """Of a module that is not found in a package, that package and its file: it may hide another of its name."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    parent = (name or "").rpartition(".")[0]
    file = getattr(sys.modules.get(parent), "__file__", None)
    return parent, Path(file) if file else None


def _whole(file: Path) -> Path:
    return file.parent if file.stem == "__init__" else file


def full_name(kind: type) -> str:
    """`models.llama.Config`; of a class in a config's file my.py `my.Own`, wherever the file lies."""
    module = kind.__module__
    return f"{Path(module).stem if module.startswith(_PREFIX) else module}.{kind.__qualname__}"
