"""The kinds of error that end a command with a message and no traceback. All share meshes' what/got/rule/fix shape."""

from meshes.errors import LayoutError, UserError, closest

__all__ = ["CheckpointError", "ConfigError", "DataError", "LayoutError", "NumericsError", "RunError", "UserError", "closest"]


class ConfigError(UserError):
    """A config or an override that cannot be run."""


class DataError(UserError):
    """Input data that is missing, empty, truncated, corrupted or of another kind than declared."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unfinished, damaged or of another shape."""


class RunError(UserError):
    """A run folder, process group or machine that is not in a state to train."""


class NumericsError(UserError):
    """A loss or gradient that is not finite."""
