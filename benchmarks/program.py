"""What every benchmark does beside measuring: errors without a traceback, the command and machine of a result, its file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtrain.errors import UserError
from jaxtrain.exits import Exit

RESULTS = Path(__file__).parent / "results"


def run(main: Callable[..., int | None], *arguments: Any) -> None:
    """Ends the process with what `main` returns, or with the words of its error, as the command `jaxtrain` does."""
    try:
        sys.exit(main(*arguments))
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", Exit.MISUSED))


def write(out: Path | str | None, result: dict[str, Any], name: str = "") -> None:
    """Into `out`, else among the results, by the name of the benchmark or this one."""
    path = Path(out or RESULTS / f"{name or _stem()}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command()} | result, indent=1, default=str) + "\n")
    print(path)


def command() -> str:
    """As it was given, in words that a shell takes."""
    return shlex.join(["python", "-m", f"benchmarks.{_stem()}", *sys.argv[1:]])


def _stem() -> str:
    return Path(sys.argv[0]).stem


def facts(*packages: str) -> dict[str, Any]:
    """The machine and the versions of Python and of these packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    machine = {"system": platform.platform(), "cpu": cpu, "cores": len(os.sched_getaffinity(0))}
    machine["load"] = os.getloadavg()[0]  # of other processes too
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    return {"machine": machine, "versions": versions}
