"""One run from config to exit code: opens everything in order, resumes, drives the loop, says how it ended."""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from signal import Signals
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import meshes
from jaxtrain import runtime
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config import RunConfig, encode, flatten
from jaxtrain.data import Loader
from jaxtrain.errors import RunError
from jaxtrain.layout import check_layout, runs_pipeline
from jaxtrain.observe.folder import RunFolder
from jaxtrain.observe.log import process_log
from jaxtrain.observe.plot import plot_loss
from jaxtrain.observe.recorder import Recorder, StepClock
from jaxtrain.observe.throughput import peak_flops
from jaxtrain.resilience import pulse as pulses
from jaxtrain.train.evaluate import Evaluator, open_data
from jaxtrain.train.loop import Loop
from jaxtrain.train.pipeline import describe
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


def train(config: RunConfig, process: runtime.Process, *, accept_changes: bool = False) -> int:
    """Trains or resumes; returns 0, or 128 + the signal that stopped it. Every process of the run calls it."""
    pulse = pulses.mine()
    check_layout(config, len(runtime.devices()))
    mesh = meshes.make(config.mesh, runtime.devices())
    pulse.about(_coordinates(mesh))
    fingerprint = {k: str(v) for k, v in flatten(encode(config)).items()} | {"code": runtime.code_fingerprint()}
    runtime.compare_fingerprints(fingerprint, deadline_s=300)
    with ExitStack() as stack:
        if process.lead:
            folder = RunFolder(config, runtime.environment(), accept_changes)
            stack.callback(folder.close)
        runtime.barrier("run folder", deadline_s=300)
        stack.enter_context(process_log(config.run_dir, process.index))
        return _run(config, mesh, process, stack, accept_changes, pulse)


def _run(
    config: RunConfig, mesh: Mesh, process: runtime.Process, stack: ExitStack, accept_changes: bool, pulse: pulses.Pulse
) -> int:
    pulse.beat("restore", 0)
    if runs_pipeline(config, mesh.shape):
        runtime.compile_anew_on_cpu()
    blueprint = Blueprint(config, mesh)
    data = open_data(config, config.data, process.lead)
    evaluator = Evaluator(blueprint, process.lead) if config.eval else None
    checkpoints = Checkpoints(config.run_dir / "checkpoints", config.checkpoint)
    stack.callback(checkpoints.close)
    restored = checkpoints.latest(blueprint.abstract)
    if restored and not accept_changes:
        _check_data(config, restored[1].data, data.position(restored[1].step))
    first_step = restored[1].step if restored else 0
    step = compiled_ahead(blueprint) if first_step < config.steps else None
    state = restored[0] if restored else blueprint.init()
    _say(process, f"{_headline(config, mesh)}, {'resumed at' if first_step else 'from'} step {first_step}")
    if runs_pipeline(config, mesh.shape):
        _say(process, describe(config, mesh.shape))
    if first_step >= config.steps:
        _say(process, f"nothing to train: the run stands at step {first_step} of {config.steps}")
    recorder = Recorder(config.sinks if process.lead else (), config.run_dir, first_step, config.steps)
    stack.callback(recorder.close)
    stop = StopFlag(mesh)
    stack.callback(stop.close)
    loader = Loader(data, mesh, config.rules, first_step, config.steps)
    stack.callback(loader.close)

    def evaluate(step: int, state: State) -> None:
        recorder.write(step, evaluator(state.params))

    def save(step: int, state: State) -> None:
        position = data.position(step)
        checkpoints.save(step, state, config=encode(config), data=position, letters=blueprint.letters)

    def last_good() -> str:
        checkpoints.wait()
        step = checkpoints.newest()
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"

    flops = config.model.flops_per_token(config.seq_len) * config.tokens_per_step
    peak = peak_flops(config.precision.compute) if process.lead else math.inf  # the others write no row
    clock = StepClock(config.tokens_per_step, flops, peak, first_step)
    loop = Loop(config, step, stop, recorder, clock, evaluate, save, checkpoints.check, last_good, pulse.beat)
    state, signal = loop.run(state, loader, first_step)
    pulse.beat("save", int(state.step))
    checkpoints.wait()
    recorder.flush()
    pulse.beat("end", int(state.step))
    if signal:
        _say(process, f"stopped by {Signals(signal).name} at step {int(state.step)}; the same command continues")
        return 128 + signal
    stop.close()
    evaluation = evaluator(state.params) if evaluator else {}
    _end(process, Finished(blueprint, state.params, data, evaluator and evaluator.data, evaluation))
    return 0


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
                print(f"loss plot   {plot_loss(config.run_dir)}")
            except OSError as error:  # the run itself is complete
                print(f"loss plot   none: {error.strerror}")
        print(f"run folder  {config.run_dir}", flush=True)


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
        print(line, flush=True, file=sys.stdout)
