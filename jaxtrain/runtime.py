"""Brings a process up before it touches a device: platform, XLA flags, compilation cache, its peers. It trains nothing.

Also what processes agree on after that (fingerprints, barriers) and what they run on (`environment`).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain import coordination
from jaxtrain.background import Deadline
from jaxtrain.cluster import Member, few, member
from jaxtrain.errors import RunError
from jaxtrain.meeting import meet
from jaxtrain.xla import XlaFlags, add_flags, add_known, on_gpu

if TYPE_CHECKING:
    from jax import Device

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PACKAGES = ("jaxtrain", "meshes", "models")
MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the first's old name
FLAGS = {
    # jax 0.12's default aborts while it compiles a shard_map within a shard_map over an axis that comes later in the mesh.
    "xla_enable_hlo_sharding_v3": "false",
}
CPU_FLAGS = {
    # After 40 s of devices of one process waiting for each other XLA would abort: on a busy machine they take longer.
    "xla_cpu_collective_call_terminate_timeout_seconds": "600",
    # LLVM's first level: a step compiles in three quarters of the time and runs as fast, its products being Eigen's.
    "xla_backend_optimization_level": "1",
    # It aborts on a bfloat16 all-reduce within a shard_map over some axes of a mesh; CPUs sum bfloat16 without it.
    "xla_disable_hlo_passes": "all-reduce-promotion",
}
_END, _FOLLOW_S = "jaxtrain/end", 0.5
_LAST_S = 2.0  # for the other processes to hear why they end, or to say so for themselves
_HEARD_S = 15.0  # for the other processes to hear a verdict before the first of them leaves
_round = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Process:
    """Which process this is: `index` of `count`, on `host`."""

    index: int = 0
    count: int = 1
    host: str = ""

    @property
    def lead(self) -> bool:
        """Whether it is the one that writes files and speaks for all."""
        return self.index == 0


_process = Process(host=socket.gethostname())


def start(
    *,
    fake_devices: int | None = None,
    xla: XlaFlags = XlaFlags(),
    cache_dir: Path | None = None,
    deadline_s: float = 300.0,
) -> Process:
    """Sets this process up and meets its peers; comes before the first use of a device.

    `fake_devices`: run on that many CPU devices. `cache_dir`: compiled programs are kept there; None:
    $JAXTRAIN_CACHE_DIR or ~/.cache/jaxtrain. Raises RunError where peers are missing at the deadline or fake devices
    come too late, ConfigError for an unknown XLA flag.
    """
    _platform(fake_devices)
    _xla(xla)
    _compilation_cache(cache_dir)
    if not on_gpu(_environ()):
        _keep_freed_memory()
    me = member()
    if me is not None:
        _join(me, deadline_s)
        _share_compiled_programs()
    return _process


def devices() -> list[Device]:
    """All devices of the run, of every process. Raises RunError where jax cannot start them."""
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where JAX_PLATFORMS names a plugin that is missing
        raise RunError(
            "jax did not start its devices.",
            got=" ".join(f"JAX_PLATFORMS={jax.config.jax_platforms or ''} {error}".split()),
            rule="JAX_PLATFORMS is empty or names what this machine has and jax is installed for",
            fix="JAX_PLATFORMS=cpu, or pip install 'jaxtrain[cuda13]' (cuda12 on older drivers)",
        ) from error


def inline() -> bool:
    """Whether programs run within the call that starts them: on CPUs where there are several processes (`_join`)."""
    import jax

    return _process.count > 1 and jax.default_backend() == "cpu"


def place() -> str:
    """`[process 3/16 host] `, the head of an error message; nothing where there is one process."""
    return f"[process {_process.index}/{_process.count} {_process.host}] " if _process.count > 1 else ""


def last_words(error: str, code: int) -> None:
    """Before this process ends in an error: process 0 holds what the others hang on, and without it they crash. Where
    nobody supervises them they end with it, by its code and its error's first line."""
    if not (_process.lead and _process.count > 1):
        return
    if coordination.serves():
        with contextlib.suppress(Exception):  # nobody hears it any more
            coordination.put(f"{_END}/0", json.dumps([error.split("\n")[0], code]), _LAST_S)
    time.sleep(max(_LAST_S, 2 * _follow_s()))


def _follow_s() -> float:
    return max(_FOLLOW_S, _process.count / coordination.TALKS_A_SECOND)


def _end_with_lead(said: str) -> None:
    error, code = json.loads(said)
    print(f"{place()}process 0 has ended: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def leave_last() -> None:
    """After a stop that all agreed on: the others are moments behind, and crash if what serves them is gone before them."""
    if coordination.serves():
        time.sleep(_LAST_S)


def barrier(name: str, deadline_s: float) -> None:
    """Returns when all processes have come here, each in the same order of calls. Raises RunError at the deadline."""
    if _process.count == 1:
        return
    key = f"barrier/{next(_round)}/{name}"
    coordination.put(f"{key}/{_process.index}", _process.host, deadline_s)
    if coordination.wait(key, deadline_s):
        return
    came = {int(index) for index in coordination.under(key, _HEARD_S)}
    absent = [index for index in range(_process.count) if index not in came]
    raise RunError(
        f"{len(absent)} of {_process.count} processes did not come to {name!r}: {few(absent)}.",
        got=f"{deadline_s:.0f} s waited",
        rule=f"all processes come to {name!r} before the deadline",
        fix="look at what the missing processes printed last",
    )


def compare_fingerprints(fields: Mapping[str, str], deadline_s: float) -> None:
    """Returns when all processes have shown equal fields; else the same RunError on all names fields and processes."""
    if _process.count == 1:
        return
    key = f"fingerprint/{next(_round)}"
    coordination.put(f"{key}/{_process.index}", json.dumps([_process.host, dict(fields)]), deadline_s)
    if _process.lead:
        coordination.put(f"{key}/verdict", json.dumps(_verdict(key, deadline_s)), _HEARD_S)
    answer = coordination.get(f"{key}/verdict", deadline_s + _HEARD_S)
    if answer is None:
        raise RunError("Process 0 did not compare the fingerprints.", got=f"{deadline_s + _HEARD_S:.0f} s waited")
    if json.loads(answer):
        coordination.wait(f"{key}/heard", _HEARD_S)
        raise RunError(**json.loads(answer))


def code_fingerprint() -> str:
    """16 hex digits over the sources of jaxtrain, meshes and models and the versions of what they compute with."""
    digest = hashlib.sha256(json.dumps(_versions(LIBRARIES)).encode())
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in map(Path, spec.submodule_search_locations if spec else ()):
            for path in sorted(root.rglob("*.py")):
                name = f"{package}/{path.relative_to(root).as_posix()}"
                digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """What this run runs on, as JSON: command, host, versions, git state, devices, XLA flags. Starts the devices."""
    import jax

    device = jax.devices()[0]
    return {
        "argv": sys.argv,
        "directory": os.getcwd(),
        "host": _process.host,
        "processes": _process.count,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions((*LIBRARIES, "jax-cuda12-plugin", "jax-cuda13-plugin")),
        "code": code_fingerprint(),
        "git": _git(),
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "per_process": jax.local_device_count(),
            "runtime": getattr(device.client, "platform_version", ""),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "memory_fraction": next((os.environ[name] for name in MEMORY if name in os.environ), ""),
        "compilation_cache": jax.config.jax_compilation_cache_dir,
    }


def _platform(fake_devices: int | None) -> None:
    import jax

    if fake_devices is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", fake_devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError as error:
        if jax.default_backend() != "cpu" or jax.local_device_count() != fake_devices:
            raise RunError(
                f"{fake_devices} fake devices cannot be made any more.",
                got=f"{jax.local_device_count()} {jax.default_backend()} devices are in use in this process",
                rule="devices are chosen before the first use of one",
                fix="call runtime.start first, or start a new process",
            ) from error


def _xla(flags: XlaFlags) -> None:
    """XLA_FLAGS, and how much of a GPU's memory jax takes: 0.75 by itself, which idles 35 GB of an H200.

    The tenth that stays is for the CUDA context, NCCL and cuBLAS; NVIDIA's pages on JAX name 0.8 to 0.9. FLAGS, and on
    CPUs CPU_FLAGS, are set where this XLA knows them and XLA_FLAGS does not set them.
    """
    env = _environ()
    add_flags(flags, env)
    if on_gpu(env) and not any(name in env for name in MEMORY):
        env[MEMORY[0]] = "0.9"
    add_known(FLAGS if on_gpu(env) else FLAGS | CPU_FLAGS, env)
    os.environ.update({name: env[name] for name in ("XLA_FLAGS", MEMORY[0]) if name in env})


def _environ() -> dict[str, str]:
    """The environment with the platforms that jax was told, be it there or by `fake_devices`."""
    import jax

    return os.environ | {"JAX_PLATFORMS": jax.config.jax_platforms or ""}


def _keep_freed_memory() -> None:
    """Makes glibc keep what a CPU step frees for the next step, up to 2 GB, where there is a glibc.

    By default it gives large blocks back to the kernel, which zeroes them page by page at every step: half a million
    page faults in ten steps of the quickstart, against 4,000 so, and a tenth to a fifth of the step's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    arena_max, mmap_threshold, trim_threshold, top_pad = -8, -3, -1, -2  # malloc.h; one arena, as others are below 64 MB
    for name, value in ((arena_max, 1), (mmap_threshold, 1 << 30), (trim_threshold, 2**31 - 1), (top_pad, 1 << 28)):
        mallopt(name, value)


def _compilation_cache(cache_dir: Path | None) -> None:
    """Compiled programs outlive the process: a 25 s compilation is read back in 0.6 s. A user's own setting stays."""
    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    try:
        root = cache_dir or Path(os.environ.get("JAXTRAIN_CACHE_DIR") or Path.home() / ".cache" / "jaxtrain")
        (root / "xla").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        print(f"no compilation cache: {error}; set JAXTRAIN_CACHE_DIR to a folder that can be written", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they put the folder's path into the key
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compile_anew_on_cpu() -> None:
    """Leaves the compilation cache alone from here on, on CPUs: a pipeline that XLA reads back from it deadlocks there.

    XLA's CPU programs keep collectives in order by a resource that they share, and reading one back makes another for
    each loop and branch (thunk_proto_serdes.cc). Then a device may run two that do not depend on each other in either
    order: at stage 4 x fsdp 2 one of a pair waited in an all-gather, the other in an all-reduce, the rest in a permute,
    each on one of the eight threads that the process has. NPROC=64, which gives it more, trains from the same cache
    (jax 0.10.2). GPU programs are of another kind.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if not on_gpu(_environ()):
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether it is used is decided at the first compilation, and kept


def _share_compiled_programs() -> None:
    """Gives a program one cache key in all processes on CPUs. Process 0 alone writes the cache, and there jax puts into
    the key which process asks and on which devices, so that the others compiled at every start: 4 s of CPU time each for
    a small step. Instead, as on GPUs: the kinds of the devices, and none of their numbers. Private to jax (checked with
    0.10.2): where it is not as here, all but process 0 compile.
    """
    from jax._src import cache_key

    hashed = getattr(cache_key, "_hash_serialized_compile_options", None)
    topology = getattr(cache_key, "_hash_accelerator_config", None)
    if not (hashed and topology) or on_gpu(_environ()):
        return

    def kinds(made: Any, devices: Any) -> None:
        if any(device.platform != "cpu" for device in devices.flat):
            return topology(made, devices)
        return made.update(f"{devices.size} {_instructions()}".encode())

    cache_key._hash_accelerator_config = kinds
    cache_key._hash_serialized_compile_options = lambda made, options, **_: hashed(made, options, True)


def _instructions() -> str:
    """What this machine's CPUs can do: a program that was compiled for others may not run on them."""
    with contextlib.suppress(OSError):
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features", "model name"))]
        return " ".join(dict.fromkeys(found))
    return platform.processor()


def _join(me: Member, deadline_s: float) -> None:
    import jax

    global _process
    _process = Process(index=me.index, count=me.count, host=_process.host)
    if me.hosted:
        meet(me, _process.host, deadline_s)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # two programs in flight meet gloo in either order, and hang
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM from train/notice.py
    try:
        if not me.hosted:
            return coordination.connect(me.coordinator, me.count, me.index, deadline_s)
        jax.distributed.initialize(
            me.coordinator, me.count, me.index, local_device_ids=me.gpus, cluster_detection_method="deactivate"
        )
    except RuntimeError as error:
        raise RunError("jax.distributed did not start.", got=str(error), rule="it comes before any device") from error
    if me.index:
        coordination.follow(_END, _follow_s(), _end_with_lead)


def _verdict(key: str, deadline_s: float) -> dict[str, str] | None:
    """None, or what the processes disagree on, as the arguments of a RunError."""
    deadline = Deadline(deadline_s)  # one for all: the others wait that long for this verdict
    for index in range(_process.count):
        if coordination.get(f"{key}/{index}", deadline.left()) is None:
            break
    answers = coordination.under(key, _HEARD_S)
    absent = [index for index in range(_process.count) if str(index) not in answers]
    if absent:
        return dict(what=f"Processes {few(absent)} showed no fingerprint.", got=f"{deadline_s:.0f} s waited")
    hosts, shown = zip(*(json.loads(answers[str(index)]) for index in range(_process.count)))
    names = dict.fromkeys(name for fields in shown for name in fields)
    differing = [name for name in names if len({fields.get(name) for fields in shown}) > 1]
    if not differing:
        return None
    rows = [f"{name}: {_who(hosts, [fields.get(name) for fields in shown])}" for name in differing]
    return dict(
        what=f"The processes disagree on {', '.join(differing[:8])}.",
        got="\n        ".join(rows[:8]),
        rule="all processes of a run have one config and one code",
        fix="start all from the same sources, packages, config and overrides",
    )


def _who(hosts: Iterable[str], values: list[str | None]) -> str:
    """`'a' on 0 (host), 2 (host); 'b' on 1 (host)`."""
    processes: dict[str | None, list[str]] = {}
    for index, (host, value) in enumerate(zip(hosts, values)):
        processes.setdefault(value, []).append(f"{index} ({host})")
    return "; ".join(f"{_short(value)} on {few(those)}" for value, those in processes.items())


def _short(value: str | None, length: int = 60) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def _versions(names: Iterable[str]) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git() -> dict[str, Any]:
    """Revision, and which tracked files differ from it; {} outside a repository."""
    root = Path(__file__).parent.parent
    try:
        revision = _run_git(root, "rev-parse", "HEAD").strip()
        changed = _run_git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"revision": revision, "dirty": bool(changed), "changed": [line[3:] for line in changed][:20]}


def _run_git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
