"""How fast text becomes shards and shards become batches, on one machine. It trains nothing and needs no device.

    python -m benchmarks.data_rates [--files GLOB] [--workers N] [--out FILE.json]

prepare/...: megabytes of text, against the tokenizer alone in one process. batches/...: millions of tokens, first
(blocks are checked against their CRC-32 as they are first read) and warm. Each per second of wall clock, and per
second of CPU over all processes: the second number holds on a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import resource
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import program
from jaxtrain.data import Dataset, HuggingFace, Text, open_dataset, prepared
from jaxtrain.data.dataset import source_documents
from jaxtrain.data.tokenizer import open_tokenizer, train_bpe
from jaxtrain.errors import DataError

SHAPES = ((256, 1024), (1024, 256), (4096, 64))  # (seq_len, batch), 262,144 tokens each


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", default=sysconfig.get_path("stdlib") + "/**/*.py")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    source = Text(files=(options.files,), tokenizer=HuggingFace(file="", errors="replace"))
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare_rates(source, Path(folder), options.workers) | batch_rates(source, Path(folder))
    print(f"{'millions per second of':<48}{'wall':>8}{'CPU':>8}")
    for name, rates in rows.items():
        print(f"{name:<48}{rates[0]:>8.1f}{rates[1]:>8.1f}")
    program.write(options.out, program.facts("numpy", "tokenizers") | {"rates": rows})
    return 0


Rates = dict[str, tuple[float, float]]


def prepare_rates(source: Text, folder: Path, workers: int) -> Rates:
    """Bytes of input."""
    texts = [document.text for document in source_documents(source)]
    size = sum(map(len, texts))
    value = replace(source.tokenizer, file=str(folder / "tokenizer.json"))
    try:
        train_bpe((text.decode("utf-8", "replace") for text in texts[:500]), value, 8192)
    except DataError as error:  # whose fix, fewer tokens, no flag here can give
        raise DataError(error.what, got=error.got, fix="--files of more text") from None
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, some = open_tokenizer(value), texts[: len(texts) // 4]
    rows = {"tokenizer alone, bytes": rates(sum(map(len, some)), lambda: list(tokenizer.encode_documents(some)))}
    for count in sorted({1, workers}):
        for name, made in (("bytes", Text(files=source.files)), ("BPE 8192", replace(source, tokenizer=value))):
            where = folder / f"{name}-{count}"
            run = partial(prepared, made, where, prepare=True, workers=count)
            rows[f"prepare/{name}, {count} processes, bytes"] = rates(size, run)
    return rows


def batch_rates(source: Text, folder: Path) -> Rates:
    """Tokens, in one process."""
    rows = {}
    for seq_len, batch in SHAPES:
        made = Text(files=source.files)
        shape = {"seq_len": seq_len, "batch": batch, "seed": 0, "vocab_size": 512}
        data = open_dataset(made, cache_dir=folder / "bytes-1", **shape)
        steps = min(data.num_steps, 200)
        for name in ("first", "warm"):
            run = partial(read, data, steps)
            rows[f"batches/{batch} x {seq_len} {name}, tokens"] = rates(steps * batch * seq_len, run)
    return rows


def read(data: Dataset, steps: int) -> None:
    for step in range(steps):
        data.rows(step, np.arange(data.batch))


def rates(amount: int, run: Callable[[], object]) -> tuple[float, float]:
    """Millions of `amount` per second of wall clock and of CPU, children's too."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    return amount / 1e6 / (time.perf_counter() - wall), amount / 1e6 / (cpu_seconds() - cpu)


def cpu_seconds() -> float:
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    program.run(main)
