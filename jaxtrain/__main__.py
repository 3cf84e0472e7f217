"""`jaxtrain VERB ...`: finds the verb's module, runs it, turns a UserError into a message. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from typing import TextIO

VERBS = {
    "train": ("jaxtrain.train.command", "train a config; the same command resumes"),
    "launch": ("jaxtrain.launch.command", "train a config with several processes, here, by Slurm or by Kubernetes"),
    "show": ("jaxtrain.show", "print every value of a config and where it comes from"),
    "sample": ("jaxtrain.sample", "write text with a run's newest checkpoint"),
    "data": ("jaxtrain.data.command", "prepare, verify and list training data"),
    "faults": ("jaxtrain.resilience.soak", "what can go wrong, and campaigns in which it does"),
    "replay": ("jaxtrain.resilience.replay", "compute steps of a run again and compare bit by bit"),
    "checkpoint": ("jaxtrain.checkpoint.command", "list, show, verify, diff, hash and export checkpoints"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code, one of exits.py."""
    from jaxtrain.errors import ConfigError, UserError, closest
    from jaxtrain.exits import Exit

    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            code = Exit.DONE
        elif argv[0] in VERBS:
            code = importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])
        else:
            raise ConfigError(f"jaxtrain has no command {argv[0]!r}.", fix=closest(argv[0], VERBS))
        _flush(sys.stdout)
        return code
    except BrokenPipeError:  # who reads has left: `jaxtrain show CONFIG | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.UNREAD
    except UserError as error:
        runtime = sys.modules.get("jaxtrain.runtime")  # where there may be several processes
        _flushed(sys.stdout)
        code, said = getattr(error, "exit_code", Exit.MISUSED), f"{type(error).__name__}: {error}"
        print(f"{runtime.place() if runtime else ''}{said}", file=sys.stderr, flush=True)
        if runtime:
            runtime.last_words(said, code)
        return code
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _usage() -> str:
    rows = [f"  {verb:<11} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(["usage: jaxtrain VERB ...", "", *rows, "", "jaxtrain VERB --help says more."])


def entry() -> None:
    """The process: runs `main` and leaves. After a failure at once: `exit` would wait for peers at jax's shutdown barrier,
    and let the threads of sinks that failed print their own tracebacks over the message."""
    try:
        code = main()
    except Exception as error:  # a fault of ours, or of the user's own model, sink or ending
        code = 1
        _flushed(sys.stdout)
        traceback.print_exc()
        if runtime := sys.modules.get("jaxtrain.runtime"):
            runtime.last_words(repr(error), code)
    if code:
        _flushed(sys.stdout)
        _flushed(sys.stderr)
        os._exit(code)


def _flushed(stream: TextIO | None) -> None:
    """As far as it can be."""
    with contextlib.suppress(Exception):
        _flush(stream)


def _flush(stream: TextIO | None) -> None:
    """None is one that was closed before the start: `jaxtrain ... >&-`. Raises RunError for a disk that is full."""
    from jaxtrain.errors import RunError

    try:
        if stream:
            stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python tries again where it ends: 120
        raise RunError("the output was not written.", got=error.strerror or str(error)) from error


if __name__ == "__main__":
    entry()
