"""A trainer process that waits, with everything imported and no device touched, until its supervisor says what to run."""

from __future__ import annotations

import os
import signal

from jaxtrain.exits import Exit

if __name__ == "__main__":  # before what takes longer to import, and until the run listens: nothing would be lost
    signal.signal(signal.SIGINT, lambda *_: os._exit(Exit.INTERRUPTED))

import contextlib
import importlib
import json
import sys
import threading
import traceback

from jaxtrain.resilience import pulse
from jaxtrain.resilience.child import READY, die_with_parent

_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # Gloo's words, NCCL's
_NICENESS = 19  # while it imports: the trainers that run have the CPUs


def main(argv: list[str]) -> None:
    """CONFIG and overrides: what to import for. Then one line of JSON on stdin: {"env": {...}, "argv": [...]}; its end: leave."""
    die_with_parent()
    warming = threading.Thread(target=_warm, args=(argv,), daemon=True)
    warming.start()
    warming.join()
    print(READY, flush=True)
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    order = json.loads(line)
    os.environ.update(order["env"])
    sys.argv = ["jaxtrain", *order["argv"]]  # environment.json shows it
    pulse.mine()  # it has its orders

    from jaxtrain.__main__ import main as run

    code = 1
    try:
        code = run(order["argv"])
    except BaseException as error:
        print(in_words(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through exit handlers, which wait for peers that may be gone


def in_words(error: BaseException) -> str:
    """The traceback; of a collective whose other end is gone one line, for the supervisor names who ended."""
    of_jax = "jax" in sys.modules and isinstance(error, sys.modules["jax"].errors.JaxRuntimeError)
    if of_jax and any(words in str(error) for words in _PEER_GONE):
        return f"a collective failed, for another process is gone: {str(error).splitlines()[0][:200]}"
    return "".join(traceback.format_exception(error))


def _warm(argv: list[str]) -> None:
    """Imports what a run imports. On a thread, for a thread may be niced and the process not, which could not be undone."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    from jaxtrain.errors import UserError

    with contextlib.suppress(UserError):  # the run itself will say it
        from jaxtrain.config import load

        load(argv[0], argv[1:])
    for module in ("jaxtrain.train.run", "jaxtrain.checkpoint.save", "jaxtrain.checkpoint.storage"):
        importlib.import_module(module)


if __name__ == "__main__":
    main(sys.argv[1:])
