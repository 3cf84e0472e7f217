"""Products of a sequence cut over `tensor` with a weight cut over it, in a ring: each hop of the gather or of the scatter
stands beside a part of the product. Wang et al. 2023, "Overlap Communication with Dependent Computation via
Decomposition" (ASPLOS 23, section 3). Without a layout, or with nothing to gather, they are plain products.

Each of the n devices along `tensor` holds a part of R. A gather of n - 1 hops then feeds n products, of one part each,
and a scatter collects n partial sums on their way. Gradients are the same rings, turned around.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from meshes.place import by_hand, constrain, current, cutting
from meshes.rules import Letters

RING = "tensor"


def rings() -> bool:
    """Whether the current rules ask for rings and there is anything to gather."""
    return RING in cutting("R") and current().rules.matmul == "ring"


def gathered(x_BRD: jax.Array, weights: Sequence[jax.Array], letters: Sequence[Letters]) -> list[jax.Array]:
    """x_BRD times each w_D...: "DF" -> h_BSF, laid out as "BSF"; R is gathered as the products go."""
    outs = ["BS" + name[1:] for name in letters]

    def local(x_BRD: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        n, me = lax.axis_size(RING), lax.axis_index(RING)
        rows = x_BRD.shape[1]
        products = [jnp.zeros((x_BRD.shape[0], n * rows, *w.shape[1:]), x_BRD.dtype) for w in weights]
        for hop in range(n):
            ahead = x_BRD if hop == n - 1 else _from_next(x_BRD, n)  # on its way while this part is multiplied
            start = (me + hop) % n * rows
            parts = [jnp.tensordot(x_BRD, w, 1) for w in weights]
            products = [lax.dynamic_update_slice_in_dim(h, p, start, 1) for h, p in zip(products, parts, strict=True)]
            x_BRD = ahead
        return products

    return _by_hand(local, ["BRD", *letters], outs)(x_BRD, *weights)


def scattered(h_BSF: jax.Array, w_FD: jax.Array, letters: Letters) -> jax.Array:
    """h_BSF times w_FD, over all dims of w but the last -> x_BRD, laid out as "BRD"; partial sums meet on their way."""
    summed = len(letters) - 1

    def local(h_BSF: jax.Array, w_FD: jax.Array) -> jax.Array:
        n, me = lax.axis_size(RING), lax.axis_index(RING)
        rows, total = h_BSF.shape[1] // n, 0.0
        for hop in range(n):
            mine = lax.dynamic_slice_in_dim(h_BSF, (me - 1 - hop) % n * rows, rows, 1)
            total = total + jnp.tensordot(mine, w_FD, summed)
            total = total if hop == n - 1 else _from_before(total, n)
        return total

    return _by_hand(local, ["BS" + letters[:-1], letters], "BRD")(h_BSF, w_FD)


def _by_hand(local: Callable, ins: Sequence[Letters], outs: Letters | Sequence[Letters]) -> Callable:
    """`local` on each device's part along the axes that cut R."""
    run = by_hand(local, tuple(ins), outs, over="R")

    def laid_out(*arrays: jax.Array) -> jax.Array | list[jax.Array]:
        return jax.tree.map(constrain, run(*map(constrain, arrays, ins)), outs)

    return laid_out


def _from_next(x: jax.Array, n: int) -> jax.Array:
    return lax.ppermute(x, RING, [((i + 1) % n, i) for i in range(n)])


def _from_before(x: jax.Array, n: int) -> jax.Array:
    return lax.ppermute(x, RING, [(i, (i + 1) % n) for i in range(n)])
