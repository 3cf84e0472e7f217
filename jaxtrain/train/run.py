"""One run from config to exit code: opens everything in order, resumes, drives the loop, says how it ended."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from signal import SIGTERM, Signals
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import meshes
from jaxtrain import runtime
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.cluster import few
from jaxtrain.config import RunConfig, encode, flatten
from jaxtrain.data import Dataset, Loader, quarantine
from jaxtrain.errors import CheckpointError, CorruptionError, RunError
from jaxtrain.exits import Exit
from jaxtrain.layout import check_layout, runs_pipeline
from jaxtrain.loading import own_code
from jaxtrain.observe.folder import RunFolder
from jaxtrain.observe.log import process_log
from jaxtrain.observe.plot import plot_loss
from jaxtrain.observe.recorder import Recorder, StepClock
from jaxtrain.observe.throughput import peak_flops
from jaxtrain.resilience import pulse as pulses
from jaxtrain.resilience import tiers
from jaxtrain.resilience.corruption import Copies
from jaxtrain.resilience.health import Judge, Rewind
from jaxtrain.resilience.replay import recompute
from jaxtrain.resilience.rollback import Start, roll_back
from jaxtrain.resilience.snapshots import Snapshots
from jaxtrain.resilience.verified import Verified
from jaxtrain.train import regroup
from jaxtrain.train.choices import chosen
from jaxtrain.train.evaluate import Evaluator, open_data
from jaxtrain.train.loop import Loop, Rewound, Unequal
from jaxtrain.train.pipeline import describe
from jaxtrain.train.notice import Notice
from jaxtrain.train.signals import StopFlag
from jaxtrain.train.state import Blueprint, State
from jaxtrain.train.step import compiled_ahead


@dataclass
class Finished:
    """What the endings read."""

    blueprint: Blueprint
    params: Any
    data: Any
    eval_data: Any
    evaluation: dict[str, float]


def train(config: RunConfig, process: runtime.Process, notice: Notice, *, accept_changes: bool = False) -> Exit:
    """Trains or resumes; DONE, PREEMPTED or INTERRUPTED. Every process of the run calls it."""
    pulse = pulses.mine()
    check_layout(config, len(runtime.devices()), runtime.devices()[0].platform)
    mesh = meshes.make(config.mesh, runtime.devices())
    pulse.about(_coordinates(mesh))
    fingerprint = {k: str(v) for k, v in flatten(encode(config)).items()} | {"code": runtime.code_fingerprint()}
    runtime.compare_fingerprints(fingerprint | own_code(), deadline_s=300)
    with ExitStack() as stack:
        if process.lead:
            folder = RunFolder(config, runtime.environment(), accept_changes)
            stack.callback(folder.close)
            peak_flops(config.precision.compute)  # kept; of a CPU it is timed, and later threads of this run take its cores
        runtime.barrier("run folder", deadline_s=300)
        stack.enter_context(process_log(config.run_dir, process.index))
        return _run(config, mesh, process, notice, stack, accept_changes, pulse)


@dataclass
class _Opened:
    """What a run opens once, however often it goes back."""

    process: runtime.Process
    pulse: pulses.Pulse
    blueprint: Blueprint
    whole_data: Dataset  # with nothing put aside
    evaluator: Evaluator | None
    checkpoints: Checkpoints
    snapshots: Snapshots | None
    verified: Verified
    copies: Copies | None
    record: quarantine.Record

    @cached_property
    def step(self) -> Callable[..., Any]:
        """Compiled on a thread from the first time that this is asked for."""
        return compiled_ahead(self.blueprint)

    @property
    def data(self) -> Dataset:
        return self.whole_data.without(self.record)

    def restored(self, up_to: int | None) -> Start | None:
        """The newest state kept, of step `up_to` or before; None where there is none and none was due by then."""
        found = tiers.restore(self.checkpoints, self.snapshots, self.blueprint.abstract, up_to)
        if found is None and up_to is not None and up_to >= self.blueprint.config.checkpoint.every:
            raise CheckpointError(
                f"no state of step {up_to} or before is left to go back to.",
                got=f"checkpoints of steps {few(self.checkpoints.steps()) or 'none'}",
                rule="a run does not start over by itself",
                fix="a larger checkpoint.keep_last from the start; or empty the folder, and the run starts over",
            )
        return found

    def newest(self, up_to: int) -> Start:
        """The newest good state of step `up_to` or before."""
        return self.restored(up_to) or self.fresh()

    def fresh(self) -> Start:
        return Start(self.blueprint.init(), 0)

    def computed(self, step: int, metrics: Any) -> None:
        """A step was computed again: the supervisor sees that."""
        jax.block_until_ready(metrics)
        self.pulse.beat("step", step)


def _run(
    config: RunConfig,
    mesh: Mesh,
    process: runtime.Process,
    notice: Notice,
    stack: ExitStack,
    accept_changes: bool,
    pulse: pulses.Pulse,
) -> Exit:
    pulse.beat("prepare", 0)
    if runs_pipeline(config, mesh.shape):
        runtime.compile_anew_on_cpu()
    opened = _open(config, mesh, process, stack, pulse)
    limit = opened.verified.limit()
    start = opened.restored(limit)
    if start and not accept_changes:
        _check_data(config, start.data, opened.data.position(start.step))
    if limit is not None:
        opened.checkpoints.forget_after(limit)
    first_step = start.step if start else 0
    if first_step < config.steps:
        opened.step  # begins to compile
    start = start or opened.fresh()
    pulse.about(_coordinates(mesh), f"{start.tier} {start.step}" if start.tier else "")
    _say(process, f"{_headline(config, mesh)}, {'resumed at' if first_step else 'from'} step {first_step}")
    for line in _notes(config, mesh, opened, start):
        _say(process, line)
    stop = StopFlag(mesh, notice)
    stack.callback(stop.close)
    state, signal = _trained(opened, stop, start)
    if opened.snapshots:
        opened.snapshots.discard()
    if signal:
        _say(process, f"stopped by {Signals(signal).name} at step {int(state.step)}; the same command continues")
        return Exit.PREEMPTED if signal == SIGTERM else Exit.INTERRUPTED
    stop.close()
    evaluator = opened.evaluator
    evaluation = (evaluator.last or evaluator(state.params)) if evaluator else {}  # the loop's, unless it had nothing to do
    _end(process, Finished(opened.blueprint, state.params, opened.data, evaluator and evaluator.data, evaluation))
    return Exit.DONE


def _open(
    config: RunConfig, mesh: Mesh, process: runtime.Process, stack: ExitStack, pulse: pulses.Pulse
) -> _Opened:
    blueprint, every = Blueprint(config, mesh), config.health.hash_every
    record, verified = quarantine.read(config.run_dir), Verified(config.run_dir, every, process.lead)
    on_disk = {quarantine.FILE: quarantine.digest(record), "verified.json": str(verified.limit())}
    runtime.compare_fingerprints(on_disk, deadline_s=300)
    if not process.lead:
        pulse.beat("restore", 0)  # ahead of the lead, for it only waits: where nothing moves it is not to blame
    data = open_data(config, config.data, process.lead, moved=pulse.renew)
    evaluator = Evaluator(blueprint, process.lead, pulse.renew) if config.eval else None
    if process.lead:
        pulse.beat("restore", 0)
    checkpoints = Checkpoints(config.run_dir / "checkpoints", config.checkpoint, regroup.change)
    stack.push(lambda kind, error, trace: _close(checkpoints, error))
    stack.callback(verified.settle)
    copies = Copies(blueprint) if every else None
    snapshots = tiers.opened(config)
    return _Opened(process, pulse, blueprint, data, evaluator, checkpoints, snapshots, verified, copies, record)


def _close(checkpoints: Checkpoints, error: BaseException | None) -> None:
    """What ended the run is what it says, and not a save that failed before that and was said then."""
    try:
        checkpoints.close()
    except CheckpointError:
        if error is None:
            raise


def _trained(opened: _Opened, stop: StopFlag, start: Start) -> tuple[State, int]:
    """The loop, and again from an earlier state as often as its verdict asks for that. -> (state, signal or 0)."""
    while True:
        rewind, unequal = None, 0
        try:
            return _looped(opened, stop, start)
        except Rewound as error:
            rewind = error.verdict
        except Unequal as error:
            unequal = error.step
        # Here the exception is gone, and with its frames the bad state: there is room for a good one.
        del start
        if rewind is None:
            raise _corrupted(opened, unequal)
        start = _gone_back(opened, rewind)


def _looped(opened: _Opened, stop: StopFlag, start: Start) -> tuple[State, int]:
    config, checkpoints, data = opened.blueprint.config, opened.checkpoints, opened.data
    judge = Judge(config.health, start.data.get("health"))
    opened.verified.begin(start.step)
    with ExitStack() as stack:
        recorder = Recorder(config.sinks if opened.process.lead else (), config.run_dir, start.step, config.steps)
        stack.callback(recorder.close)
        loader = Loader(data, opened.blueprint.mesh, opened.blueprint.rules, start.step, config.steps)
        stack.callback(loader.close)

        def evaluate(step: int, state: State) -> None:
            recorder.write(step, opened.evaluator(state.params))

        def position(step: int) -> dict[str, Any]:
            memory = judge.memory()
            return data.position(step) | ({"health": memory} if memory else {})

        def save(step: int, state: State) -> None:
            checkpoints.save(step, state, config=encode(config), data=position(step), letters=opened.blueprint.letters)

        def snapshot(step: int, state: State) -> None:
            trouble = "rows of metrics wait for a disk" if recorder.waits() else ""
            opened.snapshots.save(step, state, data=position(step), trouble=trouble)

        def last_good() -> str:
            checkpoints.settle()
            step = checkpoints.newest()
            return "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"

        peak = peak_flops(config.precision.compute) if opened.process.lead else math.inf  # the others write no row
        flops = config.model.flops_per_token(config.seq_len) * config.tokens_per_step
        loop = Loop(
            config=config,
            step=lambda *arguments: opened.step(*arguments),
            stop=stop,
            recorder=recorder,
            clock=StepClock(config.tokens_per_step, flops, peak, start.step),
            evaluate=evaluate,
            save=save,
            check_save=checkpoints.check,
            last_good=last_good,
            beat=opened.pulse.beat,
            judge=judge,
            compare=opened.copies and opened.copies.compare,
            agreed=opened.verified.agree,
            say=lambda line: _say(opened.process, line),
            inline=runtime.inline(),
            snapshot=opened.snapshots and snapshot,
        )
        if start.tier == "snapshot" and start.step >= config.steps:
            opened.pulse.beat("save", start.step)
            save(start.step, start.state)  # killed in its last save: memory alone has the end
        state, signal = loop.run(start.state, loader, start.step)
        opened.pulse.beat("end", int(state.step))  # with all of the last save, beside which no loop goes on
        checkpoints.wait()
        recorder.flush()
        return state, signal


def _gone_back(opened: _Opened, rewind: Rewind) -> Start:
    """From before the bad steps. Checkpoints of later ones go first: no start may find them beside a newer record."""
    opened.pulse.beat("restore", rewind.first - 1)
    event, start = roll_back(rewind, opened.record, opened.data, opened.newest)
    opened.checkpoints.forget_after(event.steps[0] - 1)
    opened.record = (*opened.record, event)
    if opened.process.lead:
        quarantine.write(opened.blueprint.config.run_dir, opened.record)
    first, last = event.steps
    _say(
        opened.process,
        f"{rewind.why}: back to step {start.step}; {len(event.examples)} examples of "
        f"step{f' {first}' if first == last else f's {first} to {last}'} are put aside ({quarantine.FILE})",
    )
    return start


def _corrupted(opened: _Opened, step: int) -> CorruptionError:
    """Who holds other bits than the other copies; where they cannot tell, what the steps computed again say."""
    copies, verified = opened.copies, opened.verified
    sums, found_by = copies.sums(), "majority"
    suspects, certain = copies.suspects(sums)
    verified.differ(step, suspects, found_by if certain else "comparison")
    if not certain:
        opened.pulse.beat("restore", verified.agreed)
        _say(opened.process, f"copies differ at step {step}: computing it again from step {verified.agreed} or before")
        start = opened.newest(verified.agreed)
        copies.compare(recompute(opened.step, opened.blueprint, opened.data, start, step, opened.computed))
        suspects, certain = copies.suspects(sums, copies.sums())
        verified.differ(step, suspects, "replay" if certain else "comparison, and a replay agrees with no copy")
    more = [f"and {len(suspects) - 8} more"] if len(suspects) > 8 else []
    hosts = list(dict.fromkeys(suspect.host for suspect in suspects))
    return CorruptionError(
        f"copies of {few(list(dict.fromkeys(suspect.leaf for suspect in suspects)))} differ at step {step}.",
        got="\n        ".join([*map(str, suspects[:8]), *more]),
        rule=f"devices that hold the same shard hold the same bits, as they did at step {verified.agreed}",
        fix=f"put {few(hosts)} aside; the same command goes on from step {verified.agreed} or before",
    )


def _notes(config: RunConfig, mesh: Mesh, opened: _Opened, start: Start) -> Iterator[str]:
    if opened.snapshots and start.why:
        yield start.why
    if runs_pipeline(config, mesh.shape):
        yield describe(config, mesh.shape)
    yield from chosen(opened.blueprint)
    if config.optim.schedule.warmup >= config.steps:
        warmup = config.optim.schedule.warmup
        yield f"optim.schedule.warmup = {warmup} of {config.steps} steps: the rate rises to the end and never decays"
    if opened.copies and opened.copies.num_alone:
        compared, alone = len(opened.copies.shapes), opened.copies.num_alone
        yield f"copies are compared of {compared} of {compared + alone} arrays; this mesh holds the others once"
    if opened.record:
        yield f"put aside by {len(opened.record)} events: {sum(len(e.examples) for e in opened.record)} examples"
    if start.step >= config.steps:
        yield f"nothing to train: the run stands at step {start.step} of {config.steps}"


def _check_data(config: RunConfig, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises RunError where the checkpoint's examples are not those that this run would continue with."""
    if saved["fingerprint"] != now["fingerprint"]:
        raise RunError(
            f"{config.run_dir} was trained on other data.",
            got=f"data fingerprint {saved['fingerprint']} in the checkpoint, {now['fingerprint']} now",
            rule="a run continues on the same files (names, sizes, times), tokenizer and sequence length",
            fix="bring the files back, or --accept-changes to continue on the new ones",
        )


def _end(process: runtime.Process, finished: Finished) -> None:
    config = finished.blueprint.config
    for ending in config.endings:
        for line in ending.lines(finished):
            _say(process, line)
    if process.lead:
        if (config.run_dir / "metrics.jsonl").exists():
            try:
                plot = plot_loss(config.run_dir)
            except OSError as error:  # the run itself is complete
                plot = f"none: {error.strerror}"
            _say(process, f"loss plot   {plot}")
        _say(process, f"run folder  {config.run_dir}")


def _headline(config: RunConfig, mesh: Mesh) -> str:
    return f"{config.name}: {config.model.num_params():,} parameters, {meshes.product(mesh.shape)}"


def _coordinates(mesh: Mesh) -> str:
    """Where this process's devices lie in the mesh: "data 0 tensor 0-1"."""
    local = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    places = np.argwhere(np.reshape(local, mesh.devices.shape))
    spans = {axis: (places[:, dim].min(), places[:, dim].max()) for dim, axis in enumerate(mesh.axis_names)}
    rows = [f"{axis} {a}" if a == b else f"{axis} {a}-{b}" for axis, (a, b) in spans.items() if mesh.shape[axis] > 1]
    return " ".join(rows)


def _say(process: runtime.Process, line: str) -> None:
    if process.lead:
        try:
            print(line, flush=True, file=sys.stdout)
        except BrokenPipeError:  # who reads has left: the command ends
            raise
        except OSError:
            pass  # a full disk under stdout is no reason to stop a run
