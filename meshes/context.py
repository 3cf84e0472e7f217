"""Causal attention over a sequence that mesh axes cut: gathered, as a ring, or by exchange of heads. No projections, no rotations.

The axes are those that the current `acts` rules give to S; the algorithm is the rules' `context`. A device's columns are
one run of the sequence, or inside `balanced` two runs in zig-zag order. Logits exist one tile at a time, forward and
backward: queries x keys of a chunk, never a whole pair of chunks. Statistics of the softmax are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from meshes.errors import LayoutError
from meshes.place import axis_size, constrain, current, cutting, free_axes, platform, use
from meshes.rules import Gathered, Ulysses, axes_of

# float32 logits of one tile on one device. A GPU wants matmuls of thousands of rows; a CPU wants the tile in its cache.
TILE_BYTES = {"gpu": 1 << 28, "cpu": 1 << 22}
MASKED = -1e30  # finite: the difference of two is 0, where that of two infinities is nan

_zigzag = jax.make_user_context(False)


# ---- the order of columns


def order(seq_len: int, shards: int) -> np.ndarray:
    """The original index of each column in zig-zag order: of 2n chunks, shard i holds chunks i and 2n - 1 - i."""
    low = np.arange(shards)
    chunks = np.stack([low, 2 * shards - 1 - low], axis=1).reshape(-1)
    return np.arange(seq_len).reshape(2 * shards, -1)[chunks].reshape(-1)


@contextmanager
def balanced(batch: Any) -> Iterator[Any]:
    """`with balanced(batch) as batch`: a tree of arrays "BS", in the order in which causal attention is equal work.

    Within the block attention takes columns in that order; all else in a model is per token, so sums over a batch do
    not depend on it. The batch as it is where the sequence is not cut, or the rules' algorithm has no use for it.
    """
    shards = axis_size("S")
    if shards == 1 or not current().rules.context.zigzag:
        yield batch
        return
    with _zigzag(True):
        yield jax.tree.map(partial(_ordered, shards=shards), batch)


def _ordered(x_BS: Array, shards: int) -> Array:
    """Numbers of a few bytes per token: gathered once per step and cut anew."""
    if x_BS.shape[1] % (2 * shards):
        raise LayoutError(
            f"a sequence of {x_BS.shape[1]} does not divide into {2 * shards} chunks.",
            got=f"{shards} shards of the sequence",
            rule="zig-zag order gives two chunks to each shard",
            fix=f"a multiple of {2 * shards}, or an algorithm with zigzag=False",
        )
    return constrain(constrain(x_BS, "B_")[:, order(x_BS.shape[1], shards)], "BS")


def columns(seq_len: int) -> np.ndarray:
    """The original index of each column, in the order that attention takes them in here."""
    return order(seq_len, axis_size("S")) if _zigzag.value else np.arange(seq_len)


# ---- the interface


def attend(q_BSNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BS: Array | None = None, *, tile: int = 0) -> Array:
    """-> o_BSNH, laid out as "BSNH": each query over the keys of its own document up to itself, scaled by 1 / sqrt(H).

    N is a multiple of K. `tile`: at most so many queries and keys a tile; 0: what TILE_BYTES holds. Key heads are
    repeated where the axes of N do not divide them, until each device has those of its own query heads and no more.
    Takes a sequence that is not cut too.
    """
    if exchanges():
        return exchanged(partial(attend, tile=tile), q_BSNH, k_BSKH, v_BSKH, segments_BS)
    heads = axis_size("N")
    k_BSKH, v_BSKH = (constrain(_repeated(x, heads), "BSNH") for x in (k_BSKH, v_BSKH))
    plan = _plan(q_BSNH, tile)
    return constrain(_attention(constrain(q_BSNH, "BSNH"), k_BSKH, v_BSKH, segments_BS, plan), "BSNH")


def exchanges() -> bool:
    """Whether the rules here move the cut of the sequence to heads, so that a kernel is given whole sequences."""
    return axis_size("S") > 1 and isinstance(current().rules.context, Ulysses)


def exchanged(kernel: Callable[..., Array], q_BSNH, k_BSKH, v_BSKH, segments_BS=None) -> Array:
    """`kernel` on whole sequences of some heads each: Ulysses, Jacobs et al. 2023, arXiv 2309.14509.

    The axes of S move to N: one all-to-all each for q, k, v and the result. Key heads that are fewer than the shards
    of N are repeated first, so each is sent to as many devices as use it. Raises LayoutError where N does not divide.
    """
    layout = current()
    mesh, rules = layout.mesh, layout.rules
    heads = dict.fromkeys("NK", (*axes_of(rules.acts, "N"), *axes_of(rules.acts, "S")))
    k_BSKH, v_BSKH = (_repeated(x, axis_size("NS")) for x in (k_BSKH, v_BSKH))
    cut = [constrain(x, "BSNH") for x in (q_BSNH, k_BSKH, v_BSKH)]
    with use(mesh, replace(rules, acts=rules.acts | {"S": None, "R": None} | heads)):
        q_BSNH, k_BSKH, v_BSKH = (constrain(x, "BSNH") for x in cut)
        whole = None if segments_BS is None else constrain(segments_BS, "BS")
        o_BSNH = constrain(kernel(q_BSNH, k_BSKH, v_BSKH, whole), "BSNH")
    return constrain(o_BSNH, "BSNH")


def _repeated(x_BSKH: Array, shards: int) -> Array:
    """Key heads so often that they divide over the shards of the query heads, each beside the queries that read it."""
    B, S, K, H = x_BSKH.shape
    times = shards // math.gcd(K, shards)
    return jnp.broadcast_to(x_BSKH[:, :, :, None], (B, S, K, times, H)).reshape(B, S, K * times, H)


# ---- how it is laid out


@dataclass(frozen=True)
class _Plan:
    """What is static of one call: the axes that cut rows, columns and heads, and how a shard's columns divide."""

    mesh: Any
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    heads: tuple[str, ...]
    shards: int  # of the sequence
    chunk: int  # columns that follow each other in the sequence
    tile: int
    zigzag: bool
    ring: bool
    pairs: bool  # keys go round by exchanges of two shards, not by a permute

    @property
    def hops(self) -> Array:
        """For each hop on the way round which bit of a shard's number it changes: a Gray code, whose last leads home."""
        numbers = np.arange(1, self.shards + 1)
        return jnp.asarray(np.log2(numbers & -numbers), jnp.int32).at[-1].add(-1)

    def spec(self, ndim: int) -> PartitionSpec:
        axes = (self.rows or None, self.columns or None, self.heads or None)
        return PartitionSpec(*axes[:ndim])

    def run(self, body: Callable, *arrays: Any, out: tuple[int, ...]) -> Any:
        """body(plan, *local arrays), by hand over the plan's axes; `out`: the results' dims, of BSNH, BSN or BS."""
        body = partial(body, self)
        names = {*self.rows, *self.columns, *self.heads}
        if not names:
            return body(*arrays)
        ins = jax.tree.map(lambda x: self.spec(x.ndim), arrays)
        outs = tuple(self.spec(ndim) for ndim in out)
        run = jax.shard_map(body, mesh=self.mesh, axis_names=names, in_specs=ins, out_specs=outs, check_vma=False)
        return run(*arrays)

    def starts(self) -> Array:
        """The original index of the first column of each of this shard's tiles."""
        shard = lax.axis_index(self.columns) if self.columns else jnp.int32(0)
        chunks = [shard, 2 * self.shards - 1 - shard] if self.zigzag else [shard]
        within = jnp.arange(0, self.chunk, self.tile, dtype=jnp.int32)
        return (jnp.stack(chunks)[:, None] * self.chunk + within[None]).reshape(-1)


def _plan(q_BSNH: Array, tile: int) -> _Plan:
    layout, inside = current(), jax.sharding.get_abstract_mesh()
    mesh = free_axes(layout)[0] if layout else None
    rows, columns, heads = map(cutting, "BSN")
    parts = [axis_size(letter) for letter in "BSN"]
    B, S, N = (dim // part for dim, part in zip(q_BSNH.shape, parts, strict=False))
    zigzag = _zigzag.value and parts[1] > 1
    chunk = S // 2 if zigzag else S
    limit = tile or math.isqrt(TILE_BYTES["gpu" if platform() == "gpu" else "cpu"] // (4 * B * N))
    tile = next(t for t in range(max(1, min(limit, chunk)), 0, -1) if chunk % t == 0)
    ring = layout is not None and not isinstance(layout.rules.context, Gathered)
    pairs = "stage" in inside.manual_axes and parts[1] & (parts[1] - 1) == 0
    return _Plan(mesh, rows, columns, heads, parts[1], chunk, tile, zigzag, ring, pairs)


class _Queries(NamedTuple):
    """Of a tile, or with a leading dim of all of a shard's: what the products read."""

    x: Array  # BKGSH
    segments: Array | None  # BS
    start: Array


class _Keys(NamedTuple):
    k: Array  # BKTH
    v: Array
    segments: Array | None  # BT
    start: Array


class _Sums(NamedTuple):
    """Of a tile of queries, over the keys seen so far: float32, relative to the largest logit."""

    o: Array  # BKGSH
    z: Array  # BKGS
    top: Array


class _Slopes(NamedTuple):
    """What the backward pass knows of a tile of queries."""

    do: Array  # BKGSH
    log_z: Array  # BKGS, float32
    delta: Array  # BKGS: sum over H of do * o


def _tiles(plan: _Plan, x: Array, groups: int = 0) -> Array:
    """Columns in tiles, first: BS... -> tBS..., and BSNH -> tBKSH, or tBKGSH in `groups` of query heads."""
    x = jnp.moveaxis(x.reshape(x.shape[0], -1, plan.tile, *x.shape[2:]), 1, 0)
    if groups:
        x = x.reshape(*x.shape[:3], groups, -1, *x.shape[4:])
    return jnp.moveaxis(x, 2, 4 if groups else 3) if x.ndim > 3 else x


def _whole(x: Array, groups: bool) -> Array:
    """`_tiles` undone."""
    x = jnp.moveaxis(x, 4 if groups else 3, 2)
    x = x.reshape(*x.shape[:3], -1, *x.shape[5:]) if groups else x
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


# ---- forward and backward


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BSNH, k_BSKH, v_BSKH, segments_BS, plan: _Plan) -> Array:
    return _forward(q_BSNH, k_BSKH, v_BSKH, segments_BS, plan)[0]


def _forward(q_BSNH, k_BSKH, v_BSKH, segments_BS, plan):
    """Keeps the result and log(Z) of each query, from which a tile's probabilities are computed again."""
    o_BSNH, log_z_BSN = plan.run(_shard_forward, q_BSNH, k_BSKH, v_BSKH, segments_BS, out=(4, 3))
    return o_BSNH, (q_BSNH, k_BSKH, v_BSKH, segments_BS, o_BSNH, log_z_BSN)


def _backward(plan, residuals, do_BSNH):
    return *plan.run(_shard_backward, *residuals, do_BSNH, out=(4, 4, 4)), None


_attention.defvjp(_forward, _backward)


def _shard_forward(plan, q_BSNH, k_BSKH, v_BSKH, segments_BS):
    queries, keys = _parts(plan, q_BSNH, k_BSKH, v_BSKH, segments_BS)
    per_query = queries.x.shape[:-1]
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    sums = _Sums(zeros((*per_query, v_BSKH.shape[3])), zeros(per_query), jnp.full(per_query, MASKED))
    if plan.ring and plan.shards > 1:
        sums = _ring_sums(plan, sums, queries, keys)
    else:
        sums = _add_keys(sums, queries, _gathered(plan, keys))
    o = (sums.o / sums.z[..., None]).astype(v_BSKH.dtype)
    return _whole(o, True), _whole(sums.top + jnp.log(sums.z), True)


def _shard_backward(plan, q_BSNH, k_BSKH, v_BSKH, segments_BS, o_BSNH, log_z_BSN, do_BSNH):
    queries, keys = _parts(plan, q_BSNH, k_BSKH, v_BSKH, segments_BS)
    delta_BSN = (do_BSNH.astype(jnp.float32) * o_BSNH).sum(-1)
    slopes = _Slopes(*(_tiles(plan, x, k_BSKH.shape[2]) for x in (do_BSNH, log_z_BSN, delta_BSN)))
    dq = jnp.zeros(queries.x.shape, jnp.float32)
    if plan.ring and plan.shards > 1:
        dq, dk, dv = _ring_slopes(plan, dq, queries, slopes, keys)
    else:
        dq, dk, dv = _slopes_of_keys(dq, queries, slopes, _gathered(plan, keys))
        dk, dv = _scattered(plan, dk), _scattered(plan, dv)
    grads = _whole(dq, True), _whole(dk, False), _whole(dv, False)
    return tuple(g.astype(x.dtype) for g, x in zip(grads, (q_BSNH, k_BSKH, v_BSKH), strict=True))


def _parts(plan, q_BSNH, k_BSKH, v_BSKH, segments_BS) -> tuple[_Queries, _Keys]:
    """The barrier ties what a mask is made of to the keys: it does not depend on the layer, so the scan over layers
    would take all tiles' masks out of its loop and keep them, S x S."""
    segments = None if segments_BS is None else _tiles(plan, segments_BS)
    segments, starts, k_BSKH = lax.optimization_barrier((segments, plan.starts(), k_BSKH))
    keys = _Keys(_tiles(plan, k_BSKH), _tiles(plan, v_BSKH), segments, starts)
    return _Queries(_tiles(plan, q_BSNH, k_BSKH.shape[2]), segments, starts), keys


# ---- how keys come to queries


def _gathered(plan, keys: _Keys) -> _Keys:
    """All shards' keys on each: Llama 3's way, Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2."""
    if plan.shards == 1:
        return keys
    return jax.tree.map(lambda x: lax.all_gather(x, plan.columns, axis=0, tiled=True), keys)


def _scattered(plan, x: Array) -> Array:
    return x if plan.shards == 1 else lax.psum_scatter(x, plan.columns, scatter_dimension=0, tiled=True)


def _passed(plan, tree: Any, hop: Array) -> Any:
    """All of the tree to the next shard on the way, as one message: XLA on GPUs keeps one permute in flight at a time,
    so that of several only the last would go on beside the products."""
    leaves, structure = jax.tree.flatten(tree)
    words = [lax.bitcast_convert_type(x, jnp.uint16).reshape(-1) for x in leaves]  # of 2 and 4 bytes, as they are
    message = _shifted(plan, jnp.concatenate(words), hop)
    parts = jnp.split(message, np.cumsum([word.size for word in words])[:-1])
    return structure.unflatten([_read(part, x) for part, x in zip(parts, leaves, strict=True)])


def _shifted(plan, x: Array, hop: Array) -> Array:
    """From the shard before; `hop` is one of the plan's.

    Within a stage of a pipeline a permute would wait for stages that do something else, so there the way is one along
    which two shards exchange at each hop: a hypercube's, and what gathers the two names the devices of one stage.
    """
    if not plan.pairs:
        return lax.ppermute(x, plan.columns, [(shard, (shard + 1) % plan.shards) for shard in range(plan.shards)])
    return lax.switch(hop, [partial(_exchanged_with, plan, 1 << bit, x) for bit in range(int(math.log2(plan.shards)))])


def _exchanged_with(plan, bit: int, x: Array) -> Array:
    """What the shard has whose number differs in this bit."""
    pairs = [[shard, shard | bit] for shard in range(plan.shards) if not shard & bit]
    both = lax.all_gather(x, plan.columns, axis_index_groups=pairs)
    return jnp.where(lax.axis_index(plan.columns) & bit, both[0], both[1])


def _read(words: Array, like: Array) -> Array:
    halves = (2,) if like.dtype.itemsize == 4 else ()
    return lax.bitcast_convert_type(words.reshape(*like.shape, *halves), like.dtype)


def _ring_sums(plan, sums: _Sums, queries: _Queries, keys: _Keys) -> _Sums:
    """Keys go round, n - 1 times; the next are on their way while these are multiplied. Liu et al. 2023, arXiv 2310.01889."""

    def visit(carry, hop):
        sums, keys = carry
        ahead = _passed(plan, keys, hop)
        return (_add_keys(sums, queries, keys), ahead), None

    (sums, keys), _ = lax.scan(visit, (sums, keys), plan.hops[:-1])
    return _add_keys(sums, queries, keys)


def _ring_slopes(plan, dq, queries: _Queries, slopes: _Slopes, keys: _Keys):
    """Keys go round as before, and one step behind them the sums of their gradients, until these are home."""

    def visit(carry, hops):
        dq, dkv, keys = carry
        before, ahead = _passed_on(plan, dkv, keys, *hops)
        dq, *more = _slopes_of_keys(dq, queries, slopes, keys)
        return (dq, jax.tree.map(jnp.add, before, more), ahead), None

    hops = plan.hops
    ahead = _passed(plan, keys, hops[0])
    dq, *dkv = _slopes_of_keys(dq, queries, slopes, keys)
    (dq, dkv, _), _ = lax.scan(visit, (dq, dkv, ahead), (hops[:-1], hops[1:]))
    return dq, *_passed(plan, dkv, hops[-1])


def _passed_on(plan, dkv: Any, keys: _Keys, hop: Array, next_hop: Array) -> tuple[Any, _Keys]:
    """The gradients' sums by the hop that the keys before took, and the keys by the next; in one message in a ring."""
    if plan.pairs:
        return _passed(plan, dkv, hop), _passed(plan, keys, next_hop)
    return _passed(plan, (dkv, keys), hop)


# ---- tile by tile


def _add_keys(sums: _Sums, queries: _Queries, keys: _Keys) -> _Sums:
    """Every tile of queries over every tile of keys of which it sees any; the others are not multiplied."""

    def per_queries(_, tile):
        queries, sums = tile

        def per_keys(sums, keys):
            return lax.cond(_sees(queries, keys), _add, lambda sums, *_: sums, sums, queries, keys), None

        return None, lax.scan(per_keys, sums, keys)[0]

    return lax.scan(per_queries, None, (queries, sums))[1]


def _slopes_of_keys(dq, queries: _Queries, slopes: _Slopes, keys: _Keys):
    """-> dq with these keys' part added, and dk, dv of these keys from these queries; float32."""

    def per_keys(dq, keys):
        start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys.k, keys.v))

        def per_queries(dkv, tile):
            queries, slopes, dq = tile
            same = lambda dkv, dq, *_: (dkv, dq)  # noqa: E731
            return lax.cond(_sees(queries, keys), _add_slopes, same, dkv, dq, queries, slopes, keys)

        dkv, dq = lax.scan(per_queries, start, (queries, slopes, dq))
        return dq, dkv

    dq, (dk, dv) = lax.scan(per_keys, dq, keys)
    return dq, dk, dv


def _sees(queries: _Queries, keys: _Keys) -> Array:
    """Whether any of these queries may read any of these keys: not all later, not all of other documents."""
    tile = queries.x.shape[-2]
    sees = queries.start + tile > keys.start
    if queries.segments is None:
        return sees
    (first, last), (lowest, highest) = ((x.min(axis=1), x.max(axis=1)) for x in (queries.segments, keys.segments))
    return sees & jnp.any((first <= highest) & (last >= lowest))


def _add(sums: _Sums, queries: _Queries, keys: _Keys) -> _Sums:
    """Online softmax: Milakov & Gimelshein 2018, arXiv 1805.02867."""
    logits, seen = _logits(queries, keys)
    top = jnp.maximum(sums.top, jnp.where(seen, logits, MASKED).max(axis=-1))
    p = jnp.where(seen, jnp.exp(logits - top[..., None]), 0.0)
    shrink = jnp.exp(sums.top - top)
    o = sums.o * shrink[..., None] + _product("BKGST,BKTH->BKGSH", p.astype(keys.v.dtype), keys.v)
    return _Sums(o, sums.z * shrink + p.sum(axis=-1), top)


def _add_slopes(dkv, dq, queries: _Queries, slopes: _Slopes, keys: _Keys):
    """dlogits = softmax * (dp - delta): Dao et al. 2022, arXiv 2205.14135."""
    logits, seen = _logits(queries, keys)
    p = jnp.where(seen, jnp.exp(logits - slopes.log_z[..., None]), 0.0)
    dp = _product("BKGSH,BKTH->BKGST", slopes.do, keys.v)
    dlogits = (p * (dp - slopes.delta[..., None]) * _scale(queries)).astype(keys.k.dtype)
    dk = dkv[0] + _product("BKGST,BKGSH->BKTH", dlogits, queries.x)
    dv = dkv[1] + _product("BKGST,BKGSH->BKTH", p.astype(keys.v.dtype), slopes.do)
    return (dk, dv), dq + _product("BKGST,BKTH->BKGSH", dlogits, keys.k)


def _logits(queries: _Queries, keys: _Keys) -> tuple[Array, Array]:
    """Of one tile in float32, and which of them count."""
    logits = _product("BKGSH,BKTH->BKGST", queries.x, keys.k) * _scale(queries)
    tile = jnp.arange(queries.x.shape[-2])
    seen = (queries.start + tile)[None, :, None] >= (keys.start + tile)[None, None]
    if queries.segments is not None:
        seen = seen & (queries.segments[:, :, None] == keys.segments[:, None])
    return logits, seen[:, None, None]


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scale(queries: _Queries) -> float:
    return queries.x.shape[-1] ** -0.5
