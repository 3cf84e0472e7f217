"""Lets the processes of a run meet before jax does: by a deadline each learns that all are there, or who is missing.

jax's own meeting ends in SIGABRT at its deadline and names nobody. Process 0 listens on the coordinator's port, which
is free for jax again when `meet` returns.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time

from jaxtrain.cluster import Member, few
from jaxtrain.descriptors import more_descriptors
from jaxtrain.errors import RunError

_VERDICT_S = 15.0  # how much longer than the deadline a process waits to hear from process 0 who is missing
_HELLO_S = 2.0  # for one line from a process that has connected


def meet(me: Member, host: str, deadline_s: float) -> None:
    """Returns when all processes have arrived; else the same RunError on all that did: missing, twice, miscounted."""
    end = time.monotonic() + deadline_s
    if me.index == 0:
        _welcome(me, host, end)
    else:
        _arrive(me, host, end)


def _welcome(me: Member, host: str, end: float) -> None:
    more_descriptors()
    lobby = _Lobby(me, host)
    with _listen(me) as server:
        problem = lobby.fill(server, end)
    for line in lobby.lines:  # the port is free by now, and whoever answers there next is jax
        with contextlib.suppress(OSError), line:
            line.sendall(json.dumps(problem).encode() + b"\n")
    if problem:
        raise RunError(**problem)


def _listen(me: Member) -> socket.socket:
    port = int(me.coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=me.count)
    except OSError as error:
        raise RunError(
            f"Process 0 cannot listen on port {port}: {error.strerror}.",
            got=f"coordinator {me.coordinator}",
            rule="the coordinator's port is free on the host of process 0",
            fix="choose another port, or end what holds it",
        ) from error


class _Lobby:
    """Those that have arrived at process 0, with the lines on which they wait for its verdict."""

    def __init__(self, me: Member, host: str):
        self.me, self.lines = me, []
        self.hosts: dict[int, str] = {0: host}
        self._line_of: dict[int, socket.socket] = {}

    def fill(self, server: socket.socket, end: float) -> dict[str, str] | None:
        """Until all are here: None, or what is wrong, as the arguments of a RunError."""
        while not self._complete():
            try:
                line = _accept(server, end)
            except OSError as error:
                return _full(self.me.count, len(self.hosts), error)
            if line is None:
                return _missing(self.me.count, self.hosts)
            problem = self._admit(line)
            if problem:
                return problem
        return None

    def _complete(self) -> bool:
        """Whether all are here, and still are: those that hung up while they waited are no longer counted."""
        if len(self.hosts) < self.me.count:
            return False
        gone = [index for index, line in self._line_of.items() if _hung_up(line)]
        for index in gone:
            del self.hosts[index], self._line_of[index]
        return not gone

    def _admit(self, line: socket.socket) -> dict[str, str] | None:
        index, count, host = _hello(line)
        if index is None:
            return line.close()  # no process of ours: a port scan, a stale client
        self.lines.append(line)
        if count != self.me.count:
            return _counts(f"process 0 ({self.hosts[0]}) says {self.me.count}, process {index} ({host}) says {count}")
        if index in self.hosts and not _hung_up(self._line_of.get(index)):
            return _twice(index, self.hosts[index], host)
        self.hosts[index], self._line_of[index] = host, line
        return None


def _accept(server: socket.socket, end: float) -> socket.socket | None:
    server.settimeout(max(0.01, end - time.monotonic()))
    try:
        return server.accept()[0]
    except TimeoutError:
        return None


def _hello(line: socket.socket) -> tuple[int | None, int, str]:
    line.settimeout(_HELLO_S)
    try:
        index, count, host = json.loads(line.makefile("rb").readline(1000))
        return int(index), int(count), str(host)
    except (OSError, ValueError, TypeError):
        return None, 0, ""


def _hung_up(line: socket.socket | None) -> bool:
    """Whether the process at the other end has gone: one that the cluster manager restarted may take its place."""
    if line is None:
        return False
    line.settimeout(0.0)
    try:
        return not line.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _arrive(me: Member, host: str, end: float) -> None:
    why = "nothing was tried"
    while (left := end - time.monotonic()) > 0:
        try:
            answer = _call(me, host, left)
        except (OSError, ValueError) as error:
            why = str(error) or type(error).__name__
            time.sleep(min(0.2, left))
        else:
            if answer:
                raise RunError(**answer)
            return _await_jax(me)
    raise RunError(
        f"Process {me.index} cannot reach process 0.",
        got=f"{me.coordinator}: {why}",
        rule="process 0 listens there, and answers when all processes have arrived",
        fix="see whether process 0 started and what it printed; the address must be routable from this host",
    )


def _await_jax(me: Member) -> None:
    """Until jax's service listens: a client that comes before it tries again only after 1.2 s."""
    for _ in range(200):
        with contextlib.suppress(OSError):
            return _connect(me, 1.0).close()
        time.sleep(0.01)


def _connect(me: Member, timeout: float) -> socket.socket:
    name, _, port = me.coordinator.rpartition(":")
    return socket.create_connection((name.strip("[]"), int(port)), timeout)


def _call(me: Member, host: str, left: float) -> dict[str, str] | None:
    with _connect(me, min(5.0, left)) as line:
        line.sendall(json.dumps([me.index, me.count, host]).encode() + b"\n")
        line.settimeout(left + _VERDICT_S)
        answer = line.makefile("rb").readline()
    if not answer:
        raise ConnectionResetError("it hung up")
    return json.loads(answer)


def _missing(count: int, hosts: dict[int, str]) -> dict[str, str]:
    absent = [index for index in range(count) if index not in hosts]
    return dict(
        what=f"{len(absent)} of {count} processes did not arrive: {few(absent)}.",
        got="arrived: " + few([f"{index} ({name})" for index, name in sorted(hosts.items())]),
        rule="all processes arrive at process 0 before the deadline",
        fix="look at the output and the hosts of those that are missing",
    )


def _full(count: int, arrived: int, error: OSError) -> dict[str, str]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return dict(
        what=f"Process 0 cannot accept all {count} processes: {error.strerror}.",
        got=f"{arrived} arrived; process 0 may have {limit} files and sockets open",
        rule="process 0 holds one connection to each process until all have arrived",
        fix=f"on the host of process 0 ulimit -Hn {2 * count}, or LimitNOFILE={2 * count} in the unit that starts it",
    )


def _counts(got: str) -> dict[str, str]:
    return dict(
        what="The processes disagree on how many they are.",
        got=got,
        rule="one count for all processes of a run",
        fix="start all of them by the same command; end what is left of an earlier run",
    )


def _twice(index: int, first: str, second: str) -> dict[str, str]:
    return dict(
        what=f"Two processes say that they are process {index}.",
        got=f"one on {first}, one on {second}",
        rule="each process has an index of its own",
        fix="JAXTRAIN_PROCESS_ID counts 0, 1, 2, ... over the processes",
    )
