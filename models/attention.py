"""Ways to compute attention, as values, and the choice among them. Imports no jax: the kernels are models/kernels.py.

How queries meet the keys of other devices, where mesh axes cut the sequence, is no matter of the model: the rules say it.
What a way refuses, and why, is said once on stderr and the next one in ORDER is taken; `require` makes it fail instead.
`Auto` takes the first in ORDER that does not refuse; on a GPU it says so where that is not the first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from meshes import LayoutError, Rules, Ulysses, UserError


@dataclass(frozen=True, kw_only=True)
class Site:
    """What the choice depends on: the devices' platform, the arrays, into how many parts the sequence is cut."""

    platform: str  # "gpu", "cpu", "tpu"
    dtype: str
    seq_len: int
    head_dim: int  # of queries and keys, or of values where those are wider
    packed: bool  # several documents in a row
    shards: int = 1  # of the sequence that the kernel is given


def _cut(site: Site) -> dict[str, bool]:
    return {f"the sequence is sharded {site.shards} ways": site.shards > 1}


def _reason(refusals: dict[str, bool]) -> str:
    return next((reason for reason, holds in refusals.items() if holds), "")


def _check_length(field: str, length: int) -> None:
    if length < 0:
        raise UserError(f"attention.{field} = {length} is no length.", rule="1 or more; 0 leaves the choice to the kernel")


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The best way that the place takes."""


@dataclass(frozen=True, kw_only=True)
class CuDNN:
    """NVIDIA's fused flash attention: linear memory, half the work. Packed rows take a mask of S x S to read."""

    require: bool = False

    def elsewhere(self, platform: str) -> str:
        """Why not on these devices, or ""."""
        return "" if platform == "gpu" else f"it needs an NVIDIA GPU, and these devices are {platform}"

    def refuses(self, site: Site) -> str:
        longest = 16_384  # a mask of S x S bfloat16 is 512 MiB a row there
        refusals = {
            self.elsewhere(site.platform): site.platform != "gpu",
            f"it takes bfloat16 and float16, not {site.dtype}": site.dtype not in ("bfloat16", "float16"),
            f"a head of {site.head_dim} is not a multiple of 8, at most 128": site.head_dim % 8 or site.head_dim > 128,
            f"packed documents need a mask, at most {longest:,} long": site.packed and site.seq_len > longest,
        }
        return _reason(refusals | _cut(site))


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """Chunks of queries, each against the keys up to its own end: the masked half is skipped. Keeps probabilities."""

    chunk: int = 0  # queries per chunk; 0: a 16th of the sequence, at least 64
    require: bool = False

    def __post_init__(self):
        _check_length("chunk", self.chunk)

    def refuses(self, site: Site) -> str:
        longest = 8192  # the probabilities of a head and row are 128 MiB there in float32
        return _reason(_cut(site) | {f"it keeps probabilities, at most {longest:,} long": site.seq_len > longest})


@dataclass(frozen=True, kw_only=True)
class Tiled:
    """Tiles of queries and keys, of which none is kept: linear memory, logits computed again. Takes a cut sequence."""

    tile: int = 0  # queries and keys per tile; 0: what meshes.context.TILE_BYTES holds
    require: bool = False

    def __post_init__(self):
        _check_length("tile", self.tile)

    def refuses(self, site: Site) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """All queries against all keys, masked: quadratic memory."""

    require: bool = False

    def refuses(self, site: Site) -> str:
        return _reason(_cut(site))


Way = CuDNN | Chunked | Tiled | Dense
Attention = Auto | CuDNN | Chunked | Tiled | Dense
ORDER: tuple[Way, ...] = (CuDNN(), Chunked(), Tiled())


def check_cut(wanted: Attention, rules: Rules, axes: Mapping[str, int], seq_len: int, num_heads: int) -> None:
    """Raises LayoutError where attention over these mesh axes cannot run as `rules` and `wanted` say."""
    shards = rules.shards("S", axes)
    if shards == 1:
        return
    algorithm = type(rules.context).__name__
    if rules.context.zigzag and seq_len % (2 * shards):
        raise LayoutError(
            f"seq_len = {seq_len} does not divide into {2 * shards} chunks.",
            got=f"the sequence over {shards} devices, rules.context = {algorithm}(zigzag=True)",
            rule="zig-zag order gives each device two chunks of the sequence, so that all work alike",
            fix=f"seq_len = {-(-seq_len // (2 * shards)) * 2 * shards}, or {algorithm}(zigzag=False)",
        )
    if isinstance(rules.context, Ulysses):
        _check_heads(rules, axes, shards, num_heads)
    elif not isinstance(wanted, Auto | Tiled) and wanted.require:
        name = type(wanted).__name__
        raise LayoutError(
            f"attention = {name} is required and takes no sequence that is cut.",
            got=f"the sequence over {shards} devices, rules.context = {algorithm}()",
            rule=f"{algorithm} multiplies tiles of a cut sequence itself; Ulysses gives any kernel whole sequences",
            fix=f"rules.context = Ulysses(), {name}(require=False), or mesh.context = 1",
        )


def _check_heads(rules: Rules, axes: Mapping[str, int], shards: int, num_heads: int) -> None:
    tensor = rules.shards("N", axes)
    if num_heads % (tensor * shards):
        near = max(n for n in range(1, shards) if shards % n == 0 and num_heads % (tensor * n) == 0)
        raise LayoutError(
            f"num_heads = {num_heads} does not divide over {tensor * shards} devices, as Ulysses does it.",
            got=f"heads over {tensor} devices as stored, the sequence over {shards}",
            rule="each device gets whole sequences of its own query heads; key heads that are fewer are copied to all "
            "devices that read them, query heads are not",
            fix=f"rules.context = Ring() or Gathered(), or a context axis of {near}",
        )


def check_platform(wanted: Attention, platform: str) -> None:
    """Raises LayoutError where `wanted` is required and does not run on these devices; "" is unknown."""
    if platform and isinstance(wanted, CuDNN) and wanted.require and (reason := wanted.elsewhere(platform)):
        raise _required(wanted, reason)


def _required(wanted: Way, reason: str, got: str = "") -> LayoutError:
    name = type(wanted).__name__
    fix = f"{name}(require=False) to fall to the next way, or Auto()"
    return LayoutError(f"attention = {name} is required and cannot run: {reason}.", got=got, fix=fix)


def choose(wanted: Attention, site: Site) -> Way:
    """The way taken: `wanted`, or where it refuses the next that does not. Raises LayoutError where it is required."""
    if isinstance(wanted, Auto):
        return _best(site)
    reason = wanted.refuses(site)
    if not reason:
        return wanted
    if wanted.require:
        raise _required(wanted, reason, str(site))
    name = type(wanted).__name__
    taken = _first([way for way in ORDER if type(way) is not type(wanted)], site)
    _say(f"attention: {name} refused, {type(taken).__name__} instead: {reason}")
    return taken


def _best(site: Site) -> Way:
    fastest, taken = ORDER[0], _first(ORDER, site)
    if taken is not fastest and site.platform == "gpu":  # elsewhere nobody expects it
        _say(f"attention: {type(taken).__name__}, as {type(fastest).__name__} refused: {fastest.refuses(site)}")
    return taken


def _first(ways, site: Site) -> Way:
    return next(way for way in ways if not way.refuses(site))


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
