"""Ways to compute attention, as values, and the choice among them. Imports no jax: the kernels are models/kernels.py.

What a way refuses, and why, is said once on stderr and the next one in ORDER is taken; `require` makes it fail instead.
`Auto` takes the first in ORDER that does not refuse, and says nothing.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

from meshes import LayoutError


@dataclass(frozen=True, kw_only=True)
class Site:
    """What the choice depends on: the devices' platform, the arrays, into how many parts the sequence is cut."""

    platform: str  # "gpu", "cpu", "tpu"
    dtype: str
    seq_len: int
    head_dim: int
    packed: bool  # several documents in a row
    shards: int = 1  # of the sequence


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The best way that the place takes."""


@dataclass(frozen=True, kw_only=True)
class CuDNN:
    """NVIDIA's fused flash attention: linear memory, half the work. Packed rows take a mask of S x S to read."""

    require: bool = False

    def refuses(self, site: Site) -> str:
        longest = 16_384  # a mask of S x S bfloat16 is 512 MiB a row there
        refusals = {
            f"it needs an NVIDIA GPU, and these devices are {site.platform}": site.platform != "gpu",
            f"it takes bfloat16 and float16, not {site.dtype}": site.dtype not in ("bfloat16", "float16"),
            f"a head of {site.head_dim} is not a multiple of 8, at most 128": site.head_dim % 8 or site.head_dim > 128,
            f"the sequence is sharded {site.shards} ways": site.shards > 1,
            f"packed documents need a mask, at most {longest:,} long": site.packed and site.seq_len > longest,
        }
        return next((reason for reason, holds in refusals.items() if holds), "")


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """Chunks of queries, each against the keys up to its own end: the masked half is skipped. Keeps probabilities."""

    chunk: int = 0  # queries per chunk; 0: a 16th of the sequence, at least 64
    require: bool = False

    def refuses(self, site: Site) -> str:
        return f"the sequence is sharded {site.shards} ways, and its chunks would cut across" if site.shards > 1 else ""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """All queries against all keys, masked. Takes everything; over a sharded sequence keys and values are gathered."""

    def refuses(self, site: Site) -> str:
        return ""


Attention = Auto | CuDNN | Chunked | Dense
ORDER: tuple[CuDNN | Chunked | Dense, ...] = (CuDNN(), Chunked(), Dense())


def choose(wanted: Attention, site: Site) -> CuDNN | Chunked | Dense:
    """The way taken: `wanted`, or where it refuses the next that does not. Raises LayoutError where it is required."""
    if isinstance(wanted, Auto):
        return _first(ORDER, site)
    reason = wanted.refuses(site)
    if not reason:
        return wanted
    name = type(wanted).__name__
    if wanted.require:
        raise LayoutError(
            f"attention = {name} is required and cannot run: {reason}.",
            got=str(site),
            fix=f"{name}(require=False) to fall to the next way, or Auto()",
        )
    taken = _first([way for way in ORDER if type(way) is not type(wanted)], site)
    _say(f"attention: {name} refused, {type(taken).__name__} instead: {reason}")
    return taken


def _first(ways, site: Site):
    return next(way for way in ways if not way.refuses(site))


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
