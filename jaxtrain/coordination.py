"""What the processes of a run tell each other outside the devices: the key-value store and barrier of jax.distributed.

The only file that touches jax's private coordination client (checked with jax 0.10.2 and 0.12.0). It decides nothing.

Every call ends: of jax's own only `blocking_key_value_get` does where the service is stopped or cut off. The others raise
RunError then, which names what was waited for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxtrain.background import Deadline, within
from jaxtrain.errors import RunError

# No trainer is declared dead by a service outside the trainers: supervisors see processes die at once.
HEARTBEAT_S = 3600
# A word of each process to the service, so often: of one that is cut off this connection is stuck too, where the devices'
# own may be between two that both wait (resilience/verdict.py).
TALK_S, TALKS_A_SECOND = 2.0, 500
_LATE_S = 5.0  # for the service's own word that a deadline has passed


def connect(address: str, count: int, index: int, deadline_s: float) -> None:
    """What jax.distributed.initialize does for a process that hosts no service. Comes before any device."""
    from jax._src import distributed
    from jaxlib import _jax

    state = distributed.global_state
    state.coordinator_address, state.num_processes, state.process_id = address, count, index
    state.client = _jax.get_distributed_runtime_client(
        address, index, init_timeout=int(deadline_s), use_compression=True, heartbeat_timeout=HEARTBEAT_S
    )
    state.client.connect()
    threading.Thread(target=_talk, args=(max(TALK_S, count / TALKS_A_SECOND),), name="talk", daemon=True).start()


def serves() -> bool:
    """Whether other processes are served by this one; under `launch` a supervisor does it."""
    from jax._src import distributed

    state = distributed.global_state
    return state.service is not None and state.num_processes > 1


def follow(prefix: str, every_s: float, heard: Callable[[str], None]) -> None:
    """Looks so often, on a thread, and calls `heard` with the first value that somebody publishes below `prefix`."""

    def look() -> None:
        with contextlib.suppress(Exception):  # as in _talk
            while not (found := _client().key_value_dir_get(f"{prefix}/")):
                time.sleep(every_s)
            heard(found[0][1])

    threading.Thread(target=look, name="follow", daemon=True).start()


def _talk(every_s: float) -> None:
    with contextlib.suppress(Exception):  # the service has ended: so has this process, soon
        while True:
            time.sleep(every_s)
            _client().key_value_dir_get("jaxtrain/talk/")  # waits with the service, and goes on with it


def put(key: str, value: str, deadline_s: float) -> None:
    """Publishes under a key that nobody has used before. After an error it may be there, or come."""
    _answered(f"to publish {key}", lambda client: client.key_value_set(key, value), deadline_s)


def get(key: str, deadline_s: float) -> str | None:
    """The value as soon as somebody publishes it; None at the deadline."""
    return _or_none(lambda client, ms: client.blocking_key_value_get(key, ms), deadline_s)


def delete(key: str, deadline_s: float) -> None:
    """Takes back what was published, once all who want it have it: the store lives as long as the job."""
    _answered(f"to take {key} back", lambda client: client.key_value_delete(key), deadline_s)


def under(prefix: str, deadline_s: float) -> dict[str, str]:
    """All that is published so far below `prefix` and a slash."""
    found = _answered(f"to list {prefix}", lambda client: client.key_value_dir_get(f"{prefix}/"), deadline_s)
    return {key.removeprefix(f"{prefix}/"): value for key, value in found}


def wait(name: str, deadline_s: float) -> bool:
    """Whether all processes came to this barrier before the deadline. A name serves once."""
    come = lambda _: _or_none(lambda client, ms: client.wait_at_barrier(name, ms) or True, deadline_s)  # noqa: E731
    return _answered(f"at the barrier {name}", come, deadline_s + _LATE_S) is not None


def _answered(what: str, call: Callable[[Any], Any], deadline_s: float) -> Any:
    client = _client()
    try:
        return within(Deadline(deadline_s), lambda: call(client))
    except TimeoutError as error:
        from jax._src import distributed

        raise RunError(
            f"the coordination service at {distributed.global_state.coordinator_address} does not answer.",
            got=f"{deadline_s:.0f} s waited {what}",
            rule="it answers within seconds, while its process runs and its host is reached",
            fix="look at the processes of that host: one may be stopped, or the network between cut",
        ) from error


def _or_none(call: Any, deadline_s: float) -> Any:
    from jax.errors import JaxRuntimeError

    try:
        return call(_client(), int(1000 * deadline_s))
    except JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _client() -> Any:
    from jax._src import distributed

    assert distributed.global_state.client, "several processes, and jax.distributed is not initialized"
    return distributed.global_state.client
