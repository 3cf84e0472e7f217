"""`jaxtrain data ...`: prepare, verify, order, train-tokenizer. It needs no device and does not import jax."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrain.data.source import HuggingFace, Jsonl, Parquet, Source, Text, parts
from jaxtrain.errors import ConfigError, DataError, closest


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb takes."""

    cache_dir: str | None = None  # where prepared data lives; beside the config's runs unless given


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Options):
    workers: int | None = None  # processes; as many as there are cores unless given


@dataclass(frozen=True, kw_only=True)
class OrderOptions(Options):
    step: int = 1  # as in metrics.jsonl: of the first update


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    vocab_size: int | None = None  # tokens; the model's vocab_size unless given
    max_bytes: int = 1 << 30  # of text to learn from: a larger corpus is sampled by document


def main(argv: list[str]) -> int:
    """jaxtrain data VERB CONFIG [flags] [overrides of the config]"""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "\n".join(
                [f"usage: {main.__doc__}", "", *(f"  {verb:<16} {run.__doc__.splitlines()[0]}" for verb, (_, run) in VERBS.items())]
            )
        )
        return 0
    if argv[0] not in VERBS:
        raise ConfigError(f"jaxtrain data has no command {argv[0]!r}.", fix=closest(argv[0], VERBS))
    from jaxtrain.command import parse

    options, run = VERBS[argv[0]]
    doc = f"jaxtrain data {argv[0]} CONFIG [flags]\n\n{inspect.cleandoc(run.__doc__)}"
    call = parse(f"jaxtrain data {argv[0]}", options, argv[1:], doc=doc)
    run(call.load(), call.options)
    return 0


def prepare(config: Any, options: PrepareOptions) -> None:
    """Tokenise the training and evaluation data into shards, or find them."""
    from jaxtrain.data.dataset import tokenizer_of
    from jaxtrain.data.prepare import prepared

    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is no number of processes.", rule="at least 1")
    for source in _sources(config):
        tokenizer_of(source, config.model.vocab_size)  # raises now what training would raise later
    for part in _prepared_parts(config):
        folder = prepared(part, _cache(config, options), prepare=True, workers=options.workers)
        print(f"{_summary(folder)}  {part.split:<7}  {', '.join(part.files)}")


def verify(config: Any, options: Options) -> None:
    """Check every byte of the prepared data against its checksums."""
    from jaxtrain.data.prepare import find
    from jaxtrain.data.shards import Shards

    for part in _prepared_parts(config):
        folder = find(part, _cache(config, options))
        if not (folder / "index.json").exists():
            got, fix = f"no index.json in {folder}", "jaxtrain data prepare CONFIG, or the --cache-dir that it was given"
            raise DataError(f"the {part.split} data is not prepared.", got=got, fix=fix)
        print(f"{folder}  {Shards(folder).verify():,} bytes of tokens are as written")


def order(config: Any, options: OrderOptions) -> None:
    """Print the examples of a step by row: document and token that each begins at, and what it stands in for.

    --step counts as `step` in metrics.jsonl, from 1: what is printed is the batch of that row's update.
    """
    from jaxtrain.data import quarantine
    from jaxtrain.data.dataset import open_dataset

    data = open_dataset(
        config.data,
        seq_len=config.seq_len,
        batch=config.batch,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        cache_dir=_cache(config, options),
    )
    if options.step < 1:
        rule = "steps count from 1, as in metrics.jsonl"
        raise ConfigError(f"--step {options.step} is no step.", rule=rule, fix="--step 1 is the first")
    now, index = data.without(quarantine.read(config.run_dir)), options.step - 1
    for row, (name, first) in enumerate(zip(now.ids(index), data.ids(index), strict=True)):
        print(row, name if name == first else f"{name} in place of {first}")


def train_tokenizer(config: Any, options: TrainOptions) -> None:
    """Train a byte-level BPE on the training text and write it to the file that the config's tokenizer names."""
    from jaxtrain.data.reading import source_files
    from jaxtrain.data.tokenizer import train_bpe

    sources = [part for part in _file_parts(config.data) if isinstance(part.tokenizer, HuggingFace)]
    if not sources:
        raise ConfigError(
            "the config's data has no tokenizer to train.",
            rule='a source with tokenizer=HuggingFace(file="tokenizer.json")',
        )
    value, size = sources[0].tokenizer, sum(file.size for part in sources for file in source_files(part))
    texts = _texts(sources, options.max_bytes / max(size, 1))
    train_bpe(texts, value, options.vocab_size or config.model.vocab_size)
    print(value.file)


def _texts(sources: list[Text | Jsonl | Parquet], share: float) -> Iterator[str]:
    """A share of the sources' documents. Raises DataError for what is not UTF-8, in whichever document."""
    from jaxtrain.data.dataset import source_documents
    from jaxtrain.data.files import hashed_out
    from jaxtrain.data.prepare import not_utf8

    for part, document in ((part, document) for part in sources for document in source_documents(part)):
        try:
            text = document.text.decode("utf-8", part.tokenizer.errors)
        except UnicodeDecodeError as error:
            raise not_utf8(part, document, error.start) from error
        if hashed_out(b"tokenizer" + document.text, share):  # the bare hash decides what is held out
            yield text


VERBS = {
    "prepare": (PrepareOptions, prepare),
    "verify": (Options, verify),
    "order": (OrderOptions, order),
    "train-tokenizer": (TrainOptions, train_tokenizer),
}


def _sources(config: Any) -> list[Any]:
    return [config.data, *([config.eval.data] if config.eval else [])]


def _file_parts(*sources: Source) -> Iterator[Text | Jsonl | Parquet]:
    """The parts that are prepared; others are read in place."""
    unique = dict.fromkeys(part for source in sources for part in parts(source))
    return (part for part in unique if isinstance(part, Text | Jsonl | Parquet))


def _prepared_parts(config: Any) -> list[Text | Jsonl | Parquet]:
    """Of training and evaluation; where there is none, says so."""
    sources = _sources(config)
    if not (found := list(_file_parts(*sources))):
        kinds = {type(part).__name__: None for source in sources for part in parts(source)}
        print(f"nothing to prepare: {', '.join(kinds)} data is read in place")
    return found


def _cache(config: Any, options: Options) -> Path:
    from jaxtrain.data.prepare import default_cache

    return Path(options.cache_dir) if options.cache_dir else default_cache(config.runs_dir)


def _summary(folder: Path) -> str:
    from jaxtrain.data.shards import Shards

    stream = Shards(folder)
    return f"{folder}  {stream.num_tokens:,} tokens in {stream.num_documents:,} documents"
