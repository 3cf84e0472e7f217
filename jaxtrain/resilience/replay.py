"""`jaxtrain replay CONFIG --step N`: steps of a run computed again, twice, and compared bit by bit. It writes nothing.

On CPUs a compiled step is deterministic, so any difference is a fault. On GPUs it is so for one executable as long as
no kernel adds with atomics: --xla_gpu_deterministic_ops=true asks for that (XLA's flag guidance). Another mesh, another
version of XLA or an autotuner that chose another kernel change the last bits of a sum: then the two replays still agree
with each other, and what was recorded may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtrain.cluster import few
from jaxtrain.command import parse
from jaxtrain.errors import ConfigError, CorruptionError

if TYPE_CHECKING:
    from jaxtrain.config import RunConfig
    from jaxtrain.resilience.rollback import Start

Hashes = dict[str, list[str]]  # by array, of each copy


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `jaxtrain replay` beside the config's own overrides."""

    step: int | None = None  # must be given; computed again up to and with this one


@dataclass(frozen=True)
class Replayed:
    """One replay: the content hashes of its last state, and the loss of each of its steps."""

    hashes: Hashes
    losses: dict[int, float]


def main(argv: list[str]) -> int:
    """jaxtrain replay CONFIG --step N [overrides of the config]

    --step counts as `step` in metrics.jsonl, from 1: that row's update is the last that is computed again.
    """
    call = parse("jaxtrain replay", Options, argv, doc=main.__doc__)
    config, last = call.load(), call.options.step
    if last is None or not 1 <= last <= config.steps:
        what = "--step is missing." if last is None else f"--step {last} is no step of this run."
        raise ConfigError(what, rule=f"1 to {config.steps}, counted as in metrics.jsonl", fix=f"--step {config.steps}")

    from jaxtrain import runtime

    process = runtime.start(fake_devices=call.process.fake_devices, xla=config.xla)
    rows, differs = report(config, last, process.lead)
    if process.lead:
        print("\n".join(rows), flush=True)
    return CorruptionError.exit_code if differs else 0


def report(config: RunConfig, last: int, lead: bool) -> tuple[list[str], bool]:
    """-> a line for each comparison, and whether any of them found a difference. Every process of the mesh calls it."""
    import meshes
    from jaxtrain import runtime
    from jaxtrain.data import quarantine
    from jaxtrain.layout import check_layout, runs_pipeline
    from jaxtrain.train.evaluate import open_data
    from jaxtrain.train.state import Blueprint
    from jaxtrain.train.step import train_step

    check_layout(config, len(runtime.devices()), runtime.devices()[0].platform)
    blueprint = Blueprint(config, meshes.make(config.mesh, runtime.devices()))
    if runs_pipeline(config, blueprint.mesh.shape):
        runtime.compile_anew_on_cpu()
    data = open_data(config, config.data, lead).without(quarantine.read(config.run_dir))
    step, runs, first = train_step(blueprint), [], 0
    for _ in range(2):
        start = _newest(blueprint, last - 1)
        first = start.step
        losses: dict[int, float] = {}
        seen = lambda n, metrics, losses=losses: losses.update({n: float(metrics["train/loss"])})  # noqa: E731
        state = recompute(step, blueprint, data, start, last, seen)
        runs.append(Replayed(_hashes(state), losses))
        del start, state
    origin = f"the checkpoint of step {first}" if first else "the seed"
    found = {
        "the two replays": _between(*runs),
        f"the checkpoint of step {last}": _checkpoint(config, last, runs[0].hashes),
        "the recorded losses": _recorded(config, runs[0].losses),
    }
    head = f"steps {first + 1} to {last} computed again from {origin}, twice, on {meshes.product(blueprint.mesh.shape)}"
    return [head, *(f"  {name:<32}{_said(rows)}" for name, rows in found.items())], any(found.values())


def recompute(
    step: Callable[..., Any], blueprint: Any, data: Any, start: Start, last: int, seen: Callable[[int, Any], None]
) -> Any:
    """The state after step `last`, from a good one, which is donated, by the step that trains. `seen` gets the metrics."""
    import jax
    import jax.numpy as jnp

    import meshes
    from jaxtrain.data import Loader

    mesh, state = blueprint.mesh, start.state
    flags = jax.jit(lambda: jnp.zeros(mesh.size, jnp.int32), out_shardings=meshes.per_device(mesh))()
    with Loader(data, mesh, blueprint.rules, start.step, last) as batches:
        for index, batch in batches:
            state, metrics = step(state, batch, flags)
            seen(index + 1, metrics)
    return state


def _newest(blueprint: Any, up_to: int) -> Start:
    """The newest whole checkpoint up to this step, else the seed's state. It disturbs no run that is alive."""
    import sys

    from jaxtrain.background import Deadline
    from jaxtrain.checkpoint import files, load
    from jaxtrain.checkpoint.manifest import DamagedError
    from jaxtrain.resilience.rollback import Start
    from jaxtrain.train import regroup

    config = blueprint.config
    folder = (config.run_dir / "checkpoints").absolute()
    seconds = config.checkpoint.deadline_seconds
    for step in reversed([step for step in files.numbered(folder) if step <= up_to]):
        try:
            state, found = load.restore_whole(folder / str(step), blueprint.abstract, Deadline(seconds), regroup.change)
            return Start(state, found.step, found.data)
        except DamagedError as error:
            print(f"skipped the checkpoint of step {step}: {error}", file=sys.stderr, flush=True)
    return Start(blueprint.init(), 0)


def _hashes(state: Any) -> Hashes:
    from jaxtrain.background import Deadline
    from jaxtrain.checkpoint import hashing, peers
    from jaxtrain.checkpoint.names import named

    mine = hashing.Hashing(named(state)).sums()
    return peers.agree(peers.new_round(), lambda: mine, hashing.total, Deadline(300))


def _between(one: Replayed, two: Replayed) -> list[str]:
    """What differs between two replays, and between the copies within each."""
    arrays = [name for name in one.hashes if len({*one.hashes[name], *two.hashes[name]}) > 1]
    losses = [step for step, loss in one.losses.items() if repr(loss) != repr(two.losses[step])]  # nan equals nan
    return [*arrays, *(f"the loss of step {step}" for step in losses)]


def _checkpoint(config: RunConfig, step: int, hashes: Hashes) -> list[str] | None:
    from jaxtrain.checkpoint import files, manifest

    folder = config.run_dir / "checkpoints" / str(step)
    if not (folder / files.MANIFEST).exists():
        return None
    there = manifest.read(folder).arrays
    return [name for name, copies in hashes.items() if name not in there or {*copies} != {there[name].content}]


def _recorded(config: RunConfig, losses: Mapping[int, float]) -> list[str] | None:
    """The rows of metrics.jsonl; the first that differs says at which step it began."""
    import numpy as np

    from jaxtrain.observe.recorder import plain
    from jaxtrain.observe.sinks import read_rows

    rows = read_rows(config.run_dir / "metrics.jsonl")
    kept = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row and row["step"] in losses}
    again = {step: plain(np.float32(losses[step])) for step in sorted(kept)}
    differing = [step for step in again if repr(kept[step]) != repr(again[step])]
    return [f"step {step}: {kept[step]}, now {again[step]}" for step in differing] if kept else None


def _said(differences: Iterable[str] | None) -> str:
    if differences is None:
        return "not there to compare with"
    rows = list(differences)
    return f"DIFFER: {few(rows)}" if rows else "equal"
