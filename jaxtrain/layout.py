"""How a run lies on its devices: whether config, model and mesh fit, and the closest mesh that does. No device is touched.

Also what follows from the layout alone: whether a pipeline runs, with which rules, layers and microbatches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from jaxtrain.config import RunConfig, round_up
from jaxtrain.errors import ConfigError, LayoutError, UserError
from jaxtrain.train.replicas import DiLoCo
from meshes import Gathered, Ring, Rules, product
from meshes.axes import AXES
from meshes.errors import DivisionError
from meshes.rules import axes_of

TRIED = 2000  # meshes, from the closest on, before none is named: 0.2 s


def check_layout(config: RunConfig, num_devices: int, platform: str = "") -> dict[str, int]:
    """The mesh's sizes on this many devices, if batch, sequence and model fit them.

    `platform`: the devices', where it is known; then what is required and cannot run there is refused too. Raises
    ConfigError or LayoutError, whose fix names the closest mesh that works. Where there is none it names no mesh at all:
    one that an error would offer by itself fills the devices or suits the model, not both, and the two refer to each other.
    """
    try:
        sizes = config.mesh.sizes(num_devices)
    except LayoutError as error:
        more = math.prod(max(1, getattr(config.mesh, axis)) for axis in AXES)
        other = [f"{more} devices (--fake-devices {more} on CPUs)"] if more > num_devices else []
        raise _with_fix(error, [*_closest(config, num_devices, platform), *other]) from None
    try:
        _check(config, sizes, platform)
    except UserError as error:
        near = _closest(config, num_devices, platform)
        own = [error.fix] if error.fix and not isinstance(error, DivisionError) else []
        raise _with_fix(error, own + near) from None
    return sizes


def closest_mesh(config: RunConfig, num_devices: int, platform: str = "") -> dict[str, int] | None:
    """Of the meshes over all devices on which the config runs the one nearest to its own; None where no near one is.

    Near is by factors of two; an axis at -1 may take any size, and what is left over goes to `data` before others.
    """
    wanted = {axis: getattr(config.mesh, axis) for axis in AXES}

    def far(sizes: dict[str, int]) -> float:
        weights = {axis: 1.0 if want > 1 else 0.0 if want == -1 else 0.5 if axis == "data" else 2.0 for axis, want in wanted.items()}
        return sum(weight * abs(math.log2(sizes[axis] / max(1, wanted[axis]))) for axis, weight in weights.items())

    for sizes in sorted(_fillings(num_devices, tuple(AXES)), key=far)[:TRIED]:
        try:
            _check(config, sizes, platform)
        except UserError:
            continue
        return sizes
    return None


def _closest(config: RunConfig, num_devices: int, platform: str) -> list[str]:
    """The closest mesh as flags, or nothing."""
    sizes = closest_mesh(config, num_devices, platform)
    if sizes is None:
        return []
    flags = [f"--mesh.{axis} {size}" for axis, size in sizes.items() if getattr(config.mesh, axis) not in (-1, size)]
    return [f"{' '.join(flags)}: {product(sizes)} is the closest mesh that works"]


def _fillings(num_devices: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Every way to give all devices to the axes."""
    if len(axes) == 1:
        yield {axes[0]: num_devices}
        return
    for size in (n for n in range(1, num_devices + 1) if num_devices % n == 0):
        for rest in _fillings(num_devices // size, axes[1:]):
            yield {axes[0]: size} | rest


def _with_fix(error: UserError, fixes: list[str]) -> UserError:
    return type(error)(error.what, got=error.got, rule=error.rule, fix=", or ".join(fixes))


def _check(config: RunConfig, sizes: Mapping[str, int], platform: str) -> None:
    """Raises ConfigError or LayoutError where the config does not run on a mesh of these sizes."""
    if isinstance(config.replicas, DiLoCo) and sizes["replica"] == 1:
        raise ConfigError(
            "replicas = DiLoCo has no replicas to train apart.",
            got=f"mesh {product(sizes)}",
            rule="mesh.replica is 2 or more",
            fix="--replicas Together",
        )
    rules = within_stages(config, sizes)
    config.model.check(sizes, config.seq_len, rules, platform)
    rows, columns = (rules.shards(letter, sizes) for letter in "BS")
    if config.batch % (rows * config.accumulate):
        raise ConfigError(
            f"batch = {config.batch} does not divide over {rows} batch shards.",
            got=f"mesh {product(sizes)}, accumulate {config.accumulate}",
            rule="batch shards x accumulate divides the global batch",
            fix=f"batch = {round_up(config.batch, rows * config.accumulate)}",
        )
    if config.seq_len % columns:
        raise ConfigError(
            f"seq_len = {config.seq_len} does not divide over {columns} sequence shards.",
            got=f"mesh {product(sizes)}",
            rule="the axes that shard S divide the sequence",
            fix=f"seq_len = {round_up(config.seq_len, columns)}",
        )
    _check_ring(config.rules, sizes)
    _check_pipeline(config, sizes)


def _check_ring(rules: Rules, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError where a ring of products is asked for and no product gathers or scatters over `tensor`."""
    if rules.matmul == "ring" and sizes.get("tensor", 1) > 1 and "tensor" not in axes_of(rules.acts, "R"):
        raise ConfigError(
            "a ring of products has nothing to gather.",
            got=f"mesh {product(sizes)}, rules.matmul 'ring', rules.acts.R {axes_of(rules.acts, 'R')}",
            rule="the ring takes the place of gathers and scatters of the sequence between blocks, R, over tensor",
            fix="rules.acts.R = ('context', 'tensor') as in DEFAULT and TP_SP, or rules.matmul = 'whole'",
        )


def _check_pipeline(config: RunConfig, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError where microbatches or layers are too few for the stages."""
    if not runs_pipeline(config, sizes):
        return
    if config.rules.matmul == "ring" and sizes.get("tensor", 1) > 1:
        raise ConfigError(
            "a ring of products cannot run within a pipeline's stages.",
            got=f"mesh {product(sizes)}, rules.matmul 'ring'",
            rule="a permute waits for all devices that it names, also those of stages that do something else",
            fix="rules.matmul = 'whole'",
        )
    count, stages, rows = num_microbatches(config, sizes), sizes["stage"], within_stages(config, sizes).shards("B", sizes)
    if count < stages:
        enough, more = config.batch % (rows * stages) == 0, round_up(config.batch, rows * stages)
        raise ConfigError(
            f"{count} microbatch{'es' * (count > 1)} cannot fill {stages} stages.",
            got=f"mesh {product(sizes)}, batch {config.batch}, accumulate {config.accumulate}",
            rule="microbatches are as many as stages or more, and batch shards x microbatches divides the batch",
            fix=f"accumulate = {stages}" if enough else f"batch = {more}, or fewer stages",
        )
    layers, chunks = len(config.model.layer_flops(config.seq_len)[0]), config.rules.pipeline.num_chunks
    if layers < stages * chunks:
        fits = max(n for n in range(1, stages + 1) if stages % n == 0 and n * chunks <= max(layers, chunks))
        raise ConfigError(
            f"{layers} layers cannot fill {stages * chunks} virtual stages.",
            got=f"stage {stages} x chunks {chunks}",
            rule="every virtual stage has a layer",
            fix=f"mesh.stage = {fits}" if layers >= chunks else f"rules.pipeline.chunks = {max(1, layers // stages)}",
        )


def runs_pipeline(config: RunConfig, sizes: Mapping[str, int]) -> bool:
    """Whether a mesh of these axis sizes runs the rules' pipeline."""
    return sizes.get("stage", 1) > 1 and config.rules.pipeline is not None


def within_stages(config: RunConfig, sizes: Mapping[str, int]) -> Rules:
    """The config's rules; where a pipeline runs, `stage` is for it alone, and a ring of keys over no power of two gives
    way to gathered ones.

    A permute waits for all devices that it names, also those of stages that are in another branch of the program; the
    exchanges of two that stand for it there need a hypercube.
    """
    if not runs_pipeline(config, sizes):
        return config.rules
    rules = config.rules.staged
    shards = rules.shards("S", sizes)
    if not isinstance(rules.context, Ring) or shards & (shards - 1) == 0:
        return rules
    return dataclasses.replace(rules, context=Gathered(zigzag=rules.context.zigzag))


def layers_per_stage(config: RunConfig, sizes: Mapping[str, int]) -> list[int]:
    """How many layers each virtual stage runs: as even as their costs allow, unembedding and loss counted.

    An embedding is a look-up and costs nothing. Raises LayoutError where there are too few layers.
    """
    from meshes import schedules

    layers, unembedding = config.model.layer_flops(config.seq_len)
    return schedules.divide(layers, sizes["stage"] * config.rules.pipeline.num_chunks, last=unembedding)


def num_microbatches(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """`accumulate`; where a pipeline runs and that is 1, the most up to four times the stages that the batch allows.

    Four times as many leave a bubble of a fifth; more would make a microbatch's matrix products too small for a device.
    """
    if config.accumulate > 1 or not runs_pipeline(config, sizes):
        return config.accumulate
    per_shard = max(1, config.batch // within_stages(config, sizes).shards("B", sizes))
    return max(count for count in range(1, 4 * sizes["stage"] + 1) if per_shard % count == 0)
