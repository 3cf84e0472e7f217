"""Finds out which process of how many this one is, from the environment. How they meet is meeting.py."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtrain.errors import RunError

OURS = ("JAXTRAIN_COORDINATOR", "JAXTRAIN_NUM_PROCESSES", "JAXTRAIN_PROCESS_ID")
SERVICE = "JAXTRAIN_SERVICE"  # instead of the first: a coordination service that no trainer hosts
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_BY_HAND = f"set {', '.join(OURS)} in every process"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One process of several: where process 0 listens ("host:port"), how many there are, which one this is.

    `gpus`: the only GPUs of this host that are its own; None: all that it sees. `hosted`: by process 0, which has to
    start the coordination service there; else that runs already.
    """

    coordinator: str
    count: int
    index: int
    gpus: list[int] | None = None
    hosted: bool = True


def member(env: Mapping[str, str] = os.environ) -> Member | None:
    """This process's place by JAXTRAIN_*, else Slurm, Open MPI or Kubernetes; None: it is alone. Raises RunError."""
    given = [name for name in (SERVICE, *OURS) if name in env]
    if given:
        return _ours(env, given)
    manager = _manager(env)
    return _detected(manager, env) if manager else None


def _ours(env: Mapping[str, str], given: list[str]) -> Member | None:
    if env.get(OURS[1]) == "1":
        return None
    count, index = (env.get(name, "") for name in OURS[1:])
    service = env.get(SERVICE)
    host, _, port = (service or env.get(OURS[0], "")).rpartition(":")
    if not (host and is_port(port) and count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise RunError(
            "The JAXTRAIN_* environment does not say who this process is.",
            got=", ".join(f"{name}={env[name]}" for name in given),
            rule=f"{OURS[0]}=host:port of process 0, a port of 1 to 65535, {OURS[1]}=N, {OURS[2]}=0..N-1, all three",
            fix="set all three in every process, or none",
        )
    return Member(coordinator=service or env[OURS[0]], count=int(count), index=int(index), hosted=not service)


def _manager(env: Mapping[str, str]) -> str:
    """The cluster manager that started several processes; "" where none did (a login shell, a pod by itself)."""
    if all(name in env for name in SLURM) and env["SLURM_NTASKS"] != "1":
        return "Slurm"
    if env.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    return ""


def _detected(manager: str, env: Mapping[str, str]) -> Member | None:
    """What jax's own detection says. It is private to jax: the same in 0.10 and 0.12, and called only here."""
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, initialization_timeout=60)
    except (RuntimeError, OSError, ValueError) as error:
        raise _undetected(manager, str(error)) from error
    coordinator, count, index, gpus = found
    if coordinator is None or count is None or index is None:
        raise _undetected(manager, "jax's detection found nothing")
    if count == 1:
        return None
    return Member(coordinator=coordinator, count=count, index=index, gpus=None if _all_gpus(env) else gpus)


def _undetected(manager: str, why: str) -> RunError:
    packages = {"Kubernetes": "pip install 'jax[k8s]', or ", "Open MPI": "pip install mpi4py, or "}
    return RunError(
        f"{manager} started this process, and its peers could not be found.",
        got=why,
        rule="a process that does not find its peers would train alone, beside them",
        fix=f"{packages.get(manager, '')}{_BY_HAND} ({OURS[1]}=1: alone)",
    )


def _all_gpus(env: Mapping[str, str]) -> bool:
    """Whether a process owns every GPU that it sees: it is alone on its host, or the manager bound GPUs to tasks.

    jax alone gives each Slurm or Open MPI process the one GPU of its local rank, and idles 7 of 8 with one per host.
    """
    one_per_node = env.get("SLURM_NTASKS", "") == env.get("SLURM_STEP_NUM_NODES")
    return one_per_node or "SLURM_GPUS_PER_TASK" in env or env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 65536


def few(items: Sequence[object]) -> str:
    """"1, 4, 7", and how many more than eight there are."""
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
