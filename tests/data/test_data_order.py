"""Order: permutations, epochs and mixtures, against brute force."""

import itertools
import math

import numpy as np
import pytest

from jaxtrain.data.order import BLOCK, Sequential, Shuffled, key, permute
from jaxtrain.errors import ConfigError

# Chi-square of k cells has mean k - 1 and deviation sqrt(2(k - 1)): chance exceeds 5 of these less than once in 1e4.
DEVIATIONS = 5.0


def everything(n: int, seed: int) -> np.ndarray:
    return permute(np.arange(n), n, key(seed))


@pytest.mark.parametrize("n", [*range(1, 70), 97, 128, 1000, 4095, 4096, 4097, 100_003])
def test_a_permutation_hits_every_number_once(n):
    for seed in range(3):
        assert np.array_equal(np.sort(everything(n, seed)), np.arange(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_examples_are_equally_likely(n):
    seeds = np.arange(200 * math.factorial(n))
    columns = [permute(np.full(len(seeds), i), n, key(seeds)) for i in range(n)]
    found = np.stack(columns, axis=1)
    counts = [(found == np.array(order)[None, :]).all(axis=1).sum() for order in itertools.permutations(range(n))]
    assert sum(counts) == len(seeds)
    cells = math.factorial(n)
    chi_square = sum((count - 200) ** 2 / 200 for count in counts)
    assert abs(chi_square - (cells - 1)) < DEVIATIONS * math.sqrt(2 * (cells - 1))


def test_where_an_example_goes_and_which_follows_are_uniform():
    n, seeds = 37, np.arange(20_000)
    first, second = (permute(np.full(len(seeds), i), n, key(seeds)) for i in (3, 4))
    for value, cells in ((first, n), ((second - first) % n, n)):
        counts = np.bincount(value, minlength=cells)[0 if value is first else 1 :]
        expected = len(seeds) / len(counts)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - (len(counts) - 1)) < DEVIATIONS * math.sqrt(2 * (len(counts) - 1))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_each_epoch_holds_every_example_once_in_a_new_order(size):
    _, example = Shuffled([size], [1.0], seed=5).locate(np.arange(3 * size))
    epochs = example.reshape(3, size)
    assert np.array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(size), (3, size)))
    assert size < 7 or not np.array_equal(epochs[0], epochs[1])


def test_any_positions_are_read_at_random():
    order = Shuffled([100, 31], [2, 1], seed=0)
    whole = np.stack(order.locate(np.arange(3 * BLOCK)))
    some = np.random.default_rng(0).permutation(3 * BLOCK)[:500]
    assert np.array_equal(np.stack(order.locate(some)), whole[:, some])


def test_another_seed_is_another_order():
    a, b = (Shuffled([1000], [1.0], seed).locate(np.arange(1000))[1] for seed in (0, 1))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (5, 1, 0.01), (1,)])
def test_a_mixture_keeps_its_proportions_in_every_block_to_within_one_example(weights):
    sizes = [50 + 7 * i for i in range(len(weights))]
    part, _ = Shuffled(sizes, weights, seed=0).locate(np.arange(2 * BLOCK))
    for block in part.reshape(2, BLOCK):
        counts = np.bincount(block, minlength=len(weights))
        assert (abs(counts - np.array(weights) / sum(weights) * BLOCK) <= 1).all()


def test_a_mixture_is_even_within_its_blocks_too():
    part, _ = Shuffled([10, 10], [3, 1], seed=0).locate(np.arange(400))
    running = np.cumsum(part)
    assert (abs(running - 0.25 * np.arange(1, 401)) <= 1).all()


def test_every_source_of_a_mixture_goes_through_its_epochs_one_after_another():
    sizes = [11, 400, 1]
    part, example = Shuffled(sizes, [1, 2, 0.5], seed=3).locate(np.arange(2 * BLOCK + 5))
    for p, size in enumerate(sizes):
        mine = example[part == p]
        whole = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(whole) > 1
        assert np.array_equal(np.sort(whole, axis=1), np.broadcast_to(np.arange(size), whole.shape))


def test_examples_seen_are_those_counted():
    order = Shuffled([11, 400], [1, 2], seed=3)
    part, _ = order.locate(np.arange(2 * BLOCK))
    for index in (0, 1, 17, BLOCK, BLOCK + 3, 2 * BLOCK):
        assert order.seen(index) == np.bincount(part[:index], minlength=2).tolist()


def test_a_weight_that_no_block_can_hold_is_refused():
    with pytest.raises(ConfigError, match="span too much"):
        Shuffled([1, 1], [1.0, 1e-9], seed=0)


def test_sequential_order_is_every_example_once_and_then_nothing():
    order = Sequential([2, 3])
    part, example = order.locate(np.arange(8))
    assert part.tolist() == [0, 0, 1, 1, 1, -1, -1, -1]
    assert example[:5].tolist() == [0, 1, 0, 1, 2]
    assert [order.seen(i) for i in (0, 1, 3, 9)] == [[0, 0], [1, 0], [2, 1], [2, 3]]
