"""RunConfig: one frozen value that says everything about a run. It is loaded from a Python file and touches no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from jaxtrain import kinds, ranges
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.data.source import Mixture, Source, check_disjoint, check_tokenizers, check_vocab
from jaxtrain.errors import ConfigError
from jaxtrain.loading import execute, full_name
from jaxtrain.observe.ending import Ending
from jaxtrain.observe.sinks import Console, Jsonl, Sink, TensorBoard
from jaxtrain.protocols import ModelConfig
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.health import Health
from jaxtrain.resilience.policy import SnapshotConfig
from jaxtrain.train.optim import AdamW, Optim
from jaxtrain.train.precision import Precision
from jaxtrain.train.replicas import Replicas, Together
from jaxtrain.xla import XlaFlags
from meshes import DEFAULT, MeshConfig, Rules

M = TypeVar("M", bound=ModelConfig)  # the architecture's config: any dataclass that satisfies it


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out data: every `every` steps (0: only at the end) over at most `max_batches` batches."""

    data: Source
    every: int = 500
    max_batches: int | None = None

    def __post_init__(self) -> None:
        ranges.check("eval", self, every=ranges.whole(0), max_batches=ranges.whole(1))
        if self.max_batches and isinstance(self.data, Mixture):
            raise ConfigError(
                f"eval.max_batches = {self.max_batches} batches of a mixture would be its first source's alone.",
                rule="an evaluation reads every source in order, one after the other",
                fix="max_batches=None, with a smaller holdout where that takes long; or one source",
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[M]):
    """A run. World size is not in it: `batch` is global and one mesh axis may be -1."""

    name: str  # of the run folder, runs_dir/name
    model: M
    data: Source
    eval: EvalConfig | None = None
    steps: int
    batch: int  # examples per step over all devices
    seq_len: int  # tokens per example
    seed: int = 0  # of the initial parameters and of the example order
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rules: Rules = DEFAULT
    precision: Precision = field(default_factory=Precision)
    optim: Optim = field(default_factory=AdamW)
    z_loss: float = 0.0  # weight of log(Z)^2 in the objective (PaLM 2022, section 5)
    accumulate: int = 1  # microbatches per step
    replicas: Replicas = Together()  # how they stay one model
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: Deadlines = field(default_factory=Deadlines)  # under `jaxtrain launch`: when a trainer counts as hung
    health: Health = Health()  # what follows when numbers go wrong
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    log_every: int = 10
    sinks: tuple[Sink, ...] = (Console(), Jsonl(), TensorBoard())
    endings: tuple[Ending, ...] = ()  # what is printed after the last step
    xla: XlaFlags = field(default_factory=XlaFlags)
    runs_dir: str = "runs"

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len


# Fields that a run folder may be continued with although they differ: they move work, they do not change the numbers'
# definition. A mesh of another size changes the last bit of a sum; the difference is printed all the same.
FREE_TO_CHANGE = ("name", "mesh", "rules", "checkpoint", "snapshot", "watch", "health", "log_every", "sinks", "endings")
FREE_TO_CHANGE += ("xla", "runs_dir", "eval", "accumulate")


def load(path: str | Path, overrides: Iterable[str] = (), flags: Iterable[str] = ()) -> RunConfig:
    """The config of a Python file with `overrides` ("--optim.peak-lr", "3e-4", ...) applied and checked.

    The file is executed: configs are code and trusted. `flags`: names that an unknown override may have meant instead.
    Raises ConfigError.
    """
    return load_both(path, overrides, flags)[1]


def load_both(path: str | Path, overrides: Iterable[str], flags: Iterable[str] = ()) -> tuple[RunConfig, RunConfig]:
    """The config as its file says, of which only the kinds are checked, and as `load` gives it."""
    from jaxtrain.overrides import apply

    plain = _from_file(Path(path))
    return plain, check(apply(plain, list(overrides), flags))


def _from_file(path: Path) -> RunConfig:
    if not path.is_file():
        near = sorted({str(p) for folder in (path.parent, Path("configs")) for p in folder.glob("*.py")})
        fix = f"one of: {', '.join(near)}" if near else "the path of a Python file that binds `config` to a RunConfig"
        if (path / "config.json").is_file():
            fix = f"this is a run's folder: the file that the run was started with, --name {path.name} --runs-dir {path.parent}"
        raise ConfigError(f"no config at {path}.", rule="CONFIG is a Python file", fix=fix)
    config = getattr(execute(path), "config", None)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{path} defines no config.",
            got=f"config = {config!r}",
            rule="the file binds the name `config` to a RunConfig",
        )
    kinds.check(config)  # first: overrides rest on what is there
    return config


def check(config: RunConfig) -> RunConfig:
    """The config itself, if its fields agree with each other; a device count is not needed. Raises ConfigError."""
    kinds.check(config)
    _check_plain(config)
    from_one = dict.fromkeys(("steps", "batch", "seq_len", "accumulate", "log_every"), ranges.whole(1))
    ranges.check("", config, **from_one, z_loss=ranges.FROM_ZERO, seed=ranges.SEED)
    for source in (config.data, *([config.eval.data] if config.eval else [])):
        check_vocab(source, config.model.vocab_size)
    _check_folders(config)
    if config.batch % config.accumulate:
        raise ConfigError(
            f"batch = {config.batch} does not divide into accumulate = {config.accumulate} microbatches.",
            rule="accumulate divides the global batch",
            fix=f"batch = {round_up(config.batch, config.accumulate)}",
        )
    if config.eval:
        check_disjoint(config.data, config.eval.data)
        check_tokenizers(config.data, config.eval.data)
    return config


def _check_plain(config: RunConfig) -> None:
    for path, value in flatten(encode(config)).items():
        if not isinstance(value, str | int | float | None):
            raise ConfigError(
                f"{path} = {value!r} cannot be written into the run folder.",
                got=value.__qualname__ if isinstance(value, type) else type(value).__name__,
                rule="a config is plain data: text, numbers, True, False, None, paths, and tuples, dicts or dataclasses of them",
                fix="put a name there, such as 'bfloat16', and look it up where it is used",
            )


def _check_folders(config: RunConfig) -> None:
    """Their names stand in scripts and messages too, a line each."""
    kept = "".join(c if c.isprintable() and c != "/" else "-" for c in config.name.lstrip("./"))
    if config.name.startswith(".") or (kept or "run") != config.name:
        raise ConfigError(
            f"name = {config.name!r} is no folder name.",
            rule="one path component of printable characters that does not start with a dot; runs_dir is the folder above it",
            fix=f"name = {kept or 'run'!r}",
        )
    if not config.runs_dir.isprintable():
        raise ConfigError(f"runs_dir = {config.runs_dir!r} is no folder name.", rule="printable characters")


def encode(value: Any) -> Any:
    """Plain JSON of a config; dataclasses carry their type, so that AdamW and Lion differ even with equal fields."""
    if isinstance(value, type):
        return value  # no plain data, as `check` says
    if dataclasses.is_dataclass(value):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": full_name(type(value)), **fields}
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def differences(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
    """{"optim.peak_lr": (old, new)} over all leaves of two encoded configs that are not equal."""
    flat_old, flat_new = flatten(old), flatten(new)
    paths = sorted(flat_old.keys() | flat_new.keys())
    pairs = {path: (flat_old.get(path), flat_new.get(path)) for path in paths}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def flatten(encoded: Any, prefix: str = "") -> dict[str, Any]:
    """{"mesh.fsdp": -1, "sinks.0.type": ...} of an encoded config."""
    if isinstance(encoded, dict):
        items = encoded.items()
    elif isinstance(encoded, list):
        items = enumerate(encoded)
    else:
        return {prefix: encoded}
    rows = [flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in items]
    return {path: v for row in rows for path, v in row.items()} or {prefix: "none"}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
