"""Which hosts a job has, in the order in which they may lead, and which of them this is. From the environment; it calls nobody."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtrain.cluster import is_port
from jaxtrain.errors import RunError

HOSTS, INDEX = "JAXTRAIN_HOSTS", "JAXTRAIN_HOST_INDEX"
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
PORTS = 4096  # the last ones, which a Slurm job's hosts have from the one of its number on: nodes may be on one machine
_GROUP = re.compile(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)*")  # of a list, up to a comma that is in no brackets
_RANGE = re.compile(r"\d+(-\d+)?")


@dataclass(frozen=True, kw_only=True)
class Roster:
    """`addresses`: "host:port" of every host's supervisor, by index; this is host `index`."""

    index: int
    addresses: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """By which hosts are called: without the port, where that tells them apart."""
        hosts = [address.rpartition(":")[0] for address in self.addresses]
        return tuple(hosts) if len({*hosts}) == len(hosts) else self.addresses

    @property
    def name(self) -> str:
        return self.names[self.index]

    @property
    def reach(self) -> str:
        """This host's address without the port."""
        return self.addresses[self.index].rpartition(":")[0]


def roster(env: Mapping[str, str] = os.environ) -> Roster | None:
    """By JAXTRAIN_HOSTS, else Slurm; None: this host is the only one. Raises RunError.

    JAXTRAIN_HOSTS is a list such as "a:7600,b:7600" or "host-[0-63].run:7600". The index is JAXTRAIN_HOST_INDEX or
    Kubernetes' JOB_COMPLETION_INDEX.
    """
    if HOSTS in env:
        return _ours(env)
    if all(name in env for name in SLURM) and env["SLURM_NTASKS"] != "1":
        return _slurm(env)
    return None


def _ours(env: Mapping[str, str]) -> Roster | None:
    addresses = expanded(env[HOSTS])
    index = env.get(INDEX, env.get("JOB_COMPLETION_INDEX", ""))
    ports = [is_port(address.rpartition(":")[2]) for address in addresses]
    if not (addresses and all(ports) and index.isdecimal() and int(index) < len(addresses) == len({*addresses})):
        raise RunError(
            "The environment does not say which host this is.",
            got=f"{HOSTS}={env[HOSTS]}, {INDEX}={index or 'nothing'}",
            rule=f"{HOSTS}=host:port of each host's supervisor, a port of 1 to 65535, all different; {INDEX} counts them from 0",
            fix="set both on every host, or neither where there is one host",
        )
    return Roster(index=int(index), addresses=tuple(addresses)) if len(addresses) > 1 else None


def _slurm(env: Mapping[str, str]) -> Roster:
    nodes, tasks = expanded(env["SLURM_STEP_NODELIST"]), int(env["SLURM_NTASKS"])
    if len(nodes) != tasks:
        raise RunError(
            "A host has one supervisor.",
            got=f"{tasks} tasks on {len(nodes)} nodes",
            rule="jaxtrain launch starts the trainers of its host itself",
            fix="srun --ntasks-per-node=1; the one trainer of a host drives all its GPUs",
        )
    ports = [65536 - PORTS + (int(env["SLURM_JOB_ID"]) + number) % PORTS for number in range(tasks)]
    return Roster(index=int(env["SLURM_PROCID"]), addresses=tuple(f"{node}:{port}" for node, port in zip(nodes, ports)))


def expanded(text: str) -> list[str]:
    """"a,n[01-03,7]x" -> a, n01x, n02x, n03x, n7x. Raises RunError."""
    return [name for group in _GROUP.findall(text) for name in _of(group.strip())]


def _of(group: str) -> list[str]:
    head, bracket, rest = group.partition("[")
    if not bracket:
        return [group] if group else []
    ranges, _, tail = rest.partition("]")
    numbers = []
    for part in ranges.split(","):
        if not _RANGE.fullmatch(part):
            raise RunError(
                "A list of hosts cannot be read.",
                got=f"[{ranges}] in {group!r}",
                rule="brackets hold numbers and ranges of them",
                fix=f"{HOSTS}='node-[01-16,20]:7600', or every host by its name",
            )
        first, _, last = part.partition("-")
        numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last or first) + 1)]
    return [f"{head}{number}{end}" for number in numbers for end in _of(tail) or [""]]
