"""The coordination service of jax.distributed outside the trainers, so that no trainer is needed for the others to live.

The only file that touches jax's private service (checked with jax 0.10.2 and 0.12.0). `serve` runs in a process of its
own: when it ends, every trainer that still holds a client of it dies.
"""

from __future__ import annotations

import sys

from jaxtrain.resilience.child import READY, die_with_parent

# No trainer is declared dead by the service: supervisors see processes die at once, and kill them all for a new start.
_HEARTBEAT_S = 3600


def serve(port: int, count: int) -> None:
    """Until stdin closes: the service for `count` trainers on this port. Imports jaxlib alone, 0.2 s and 100 MB."""
    die_with_parent()
    from jaxlib import _jax

    service = _jax.get_distributed_runtime_service(
        f"[::]:{port}", count, heartbeat_timeout=_HEARTBEAT_S, shutdown_timeout=1
    )
    print(READY, flush=True)
    sys.stdin.read()
    del service


def connect(address: str, count: int, index: int, deadline_s: float) -> None:
    """What jax.distributed.initialize does for a process that hosts no service. Comes before any device."""
    from jax._src import distributed
    from jaxlib import _jax

    state = distributed.global_state
    state.coordinator_address, state.num_processes, state.process_id = address, count, index
    state.client = _jax.get_distributed_runtime_client(
        address, index, init_timeout=int(deadline_s), use_compression=True, heartbeat_timeout=_HEARTBEAT_S
    )
    state.client.connect()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
