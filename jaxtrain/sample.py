"""`jaxtrain sample`: text from a run's newest checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtrain import ranges
from jaxtrain.command import parse
from jaxtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `jaxtrain sample` beside the config's own overrides."""

    prompt: tuple[str, ...] = ("",)
    tokens: int = 200
    temperature: float = 0.7
    sample_seed: int = 0


def main(argv: list[str]) -> int:
    """jaxtrain sample CONFIG [--prompt TEXT ...] [--tokens N] [--temperature T] [overrides of the config]"""
    call = parse("jaxtrain sample", Options, argv, doc=main.__doc__)
    config, options = call.load(), call.options
    if not options.prompt:
        raise ConfigError("--prompt has no text.", fix="leave it out, or --prompt TEXT")
    numbers = dict(tokens=ranges.whole(1), temperature=ranges.FROM_ZERO, sample_seed=ranges.SEED)
    ranges.check("", options, **numbers)

    import meshes
    from jaxtrain import checkpoint, runtime

    runtime.start(fake_devices=call.process.fake_devices, xla=config.xla)

    from jaxtrain.data import tokenizer_of
    from jaxtrain.generate import generate
    from jaxtrain.layout import check_layout
    from jaxtrain.train.state import Blueprint

    check_layout(config, len(runtime.devices()), runtime.devices()[0].platform)
    blueprint = Blueprint(config, meshes.make(config.mesh, runtime.devices()))
    params = checkpoint.restore(config.run_dir, blueprint.abstract, only="params")
    tokenizer = tokenizer_of(config.data)
    if tokenizer is None:
        raise ConfigError("the config's data has no tokenizer, so there is no text to write.", got=type(config.data).__name__)
    prompts = [tokenizer.encode(text) or [tokenizer.end] for text in options.prompt]
    for text in generate(blueprint, params, prompts, options.tokens, options.temperature, options.sample_seed):
        print(tokenizer.decode(text), end="\n\n")
    return 0
