"""What this machine's NVIDIA GPUs can do, and what our step of a dense model makes of it.

    python -m benchmarks.gpu [--tiny] [--size NAME] [--batch-per-device N] [--seq-len N] [--remat WHAT] [--out FILE.json]

Matmul and copy rates of one card first; then the step: time, MFU against the published peak, peak memory, and the
kernels that it was compiled to. `--tiny` runs all of it in seconds on whatever is there, to see that it works; its figures
mean nothing.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import program
from jaxtrain.errors import RunError

REPEATS = 10  # calls that are timed together, so that dispatch hides behind the device
ROUNDS = 3  # of REPEATS; the median counts


@dataclass(frozen=True, kw_only=True)
class Options:
    """The defaults take 3 to 5 minutes, most of them compilation, and about 70 GB of each card."""

    size: str = "1b"  # a named size of models.llama
    batch_per_device: int = 8
    seq_len: int = 4096
    remat: str = "none"
    matmul_sides: tuple[int, ...] = (4096, 8192, 16384)
    copy_bytes: int = 2**32
    tiny: bool = False  # the smallest of everything, on one device of any kind
    out: Path | None = None


TINY = Options(size="1m", batch_per_device=1, seq_len=64, matmul_sides=(64, 128), copy_bytes=2**16, tiny=True)


def seconds(call: Callable[[], Any]) -> float:
    """Seconds per call: the median round of REPEATS calls whose last result is awaited, after one call to warm up."""
    import jax

    def once() -> float:
        start = time.perf_counter()
        for _ in range(REPEATS):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / REPEATS

    jax.block_until_ready(call())
    return statistics.median(once() for _ in range(ROUNDS))


def card(options: Options) -> dict[str, float]:
    """FLOP/s of square bf16 matmuls, and bytes per second read and written by a copy, on one card."""
    import jax
    import jax.numpy as jnp

    matmul, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    rates = {}
    for side in options.matmul_sides:
        x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)  # zeros draw less power, and run faster
        rates[f"matmul {side} bf16 FLOP/s"] = 2 * side**3 / seconds(lambda: matmul(x, x))
    x = jnp.zeros(options.copy_bytes // 4, jnp.float32)
    rates["copy bytes/s"] = 2 * x.nbytes / seconds(lambda: copy(x))
    return rates


def run_config(options: Options, num_devices: int) -> Any:
    """Our step's config: AdamW, fp32 master parameters, bf16 compute, sharded over all devices by FSDP."""
    from jaxtrain.config import RunConfig
    from jaxtrain.data.source import Synthetic
    from jaxtrain.layout import check_layout
    from jaxtrain.train.precision import BF16
    from models.llama import size

    model = size(options.size, remat=options.remat)
    config = RunConfig(
        name=f"gpu-{options.size}",
        model=model,
        data=Synthetic(vocab_size=model.vocab_size),
        steps=1000,
        batch=options.batch_per_device * num_devices,
        seq_len=options.seq_len,
        precision=BF16,
    )
    check_layout(config, num_devices)
    return config


def batch_of(config: Any, mesh: Any) -> dict[str, Any]:
    """Uniform random tokens, one document a row."""
    import numpy as np

    import meshes

    shape = (config.batch, config.seq_len)
    ids = np.random.default_rng(0).integers(config.model.vocab_size, size=(shape[0], shape[1] + 1), dtype=np.int32)
    rows = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "weights": np.ones(shape, np.float32),
    }
    return meshes.globalize(rows, mesh, config.rules, config.batch)


def train(options: Options, config: Any, devices: list[Any]) -> dict[str, Any]:
    """Compiles our step, sees that it fits, times it."""
    import jax
    import numpy as np

    import meshes
    from jaxtrain.train.state import Blueprint
    from jaxtrain.train.step import train_step

    mesh = meshes.make(config.mesh, devices)
    blueprint = Blueprint(config, mesh)
    batch = batch_of(config, mesh)
    stop = jax.device_put(np.zeros(mesh.devices.size, np.int32), meshes.per_device(mesh))
    start = time.perf_counter()
    compiled = train_step(blueprint).lower(blueprint.abstract, batch, stop).compile()
    facts = {"compile s": time.perf_counter() - start, **memory(compiled, options)}
    before = peak_bytes() or 0  # of the card's copy, and of kernels tried in compiling
    state = blueprint.init()

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch, stop)
        return metrics["train/loss"]

    per_step = seconds(step)
    facts |= speed(config, per_step, len(devices))
    return facts | {"peak bytes": peak_bytes(before), "kernels": kernels(compiled.as_text())}


def peak_bytes(before: int = 0) -> int | None:
    """The most that one device has held in this process; None where that is not known or was so `before`, of other work."""
    import jax

    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return peak if peak > before else None


def speed(config: Any, per_step: float, num_devices: int) -> dict[str, Any]:
    import jax

    from meshes import topology

    tokens = config.tokens_per_step / num_devices
    flops = config.model.flops_per_token(config.seq_len) * tokens
    peak = topology.peak_flops(jax.devices()[0].device_kind, "bfloat16")
    return {
        "parameters": config.model.num_params(),
        "batch": [config.batch, config.seq_len],
        "step s": per_step,
        "tokens/s/device": tokens / per_step,
        "FLOP/s/device": flops / per_step,
        "MFU": flops / per_step / peak if peak else None,
    }


def memory(compiled: Any, options: Options) -> dict[str, int]:
    """Bytes that one device will hold. Raises RunError where jax may not take as many: the run would end in an OOM."""
    import jax

    sizes = compiled.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + outputs
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit and needed > limit:
        raise RunError(
            f"The step of {options.size} needs more memory than a card gives.",
            got=f"{needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB",
            rule="arguments, temporaries and outputs fit into what jax takes of the card",
            fix=f"--batch-per-device {max(1, options.batch_per_device // 2)}, or --remat projections",
        )
    return {"compiled bytes": needed}


def kernels(hlo: str) -> dict[str, int]:
    """Library calls, Triton fusions and collectives of a compiled program: how often each stands in it, loops once."""
    calls = re.findall(r'custom_call_target="([^"]+)"', hlo)
    fusions = re.findall(r'"fusion_backend_config":\s*\{\s*"kind":\s*"(__triton\w*)"', hlo)
    collectives = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", hlo)
    return dict(Counter([*calls, *fusions, *collectives]).most_common(20))


def attention(found: dict[str, int]) -> str:
    """Which attention was compiled, by its calls: the choice that a model made is one thing, the program another."""
    fused = sum(count for name, count in found.items() if "fmha" in name)
    return f"cuDNN flash attention, {fused} calls" if fused else "plain XLA, no fused kernel"


def main(argv: list[str]) -> int:
    import tyro

    options = tyro.cli(Options, args=argv, default=TINY if "--tiny" in argv else Options())

    from jaxtrain import runtime

    runtime.start()
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu" and not options.tiny:
        raise RunError(
            "There is no GPU to measure.",
            got=f"{jax.device_count()} {device.platform} devices",
            rule="an NVIDIA GPU and jax with CUDA (make cuda13)",
            fix="--tiny runs the same code on any device, to see that it works",
        )
    devices = jax.devices()[:1] if options.tiny else jax.devices()
    config = run_config(options, len(devices))  # first: what cannot run is refused before minutes of the card's
    print(f"{jax.device_count()} x {device.device_kind}")
    result: dict[str, Any] = {"card": _shown(card(options))}
    result["step"] = _shown(train(options, config, devices))
    result["attention"] = attention(result["step"]["kernels"])
    print(f"  {'attention':<28}{result['attention']}")
    result |= {"options": dataclasses.asdict(options), "environment": runtime.environment()}
    program.write(options.out, result, f"gpu-{device.device_kind.replace(' ', '-').lower()}")
    return 0


def _shown(rows: dict[str, Any]) -> dict[str, Any]:
    """Printed as soon as known: a benchmark that ends early has said what it found."""
    for name, value in rows.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in parts:
            text = f"{number:.4g}" if isinstance(number, float) else str(number)
            print(f"  {f'{name} {part}'.strip():<52}{text}", flush=True)
    return rows


if __name__ == "__main__":
    import sys

    program.run(main, sys.argv[1:])
