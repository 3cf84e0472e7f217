"""`jaxtrain launch --slurm`: writes the batch script of a run into its folder and submits it. It waits for nothing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.command import Call, parse
from jaxtrain.config import RunConfig
from jaxtrain.errors import ConfigError, RunError
from jaxtrain.exits import AGAIN, FINAL, Exit
from jaxtrain.launch import job

SUBMIT_S = 60.0  # for sbatch; a controller that is busy answers within its MessageTimeout, 10 s by default


@dataclass(frozen=True, kw_only=True)
class Slurm(job.Job):
    """Flags of `jaxtrain launch --slurm`."""

    time: str | None = None  # limit of one allocation, such as 2-00:00:00; then it is queued again
    sbatch: tuple[str, ...] = ()  # more options of sbatch without their dashes: partition=gpu account=me


SCRIPT = """\
#!/bin/bash
{header}{directives}

# SIGTERM comes {grace} s before the time limit, from --signal above. After scancel, scontrol requeue and preemption
# Slurm itself sends it, and SIGKILL follows after KillWait (scontrol show config) or the partition's GraceTime.
export JAXTRAIN_GRACE_SECONDS={grace}

newest() {{ ls {folder}/"$1" 2>/dev/null | grep -x '[0-9]*' | sort -n | tail -n 1; }}
before=$(newest checkpoints)
term=$(newest terms)

# A supervisor per host. Where one is lost the others go on without it, and all that are left end together.
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --no-kill --label \\
    {command}
code=$?

# srun has the highest code of all hosts, that of a lost one too; the lead has left the job's own.
last=$(newest terms)
if [[ $last != "$term" ]]; then
    ended=$(sed -n 's/^ended \\([0-9]*\\).*/\\1/p' {folder}/terms/"$last".life 2>/dev/null)
    code=${{ended:-$code}}
fi

# The same job again. After scancel this script is dead by now; a host that Slurm finds gone it queues again itself.
why=
case $code in
    {again}) why="preempted" ;;
    {done} | {final}) ;;
    *) [[ $(newest checkpoints) == "$before" ]] || why="failed after a new checkpoint" ;;  # without one it would fail again
esac
if [[ $why ]]; then
    echo "$why, exit code $code: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def main(argv: list[str]) -> int:
    """jaxtrain launch --slurm CONFIG --nodes N [--gpus-per-node N] [--time T] [--sbatch partition=P ...] [overrides]"""
    call = parse("jaxtrain launch --slurm", Slurm, argv, doc=main.__doc__)
    config = job.checked(call)
    text = script(call, config, argv)
    if call.options.dry_run:
        print(text, end="")
        return 0
    path = config.run_dir / "slurm.sh"
    job.write(path, text, 0o755)
    print(f"script  {path}; edited, it is submitted by: sbatch {shlex.quote(str(path))}")
    number = submit(path)
    print(f"job     {number}, also after it was queued again; scancel {number} ends it\noutput  {_output(config, number)}")
    return 0


def script(call: Call, config: RunConfig, argv: Sequence[str]) -> str:
    """The batch script."""
    command = job.host_command(call, [sys.executable, "-m", "jaxtrain"])
    return SCRIPT.format(
        header=job.header(f"{config.name} on {call.options.nodes} hosts.", ["--slurm", *argv]),
        directives="\n".join(f"#SBATCH --{line}" for line in directives(call.options, config)),
        command=" \\\n        ".join(shlex.join(words) for words in _lines(command)),
        grace=call.options.grace_seconds,
        folder=shlex.quote(str(config.run_dir.absolute())),
        again=_cases(AGAIN),
        done=int(Exit.DONE),
        final=_cases(FINAL),
    )


def directives(options: Slurm, config: RunConfig) -> list[str]:
    """The options of sbatch, later ones in force: ours, then the user's."""
    ours = {
        "job-name": config.name,
        "dependency": "singleton",  # one job of this name at a time: they write one run folder
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "exclusive": None,
        "mem": 0,  # all of it
        "gpus-per-node": options.gpus_per_node or _LEFT_OUT,
        "time": options.time or _LEFT_OUT,
        "no-kill": None,  # the job outlives a node
        "requeue": None,
        "signal": f"TERM@{options.grace_seconds}",  # to the tasks, not to this script
        "chdir": Path.cwd(),
        "output": _output(config, "%j"),
        "open-mode": "append",
    }
    lines = [name if value is None else f"{name}={_quoted(value)}" for name, value in ours.items() if value is not _LEFT_OUT]
    return [*lines, *(_own(word) for word in options.sbatch)]


def submit(path: Path) -> str:
    """The job's number. Raises RunError."""
    try:
        done = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True, timeout=SUBMIT_S)
    except FileNotFoundError as error:
        fix = f"run this on a login node of the cluster; --dry-run prints the script; it is in {path}"
        raise RunError("sbatch is not here.", rule="Slurm's commands are on the PATH", fix=fix) from error
    except subprocess.TimeoutExpired as error:
        raise RunError("sbatch does not answer.", got=f"{SUBMIT_S:.0f} s waited", fix="squeue --me says what came of it") from error
    if done.returncode:
        raise RunError("sbatch refused the job.", got=done.stderr.strip(), fix=f"other flags, or edit {path} and sbatch it")
    return done.stdout.strip().partition(";")[0]


def _output(config: RunConfig, number: str) -> Path:
    return config.run_dir.absolute() / f"slurm-{number}.out"


_LEFT_OUT = object()


def _quoted(value: object) -> str:
    """As sbatch reads it: quotes keep blanks together, and there is no shell."""
    text = str(value)
    return f'"{text}"' if " " in text else text


def _cases(codes: Sequence[Exit]) -> str:
    return " | ".join(str(int(code)) for code in codes)


def _own(word: str) -> str:
    name = word.partition("=")[0]
    if not name or name.startswith("-") or "\n" in word:
        raise ConfigError(
            "--sbatch does not take this.",
            got=repr(word),
            rule="options of sbatch as name or name=value, without dashes",
            fix="--sbatch partition=gpu account=me",
        )
    return word


def _lines(command: Sequence[str]) -> list[list[str]]:
    """["python", "-m", "x", "--a", "1"] -> [["python", "-m", "x"], ["--a", "1"]]: a flag a line."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return lines
