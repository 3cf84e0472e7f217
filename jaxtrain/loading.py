"""Executes a config's Python file as a module. What the file has to bind, it does not know."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import ModuleType

from jaxtrain.errors import ConfigError, UserError

_PREFIX = "config file "  # no import can ask for a module of such a name, so none is hidden


def execute(path: Path) -> ModuleType:
    """The module that a file makes; while it runs it may import its neighbours. Raises ConfigError, and its own UserErrors.

    It stays in sys.modules: there typing looks up what the annotations of its classes name.
    """
    module = ModuleType(f"{_PREFIX}{path.resolve()}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
    except UserError:
        raise
    except Exception as error:  # it is the user's code
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        parent, file = _parent(error)
        beside = file and path.parent.resolve() in file.parents
        raise ConfigError(
            f"{path} does not load.",
            got=f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {error}{f'; {parent} is {file}' if file else ''}",
            rule="a config is a Python file that runs",
            fix=f"where another {parent} is meant, rename {_whole(file)}" if beside else "",
        ) from error
    finally:
        sys.path.pop(0)
    return module


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
