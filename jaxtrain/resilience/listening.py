"""Where the supervisors of a job meet: addresses, and the socket that listens. Accepts nobody."""

from __future__ import annotations

import socket

from jaxtrain.descriptors import DESCRIPTORS
from jaxtrain.errors import RunError


def split(address: str) -> tuple[str, int]:
    """Host, which may be empty, and port."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise RunError(f"{address!r} is no address.", rule="host:port", fix="for example node-1:7600")
    return host.strip("[]"), int(port)


def listen(address: str) -> socket.socket:
    """Raises RunError where it cannot; without a host on all interfaces, IPv6 and IPv4."""
    host, port = split(address)
    try:
        if host:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            server = socket.create_server((host, port), family=family, backlog=DESCRIPTORS)
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=DESCRIPTORS)
    except OSError as error:
        raise RunError(
            f"The lead cannot listen on {address}.",
            got=error.strerror or str(error),
            rule="the address is this host's, and its port is free",
            fix="choose another port, or end what holds it",
        ) from error
    server.setblocking(False)
    return server
