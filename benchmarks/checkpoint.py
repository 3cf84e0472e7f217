"""What a save costs the loop around it, and the host's memory; what a restore takes. On the CPU, whose cores both want.

    python -m benchmarks.checkpoint [--megabytes N] [--rounds N] [--attempts N] [--rest SECONDS] [--folder DIR] [--out FILE.json]

Each round rests (undisturbed steps: memory and disk cool down as between real saves), saves with no step beside it, by
our code and by Orbax's own synchronous Checkpointer, and saves beside steps that donate their state. `lost` is the time
from the call to the commit that did not go into steps at their undisturbed pace: the call itself and every slower step.
Where steps keep every core busy, that is no less than a save's CPU time over the number of cores.
Ratios are within a round; medians over the rounds that other processes left alone, or over all if there were none.
Memory is the process's resident set.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from benchmarks import program
from jaxtrain import runtime
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints

LAYERS, DIM = 8, 1024
QUIET_CORES = 0.25  # of which the kernel's writing to disk is up to 0.1
NOTE = dict(config={}, data={})
PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")
NAMES = {
    "step": "undisturbed step, s",
    "sync": "save with nothing beside it, s",
    "cpu": "save with nothing beside it: CPU time, s",
    "blocked": "save beside steps: the call, s",
    "lost": "save beside steps: all that the loop lost, s",
    "ratio": "lost / save with nothing beside it",
    "orbax": "save by Orbax's synchronous Checkpointer, s",
    "of_orbax": "lost / save by Orbax's synchronous Checkpointer",
    "others": "cores that other processes kept busy",
}
Step = Callable[[Any], Any]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attempts", type=int, default=15)
    parser.add_argument("--rest", type=float, default=5.0)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    runtime.start()  # as a training run does: steps find the memory again that they have freed
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rounds, rows = measure(Path(folder), options)
    for name, value in rows.items():
        print(f"{name:<52}{value:>8.2f}")
    program.write(options.out, program.facts(*PACKAGES) | {"rows": rows, "rounds": rounds})
    return 0


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, float]], dict[str, float]]:
    state, step = training(options.megabytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    checkpoints = Checkpoints(folder / "ours", CheckpointConfig(keep_last=1))
    _, state = steps_for(options.rest, step, state)
    before = settled()
    with peak() as first:
        save_alone(checkpoints, 0, state)  # compiles the hash and makes the copy's memory: not timed
    kept, rounds = settled() - before, []
    for number in range(1, options.attempts + 1):
        if len(quiet(rounds)) == options.rounds:
            break
        others = busy_elsewhere()
        with peak() as alone:
            _, state = steps_for(options.rest, step, state)
        sync, cpu = save_alone(checkpoints, 2 * number, state)
        _, state = steps_for(options.rest, step, state)
        orbax = save_by_orbax(folder / "orbax", state)
        pace, state = steps_for(options.rest, step, state)
        with peak() as beside:
            blocked, elapsed, count, state = save_beside(checkpoints, 2 * number + 1, step, state)
        after, state = steps_for(options.rest, step, state)
        pace = (pace + after) / 2
        lost = elapsed - count * pace
        rounds.append({"step": pace, "sync": sync, "cpu": cpu, "orbax": orbax, "blocked": blocked, "lost": lost, "steps": count})
        rounds[-1] |= {"ratio": lost / sync, "of_orbax": lost / orbax, "others": others()}
        rounds[-1] |= {"memory": (kept + max(0, beside[0] - alone[0])) / size}
        print("  ".join(f"{name} {value:.3f}" for name, value in rounds[-1].items()), flush=True)
    counted = quiet(rounds) or rounds
    rows = {"state, MB": size / 1e6, "rounds counted": len(counted), "rounds": len(rounds)}
    rows |= {text: statistics.median(r[name] for r in counted) for name, text in NAMES.items()}
    rows["first save, no steps beside it: memory added / state"] = (first[0] - before) / size
    rows["saves beside steps: memory added / state, at most"] = max(r["memory"] for r in rounds)
    return rounds, rows | restore_rows(checkpoints, state, size)


def quiet(rounds: list[dict[str, float]]) -> list[dict[str, float]]:
    """Those that other processes (and the kernel's own threads) hardly disturbed;"""
    return [r for r in rounds if r["others"] < QUIET_CORES]


def training(megabytes: int) -> tuple[Any, Step]:
    """A state of parameters and AdamW moments of this size in all, and a step that donates it."""
    width = max(1, round(megabytes * 1e6 / 12 / (2 * LAYERS * DIM)))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (LAYERS, DIM, width)), "down": jax.random.normal(keys[1], (LAYERS, width, DIM))}
    tx, x_BD = optax.adamw(1e-3), jax.random.normal(keys[2], (8, DIM))

    def layer(h_BD: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        return h_BD + 0.01 * jax.nn.relu(h_BD @ weights["up"]) @ weights["down"], None

    def loss(params: Any) -> jax.Array:
        return jnp.mean(jax.lax.scan(layer, x_BD, params)[0] ** 2)

    def step(state: Any) -> Any:
        updates, opt = tx.update(jax.grad(loss)(state["params"]), state["opt"], state["params"])
        return {"step": state["step"] + 1, "params": optax.apply_updates(state["params"], updates), "opt": opt}

    return {"step": jnp.int32(0), "params": params, "opt": tx.init(params)}, jax.jit(step, donate_argnums=0)


def steps_for(seconds: float, step: Step, state: Any) -> tuple[float, Any]:
    """Mean seconds per step, and the state after them."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        state, count = jax.block_until_ready(step(state)), count + 1
    return (time.perf_counter() - begun) / count, state


def save_alone(checkpoints: Checkpoints, number: int, state: Any) -> tuple[float, float]:
    """Seconds, and seconds of this process's CPU time."""
    begun, worked = time.perf_counter(), time.process_time()
    checkpoints.save(number, state, **NOTE)
    checkpoints.wait()
    return time.perf_counter() - begun, time.process_time() - worked


def save_by_orbax(folder: Path, state: Any) -> float:
    """What a program without code of its own would wait for. The last one's files are removed first, as we do."""
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.perf_counter()
    ocp.Checkpointer(ocp.StandardCheckpointHandler()).save(folder, args=ocp.args.StandardSave(state))
    return time.perf_counter() - begun


def save_beside(checkpoints: Checkpoints, number: int, step: Step, state: Any) -> tuple[float, float, int, Any]:
    """Seconds that the call took, seconds and steps until the commit, the state after them."""
    begun, count = time.perf_counter(), 0
    checkpoints.save(number, state, **NOTE)
    blocked = time.perf_counter() - begun
    while checkpoints.newest() != number:
        state, count = jax.block_until_ready(step(state)), count + 1
        checkpoints.check()
    return blocked, time.perf_counter() - begun, count, state


def restore_rows(checkpoints: Checkpoints, state: Any, size: int) -> dict[str, float]:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints.close()
    jax.tree.map(lambda x: x.delete(), state)
    before, begun = settled(), time.perf_counter()
    with peak() as highest:
        restored = checkpoints.latest(shapes)
    assert restored
    return {"restore, verified, s": time.perf_counter() - begun, "restore: memory / state": (highest[0] - before) / size}


@contextmanager
def peak() -> Iterator[list[float]]:
    """[bytes]: the largest resident set within the block, looked at every 5 ms."""
    highest, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            highest[0] = max(highest[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        stop.set()
        thread.join()


def busy_elsewhere() -> Callable[[], float]:
    """A clock of the CPU time of everything but this process, per second since it was made."""

    def read() -> tuple[float, float]:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - time.process_time(), time.perf_counter()

    busy, begun = read()
    return lambda: (read()[0] - busy) / (read()[1] - begun)


def settled() -> int:
    """The resident set once the last step's memory is given back, half a second after it."""
    time.sleep(0.5)
    return resident()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    program.run(main)
