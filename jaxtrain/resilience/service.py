"""The coordination service of jax.distributed outside the trainers, so that no trainer is needed for the others to live.

It knows no secret, as XLA's own does not: whoever reaches it may end the generation, so it listens where it has to.
It touches jaxlib's private service (checked with jax 0.10.2 and 0.12.0). `serve` runs in a process of its own:
when it ends, every trainer that still holds a client of it dies.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys

from jaxtrain.coordination import HEARTBEAT_S
from jaxtrain.resilience.child import READY, die_with_parent

ALL = "[::]"  # interfaces


def bound(host: str) -> str:
    """Where to listen so that whoever dials `host` arrives; on all interfaces where that cannot be known here."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
        for family, kind, _, _, address in found:
            with socket.socket(family, kind) as probe:
                probe.bind(address)
    except OSError:
        return ALL  # no address of this machine, which is behind another's
    own = any(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
    if own and host != "localhost" and not _is_address(host):
        return ALL  # by /etc/hosts, as Debian writes it, a machine's name is loopback to the machine itself
    return host


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return False


def serve(host: str, port: int, count: int) -> None:
    """Until stdin closes: the service for `count` trainers, which dial this host and port. Imports jaxlib alone, 0.2 s and
    100 MB."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # cluster managers send them to all processes; trainers still save
        signal.signal(number, signal.SIG_IGN)
    from jaxlib import _jax

    service = _jax.get_distributed_runtime_service(
        f"{bound(host)}:{port}", count, heartbeat_timeout=HEARTBEAT_S, shutdown_timeout=1
    )
    print(READY, flush=True)
    sys.stdin.read()
    del service


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
