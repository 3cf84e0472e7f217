"""What every cluster is asked for: so many hosts, one command on each, so much warning. How, its own file says."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.command import Call
from jaxtrain.config import RunConfig
from jaxtrain.errors import ConfigError, RunError
from jaxtrain.layout import check_layout

HOST_VERB = "launch"  # what one host runs: `jaxtrain HOST_VERB CONFIG ...`


@dataclass(frozen=True, kw_only=True)
class Job:
    """Flags that every cluster takes."""

    nodes: int | None = None  # hosts; must be given
    spares: int = 0  # of these, how many wait for another to fail
    gpus_per_node: int = 8  # 0: train on CPUs
    grace_seconds: int = 120  # from SIGTERM to SIGKILL; the last checkpoint has nine tenths of it
    accept_changes: bool = False  # continue a run folder with a config that differs from its own
    dry_run: bool = False  # print it; write and submit nothing


def checked(call: Call) -> RunConfig:
    """The call's config, if it can run on that many hosts: better now than after a day in the queue. Raises UserError."""
    job: Job = call.options
    config = call.load()
    least = {"nodes": 1, "gpus_per_node": 0, "grace_seconds": 1, "spares": 0}
    for name, bound in least.items():
        value, flag = getattr(job, name), f"--{name.replace('_', '-')}"
        if value is None:
            raise ConfigError(f"{flag} is missing.", rule="how many hosts the run is to have", fix=f"{flag} 2")
        if value < bound:
            raise ConfigError(f"{flag} {value} is too small.", rule=f"at least {bound}")
    if job.spares >= job.nodes:
        raise ConfigError(f"--spares {job.spares} leaves no host.", got=f"--nodes {job.nodes}", rule="fewer spares than nodes")
    check_layout(config, (job.nodes - job.spares) * (call.process.fake_devices or job.gpus_per_node or 1))
    return config


def host_command(call: Call, python: Sequence[str]) -> list[str]:
    """What one host runs; the same words on all of them."""
    fake = ["--fake-devices", str(call.process.fake_devices)] if call.process.fake_devices else []
    accept = ["--accept-changes"] if call.options.accept_changes else []
    spares = ["--spares", str(call.options.spares)] if call.options.spares else []
    return [*python, HOST_VERB, *spares, str(call.config), *fake, *accept, *call.overrides]


def header(what: str, argv: Sequence[str]) -> str:
    """How a file came to be, as comments: of several lines where a word has them."""
    made = shlex.join(["jaxtrain", "launch", *argv])
    return "".join(f"# {line}\n" for line in f"{what}\nMade by, and made anew by: {made}".splitlines())


def write(path: Path, text: str, mode: int) -> None:
    """Atomic. Raises RunError."""
    fresh = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text)
        fresh.chmod(mode)
        os.replace(fresh, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}.",
            got=error.strerror or str(error),
            fix="free space, give write permission, or choose another --runs-dir",
        ) from error
