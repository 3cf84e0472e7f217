"""The kinds of error that end a command with a message and no traceback. All share meshes' what/got/rule/fix shape."""

from jaxtrain.exits import Exit
from meshes.errors import LayoutError, UserError, closest

__all__ = ["CheckpointError", "ConfigError", "CorruptionError", "DataError", "HeldError", "LayoutError", "NumericsError"]
__all__ += ["RunError", "UserError", "closest"]


class ConfigError(UserError):
    """A config or an override that cannot be run."""


class DataError(UserError):
    """Input data that is missing, empty, truncated, corrupted or of another kind than declared."""

    exit_code = Exit.FAILED  # another host may see it whole


class CheckpointError(UserError):
    """A checkpoint that is missing, unfinished, damaged or of another shape."""

    exit_code = Exit.FAILED


class RunError(UserError):
    """A run folder, process group or machine that is not in a state to train."""

    exit_code = Exit.FAILED


class HeldError(RunError):
    """A run folder that another live process writes."""

    exit_code = Exit.HELD  # no host is to blame for it, and it may be over soon


class NumericsError(UserError):
    """A loss or gradient that is not finite."""

    exit_code = Exit.DIVERGED  # so that nobody starts it again as it is


class CorruptionError(UserError):
    """A device that computed or kept other bits than it should have. It ends a command with a code of its own."""

    exit_code = Exit.CORRUPTED  # so that a supervisor may put the host aside
