"""The coordination service of jax.distributed outside the trainers, so that no trainer is needed for the others to live.

It touches jaxlib's private service (checked with jax 0.10.2 and 0.12.0). `serve` runs in a process of its own:
when it ends, every trainer that still holds a client of it dies.
"""

from __future__ import annotations

import signal
import sys

from jaxtrain.coordination import HEARTBEAT_S
from jaxtrain.resilience.child import READY, die_with_parent


def serve(port: int, count: int) -> None:
    """Until stdin closes: the service for `count` trainers on this port. Imports jaxlib alone, 0.2 s and 100 MB."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # cluster managers send them to all processes; trainers still save
        signal.signal(number, signal.SIG_IGN)
    from jaxlib import _jax

    service = _jax.get_distributed_runtime_service(
        f"[::]:{port}", count, heartbeat_timeout=HEARTBEAT_S, shutdown_timeout=1
    )
    print(READY, flush=True)
    sys.stdin.read()
    del service


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
