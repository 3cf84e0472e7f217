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
        raise ConfigError(
            f"{path} does not load.",
            got=f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {error}",
            rule="a config is a Python file that runs",
        ) from error
    finally:
        sys.path.pop(0)
    return module


def full_name(kind: type) -> str:
    """`models.llama.Config`; of a class in a config's file my.py `my.Own`, wherever the file lies."""
    module = kind.__module__
    return f"{Path(module).stem if module.startswith(_PREFIX) else module}.{kind.__qualname__}"
