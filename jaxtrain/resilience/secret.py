"""The secret that the supervisors of a job share: from the environment, or a file in the run folder. It sends none."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from jaxtrain.errors import RunError

VARIABLE, FILE = "JAXTRAIN_JOB_SECRET", "job.secret"
LEAST_BYTES = 16
_BY_HAND = f"set {VARIABLE} to the same random text on all hosts"


def job_secret(env: Mapping[str, str], run_dir: Path) -> bytes:
    """$JAXTRAIN_JOB_SECRET, else what the run folder's job.secret holds, which whoever comes first makes.

    Raises RunError where it is too short to be one, or others can read or own the file.
    """
    if VARIABLE in env:
        return _long_enough(env[VARIABLE].strip().encode(), f"${VARIABLE}")
    path = run_dir / FILE
    try:
        if not os.path.lexists(path):
            _make(path)
        return _read(path)
    except OSError as error:
        raise RunError(
            f"The job's secret cannot be kept in {path}.",
            got=error.strerror or str(error),
            rule="all hosts share the run folder, and its file system knows permissions and links",
            fix=_BY_HAND,
        ) from error


def _make(path: Path) -> None:
    """Whole or not at all; of several at the same time the first wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "w") as text:
            text.write(secrets.token_hex(32) + "\n")
            text.flush()
            os.fsync(file)
        with suppress(FileExistsError):
            os.link(mine, path)
    finally:
        os.unlink(mine)


def _read(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise RunError(
                f"Others know the job's secret, or made it: {path}.",
                got=f"{stat.filemode(status.st_mode)}, owned by user {status.st_uid}",
                rule=f"a plain file that only user {os.geteuid()}, who runs the job, can read",
                fix=f"remove it, and the next start makes another; or {_BY_HAND}",
            )
        return _long_enough(file.read().strip(), str(path))


def _long_enough(secret: bytes, source: str) -> bytes:
    if len(secret) < LEAST_BYTES:
        raise RunError(
            f"{source} is too short for a secret.",
            got=f"{len(secret)} bytes",
            rule=f"at least {LEAST_BYTES}, chosen at random",
            fix="python -c 'import secrets; print(secrets.token_hex(32))' prints a good one",
        )
    return secret
