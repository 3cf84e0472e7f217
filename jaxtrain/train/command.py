"""`jaxtrain train`: from a command line to a finished run. The loop itself is loop.py."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtrain.command import parse
from jaxtrain.train.notice import Notice


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `jaxtrain train` beside the config's own overrides."""

    accept_changes: bool = False  # continue a run folder with a config that differs from its own


def main(argv: list[str]) -> int:
    """jaxtrain train CONFIG [--fake-devices N] [--accept-changes] [overrides of the config]"""
    call = parse("jaxtrain train", Options, argv, doc=main.__doc__)
    config = call.load()
    with Notice() as notice:
        from jaxtrain import runtime

        process = runtime.start(fake_devices=call.process.fake_devices, xla=config.xla)

        from jaxtrain.train.run import train  # after start: it imports jax with the platform chosen

        code = train(config, process, notice, accept_changes=call.options.accept_changes)
        if code:
            runtime.leave_last()
        return code
