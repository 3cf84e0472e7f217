"""`jaxtrain show`: every resolved value of a config with its source, and what follows from it. It touches no device."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtrain.command import parse
from jaxtrain.config import RunConfig
from jaxtrain.layout import check_layout
from jaxtrain.loading import full_name
from jaxtrain.overrides import leaves, sources
from jaxtrain.xla import check
from meshes import PRESETS, Rules, product


@dataclass(frozen=True, kw_only=True)
class Options:
    """`show` has no flags of its own."""


def main(argv: list[str]) -> int:
    """jaxtrain show CONFIG [--fake-devices N] [overrides of the config]"""
    call = parse("jaxtrain show", Options, argv, doc=main.__doc__)
    plain, config = call.load_both()
    check(config.xla)
    fake = call.process.fake_devices
    sizes = check_layout(config, fake, "cpu") if fake else None
    print(table(plain, config))
    print()
    print(derived(config, sizes))
    return 0


def table(plain: RunConfig, config: RunConfig) -> str:
    """A line per value or choice: its flag, the value, and default, config (the file) or override (the command line)."""
    values, origin = leaves(config), sources(plain, config)
    wide = max(map(len, values)) + 2
    return "\n".join(f"{path:<{wide}}{_text(path, value):<44}  {origin[path]}" for path, value in values.items())


def derived(config: RunConfig, sizes: dict[str, int] | None = None) -> str:
    """Parameter count, tokens and FLOPs per step; the mesh, where its sizes are known."""
    per_token = config.model.flops_per_token(config.seq_len)
    rows = {
        "parameters": f"{config.model.num_params():,}",
        "tokens per step": f"{config.tokens_per_step:,}",
        "tokens in all": f"{config.tokens_per_step * config.steps:,}",
        "FLOPs per token": f"{per_token:.4g}",
        "FLOPs per step": f"{per_token * config.tokens_per_step:.4g}",
        "run folder": str(config.run_dir),
        **({"mesh": product(sizes)} if sizes else {}),
    }
    return "\n".join(f"{name:<18}{value}" for name, value in rows.items())


def _text(path: str, value: object) -> str:
    """Choices by the names that flags take; no flag takes a model, whose module is its family."""
    if isinstance(value, Rules):
        return next(name for name, preset in PRESETS.items() if preset == value)
    if isinstance(value, type):
        return full_name(value) if path == "model" else value.__name__
    return value if isinstance(value, str) else repr(value)
