"""Which example is at (seed, step, row): permutations, mixtures, stand-ins as pure functions. It reads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtrain.errors import ConfigError, DataError

# 4 are enough for large n (Luby and Rackoff 1988), 6 leave the 5,040 orders of 7 examples visibly unequal.
ROUNDS = 12
BLOCK = 4096  # examples over which a mixture's proportions are exact to one example
RESERVE = 1 << 50  # the position from which stand-ins come: no run gets there; a multiple of BLOCK
_SOURCE = 1 << 44  # in one number, the source before the example: more than a source has examples


def mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, a bijection: every output bit depends on every input bit (splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*numbers: int | np.ndarray) -> np.ndarray:
    """One uint64 array from integers, or arrays of them, of which all matter."""
    total = np.zeros(1, np.uint64)
    for number in numbers:
        total = mix(total + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return total


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where `index` (int64, 0 <= index < n) goes in the permutation of n that its key chooses; keys broadcast.

    A Feistel network over a square side x side >= n (Black and Rogaway 2002, Generalized-Feistel) that is walked until
    it lands below n: hardly ever twice, as side x side < n + 4 sqrt(n) + 4. An odd side reaches even permutations only.
    """
    side = np.uint64((math.isqrt(n - 1) + 2) // 2 * 2)
    out = _feistel(index.astype(np.uint64), side, keys := np.broadcast_to(keys, index.shape))
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _feistel(out[outside], side, keys[outside])
    return out.astype(np.int64)


def _feistel(x: np.ndarray, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = x // side, x % side
    for number in range(ROUNDS):
        left, right = right, (left + mix(keys + right * np.uint64(ROUNDS) + np.uint64(number)) % side) % side
    return left * side + right


class Shuffled:
    """Every source's examples, each once per epoch in a new order, in proportion to the weights, without end."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self._sizes, self._seed = sizes, seed
        self._counts = _apportion(weights)
        # A block holds the k-th of c examples at the time (k + 1/2) / c: sources alternate as evenly as they can.
        order = np.argsort(np.concatenate([(np.arange(c) + 0.5) / c for c in self._counts]), kind="stable")
        self._part = np.repeat(np.arange(len(sizes)), self._counts)[order]
        self._rank = np.concatenate([np.arange(c) for c in self._counts])[order]

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 positions in the order of all time -> (source, example within it)."""
        block, offset = np.divmod(index, BLOCK)
        part = self._part[offset]
        example = block * self._counts[part] + self._rank[offset]
        for p, size in enumerate(self._sizes):
            mine = np.flatnonzero(part == p)
            epoch, at = np.divmod(example[mine], size)
            example[mine] = permute(at, size, key(self._seed, p, epoch))
        return part, example

    def seen(self, index: int) -> list[int]:
        """Examples of each source before position `index`, repeats counted."""
        block, offset = divmod(index, BLOCK)
        return (block * self._counts + np.bincount(self._part[:offset], minlength=len(self._sizes))).tolist()


class Sequential:
    """Every example once: the sources one after another, whatever their weights; -1 is behind the last example."""

    def __init__(self, sizes: Sequence[int]):
        self._ends = np.cumsum(sizes)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 positions -> (source or -1, example within it)."""
        part = np.searchsorted(self._ends, index, "right")
        starts = np.r_[0, self._ends]
        return np.where(part < len(self._ends), part, -1), index - starts[np.minimum(part, len(self._ends))]

    def seen(self, index: int) -> list[int]:
        """Examples of each source before position `index`."""
        return np.diff(np.minimum(np.r_[0, self._ends], index)).tolist()


class Without:
    """An order in which examples that were put aside give way to others.

    `aside`: {(source, example): the position from which on it is put aside}. At position q the example of position
    q + RESERVE stands in for it, which is of the same source, so a mixture keeps its proportions. Where that one is put
    aside too, or is another example of the same step, the next of its source that is not (where there is none, one that
    is not put aside). Positions are grouped into steps of `batch`.
    """

    def __init__(self, order: Shuffled, sizes: Sequence[int], batch: int, aside: Mapping[tuple[int, int], int]):
        self._order, self._sizes, self._batch, self._aside = order, sizes, batch, aside
        self._numbers = np.array([p * _SOURCE + e for p, e in aside], np.int64)
        self.seen = order.seen

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 positions in the order of all time -> (source, example within it)."""
        part, example = self._order.locate(index)
        gone = self._gone(index, part, example)
        for step in np.unique(index[gone] // self._batch):
            stand_ins = self._stand_ins(int(step))
            for i in gone[index[gone] // self._batch == step]:
                example[i] = stand_ins[int(index[i])]
        return part, example

    def _gone(self, index: np.ndarray, part: np.ndarray, example: np.ndarray) -> np.ndarray:
        """Where among these positions an example is put aside."""
        found = np.flatnonzero(np.isin(part * _SOURCE + example, self._numbers))
        late = [self._is_aside(int(part[i]), int(example[i]), int(index[i])) for i in found]
        return found[np.array(late, bool)]

    def _is_aside(self, part: int, example: int, position: int) -> bool:
        return self._aside.get((part, example), position + 1) <= position

    def _stand_ins(self, step: int) -> dict[int, int]:
        """For each position of a step whose example is put aside, the example of its source that stands in."""
        index = np.arange(step * self._batch, (step + 1) * self._batch)
        part, example = self._order.locate(index)
        gone = self._gone(index, part, example)
        kept = np.delete(np.stack([part, example]), gone, axis=1)
        taken, found = set(zip(*kept.tolist(), strict=True)), {}
        for q, p, e in zip(index[gone].tolist(), *(x.tolist() for x in self._order.locate(index[gone] + RESERVE))):
            found[q] = self._free(p, e, q, taken)
            taken.add((p, found[q]))
        return found

    def _free(self, part: int, example: int, position: int, taken: set[tuple[int, int]]) -> int:
        size = self._sizes[part]
        for unwanted in (taken, ()):
            for e in ((example + i) % size for i in range(size)):
                if (part, e) not in unwanted and not self._is_aside(part, e, position):
                    return e
        raise DataError(
            f"every example of source {part} has been put aside.",
            got=f"{size} examples",
            rule="examples remain to stand in for those that were put aside",
            fix="more data; or look for the fault elsewhere and remove quarantine.jsonl from the run folder",
        )


def _apportion(weights: Sequence[float]) -> np.ndarray:
    """Examples of each source in a block: whole numbers within one of weight x BLOCK (largest remainders)."""
    exact = np.asarray(weights, float) / sum(weights) * BLOCK
    counts = exact.astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
    if not counts.all():
        raise ConfigError(
            f"Mixture.weights = {tuple(weights)} span too much.",
            rule=f"proportions are kept in blocks of {BLOCK} examples, of which each source has at least one",
            fix=f"weights of at least 1/{BLOCK} of their sum",
        )
    return counts
