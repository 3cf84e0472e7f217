"""`jaxtrain launch`: trains a config by supervised processes of this host, and of the job's other hosts, where the same
command runs; goes on when they fail."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, fields

from jaxtrain.background import Deadline, Lately, within
from jaxtrain.checkpoint.files import steps
from jaxtrain.command import HELP, show_help, wants_help
from jaxtrain.command import parse as parse_trainer
from jaxtrain.config import RunConfig
from jaxtrain.data.files import check_files
from jaxtrain.errors import ConfigError, closest
from jaxtrain.resilience import faults, injection
from jaxtrain.resilience.crew import Terms
from jaxtrain.resilience.fewer import Fits, local_gpus
from jaxtrain.resilience.host import Host, memory_folder
from jaxtrain.resilience.lead import Lead
from jaxtrain.resilience.policy import FOLDER, Shelf, place
from jaxtrain.resilience.roster import Roster, roster
from jaxtrain.resilience.say import flush
from jaxtrain.resilience.secret import job_secret
from jaxtrain.resilience.slots import starting
from jaxtrain.resilience.supervise import supervise
from jaxtrain.resilience.tenure import ended_with
from jaxtrain.train.command import Options as TrainerOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `jaxtrain launch`, on either side of CONFIG."""

    processes: int = 1  # trainers of this host; one drives all its GPUs, several take fake CPU devices
    devices_per_process: int = 0  # fake CPU devices of each process; 0: what the machine has, if it is one process, else 1
    spares: int = 0  # of the job's hosts, how many wait for another to fail
    fault: tuple[faults.Fault, ...] = ()  # injected, to see what happens: kill:process=1,step=30


def main(argv: list[str]) -> int:
    """jaxtrain launch CONFIG [--processes N] [--devices-per-process N] [--spares N] [--fault FAULT]... [flags and overrides of jaxtrain train]"""
    if wants_help(argv):
        kinds = f"faults, as KIND:process=1,step=30,phase=step or KIND:seed=7:\n{faults.described()}"
        _, rest = _split([word for word in argv if word not in HELP])
        show_help("jaxtrain launch", TrainerOptions, rest, main.__doc__, Options, note=kinds)
        return 0
    options, rest = parse(argv)
    call = parse_trainer("jaxtrain train", TrainerOptions, rest, doc=main.__doc__)
    config = call.load(Options)
    for source in (config.data, *([config.eval.data] if config.eval else [])):
        check_files(source)  # what no generation could train on; of several hosts, this one alone may lack it
    devices = _fake_devices(options, call.process.fake_devices)
    fake = ["--fake-devices", str(devices)] if devices else []
    changed = threading.Event()
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"JAX_PLATFORMS": "cpu"} if devices else {})
    argv = ["train", rest[0], *fake, *rest[1:]]
    hosts = roster()
    count = options.processes * (_trained_on(hosts, options.spares) if hosts else 1)
    placed = [faults.placed(fault, count, config.steps) for fault in options.fault]
    injected = lambda number: faults.environment(placed, number)  # noqa: E731
    if hosts is None:
        memory = memory_folder(config.run_dir)
        with starting(memory):
            host = Host(argv, options.processes, memory, changed, env)
        try:
            return Lead(host, config.run_dir, changed, config.watch, injected).run()
        finally:
            flush()
    if _is_over(config):
        print(f"the run has ended, at step {config.steps}: this host came late")
        return 0
    devices = devices or local_gpus() or 1
    fits = Fits(config, devices * options.processes, _trained_on(hosts, options.spares))
    secret = job_secret(os.environ, config.run_dir)
    memories = [memory_folder(config.run_dir, name) for name in hosts.names]  # others may be on this machine
    memory = memories[hosts.index]
    with starting(*memories):
        host = Host(argv, options.processes, memory, changed, env, name=hosts.name, devices=devices)
    if placed:
        injection.obey(placed, host.pids)
    terms = Terms(
        fits=fits,
        buddies=fits.buddies if config.snapshot.buddies else None,
        moment=Lately(lambda: steps(config.run_dir / "checkpoints")[-1:]),
        spares=options.spares,
    )
    folder = place(config.snapshot, config.name, {FOLDER: str(memory)})
    shelf = folder and Shelf(folder, config.snapshot.memory_gb)
    return supervise(host, hosts, config.run_dir, secret, changed, config.watch, terms, injected, shelf)


def _fake_devices(options: Options, asked: int | None) -> int:
    """Of each process; 0: what the machine has. `asked`: for by --fake-devices. Raises ConfigError."""
    if options.devices_per_process and asked:
        raise ConfigError(
            "--devices-per-process and --fake-devices both say how many devices a process has.",
            got=f"--devices-per-process {options.devices_per_process}, --fake-devices {asked}",
            rule="one of them",
            fix=f"--devices-per-process {options.devices_per_process}",
        )
    devices = options.devices_per_process or asked or 0
    on_cpus = os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"
    if options.processes > 1 and not devices and local_gpus() and not on_cpus:
        raise ConfigError(
            f"--processes {options.processes} would leave this host's GPUs idle.",
            got=f"{local_gpus()} GPUs, and no number of CPU devices",
            rule="one process drives all GPUs of a host; --devices-per-process is for CPU devices",
            fix="--processes 1 trains on the GPUs, --devices-per-process 1 on CPUs",
        )
    return devices or (1 if options.processes > 1 else 0)


def _is_over(config: RunConfig) -> bool:
    """False too where the run folder does not answer: that is said by whoever needs it."""
    reached = lambda: max(steps(config.run_dir / "checkpoints"), default=0) >= config.steps  # noqa: E731
    with contextlib.suppress(OSError):
        return within(Deadline(10.0), reached) and ended_with(config.run_dir) == 0
    return False


def _trained_on(hosts: Roster, spares: int) -> int:
    """Raises ConfigError."""
    count = len(hosts.addresses)
    if spares >= count:
        raise ConfigError(f"--spares {spares} leaves no host.", got=f"{count} hosts", rule="fewer spares than hosts")
    return count - spares


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """The launcher's own flags, wherever they stand, and what is left: CONFIG and the rest. Raises ConfigError."""
    options, rest = _split(argv)
    if rest and rest[0].startswith("--"):
        raise ConfigError(
            f"jaxtrain launch has no flag {rest[0].partition('=')[0]}.",
            rule="flags of jaxtrain train come after CONFIG, its own on either side",
            fix=closest(rest[0].partition("=")[0], [f"--{f.name.replace('_', '-')}" for f in fields(Options)]),
        )
    if not rest:
        got, fix = " ".join(argv) or "nothing", "a file such as configs/quickstart.py"
        raise ConfigError("jaxtrain launch needs a CONFIG.", got=got, rule=main.__doc__ or "", fix=fix)
    return options, rest


def _split(argv: list[str]) -> tuple[Options, list[str]]:
    words, rest, values = list(argv), [], {}
    known = {f.name for f in fields(Options)}
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in known:
            rest.append(word)
            continue
        text = value if equals else words.pop(0) if words else ""
        values[name] = (*values.get(name, ()), faults.parse(text)) if name == "fault" else _count(flag, text, name != "spares")
    return Options(**values), rest


def _count(flag: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{flag} needs a number.", got=repr(text), rule=f"a whole number, at least {int(least)}")
    return int(text)
