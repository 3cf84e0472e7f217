"""Attention over a cut sequence: every algorithm on every mesh equals float64 numpy, and no device works more than another."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import meshes
from meshes import DEFAULT, Gathered, LayoutError, MeshConfig, Ring, Ulysses, context

B, S, H = 2, 64, 8
FP32 = 1e-5  # fp32 keeps 7 digits; sums of some tens of numbers of size 1 to 4 lose less than two
BF16 = 0.05  # relative to values of size 1 to 4, rounded to 8 bits three times

MESHES = {
    "context2": dict(context=2),
    "context8": dict(context=8),
    "context4 tensor2": dict(context=4, tensor=2),
    "data2 context2 tensor2": dict(data=2, context=2, tensor=2),
}
WAYS = {
    "ring": Ring(),
    "gathered": Gathered(),
    "Ulysses": Ulysses(),
    "ring in natural order": Ring(zigzag=False),
    "gathered in natural order": Gathered(zigzag=False),
}


def _arrays(heads=8, kv_heads=4, seed=0):
    """q, k, v, the cotangent of the result, and documents that end anywhere, one of them padding."""
    rng = np.random.default_rng(seed)
    q, k, v, do = (rng.normal(size=(B, S, n, H)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads))
    segments = 1 + np.cumsum(rng.random((B, S)) < 0.08, axis=1, dtype=np.int32)
    segments[1, -5:] = 0
    return q, k, v, do, segments


def _reference(q, k, v, do, segments):
    """-> o, dq, dk, dv in float64: the whole square, the softmax and its derivative as written in a textbook."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    K, V = (np.repeat(x, group, axis=2) for x in (k, v))
    seen = np.tril(np.ones((S, S), bool)) & (segments[:, :, None] == segments[:, None])
    p = np.exp(np.where(seen[:, None], np.einsum("bsnh,btnh->bnst", q, K) * scale, -np.inf))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bsnh,btnh->bnst", do, V)
    dlogits = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dk, dv = np.einsum("bnst,bsnh->btnh", dlogits, q), np.einsum("bnst,bsnh->btnh", p, do)
    shared = lambda x: x.reshape(B, S, -1, group, x.shape[3]).sum(3)  # noqa: E731
    return np.einsum("bnst,btnh->bsnh", p, V), np.einsum("bnst,btnh->bsnh", dlogits, K), shared(dk), shared(dv)


def _mesh(**sizes):
    return meshes.make(MeshConfig(**({"fsdp": 1} | sizes)), jax.devices()[: int(np.prod(list(sizes.values())))])


def _rules(way, **acts):
    return replace(DEFAULT, context=way, acts=DEFAULT.acts | acts)


def _run(mesh, rules, tile=4):
    """Columns take the order of the step, attention runs, its results are put back."""

    def run(q, k, v, do, segments):
        with meshes.use(mesh, rules), context.balanced({"segments": segments}) as batch:
            order = context.columns(S)
            take = lambda x: meshes.constrain(x[:, order], "BSNH")  # noqa: E731
            f = partial(context.attend, segments_BS=batch["segments"], tile=tile)
            o, pull = jax.vjp(f, take(q), *(x[:, order] for x in (k, v)))
            return tuple(x[:, np.argsort(order)] for x in (o, *pull(take(do))))

    return run


def _on(mesh, rules, arrays, **options):
    return jax.jit(_run(mesh, rules, **options))(*arrays)


def _assert_equal(ours, expected, tolerance):
    for name, x, y in zip(("o", "dq", "dk", "dv"), ours, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=name)


ROWS = [
    pytest.param(mesh, way, heads, kv_heads, marks=[] if fast else pytest.mark.slow)
    for mesh, heads, kv_heads, ways in (
        ("context2", 4, 4, ()),
        ("context2", 6, 2, ("ring in natural order", "gathered in natural order")),
        ("context8", 8, 2, ("ring", "gathered", "Ulysses")),
        ("context4 tensor2", 8, 4, ("ring", "gathered", "Ulysses")),
        ("data2 context2 tensor2", 4, 2, ("ring", "gathered", "Ulysses")),
        ("data2 context2 tensor2", 12, 6, ()),
    )
    for way in WAYS
    for fast in [way in ways]
]


@pytest.mark.parametrize(("mesh", "way", "heads", "kv_heads"), ROWS)
def test_every_way_equals_float64_numpy_in_values_and_gradients(mesh, way, heads, kv_heads, capfd):
    arrays = _arrays(heads, kv_heads)
    _assert_equal(_on(_mesh(**MESHES[mesh]), _rules(WAYS[way]), arrays), _reference(*arrays), FP32)
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("way", ["ring", "Ulysses"])
def test_key_heads_fewer_than_the_tensor_axis_are_repeated(way):
    arrays = _arrays(heads=8, kv_heads=1)
    _assert_equal(_on(_mesh(context=2, tensor=2), _rules(WAYS[way], K=None), arrays), _reference(*arrays), FP32)


@pytest.mark.parametrize("shards", [2, 4, 8, 16])
def test_the_way_of_exchanges_passes_every_shard_once_and_ends_at_home(shards):
    plan = context._Plan(None, (), ("context",), (), shards, chunk=1, tile=1, zigzag=False, ring=True, pairs=True)
    places = np.bitwise_xor.accumulate(1 << np.asarray(plan.hops))
    assert sorted(places) == list(range(shards)) and places[-1] == 0


@pytest.mark.parametrize("shards", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_ring_within_a_stage_equals_float64_numpy_and_permutes_nothing(shards):
    """There a permute would wait for stages that are in another branch of the program."""
    mesh, arrays = _mesh(context=shards), _arrays(heads=4, kv_heads=2)
    whole = partial(jax.shard_map, mesh=mesh, axis_names={"stage"}, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    run = jax.jit(whole(_run(mesh, _rules(Ring())), check_vma=False)).lower(*arrays).compile()
    assert "collective-permute(" not in run.as_text()
    _assert_equal(run(*arrays), _reference(*arrays), FP32)


def test_one_document_a_row_needs_no_segments():
    q, k, v, do, _ = _arrays()
    expected = _reference(q, k, v, do, np.ones((B, S), np.int32))
    with meshes.use(_mesh(context=4), _rules(Ring(zigzag=False))):
        _, pull = jax.vjp(jax.jit(partial(context.attend, tile=8)), q, k, v)
        o = jax.jit(partial(context.attend, tile=8))(q, k, v)
        _assert_equal((o, *pull(jnp.asarray(do))), expected, FP32)


def test_values_may_be_of_another_width_than_keys():
    """Multi-head latent attention's are."""
    q, k, v, _, segments = _arrays()
    with meshes.use(_mesh(context=2), _rules(Ring(zigzag=False))):
        o = jax.jit(partial(context.attend, tile=8))(q, k, v[..., :5], segments)
    np.testing.assert_allclose(o, _reference(q, k, v, q, segments)[0][..., :5], rtol=0, atol=4 * FP32)


@pytest.mark.parametrize("way", ["ring", "Ulysses"])
def test_bfloat16_keeps_its_statistics_in_float32(way):
    """Sums of 64 probabilities, and logits of tens, both lost in bfloat16."""
    *arrays, segments = _arrays()
    arrays[0] = 8 * arrays[0]
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    expected = _reference(*(np.asarray(x, np.float64) for x in half), segments)
    ours = _on(_mesh(context=4), _rules(WAYS[way]), (*half, segments))
    assert {x.dtype.name for x in ours} == {"bfloat16"}
    _assert_equal(ours, expected, BF16)


def test_a_sequence_that_is_not_cut_takes_tiles_too():
    arrays = _arrays()
    _assert_equal(_on(_mesh(data=2), _rules(Ring()), arrays), _reference(*arrays), FP32)
    o = jax.jit(partial(context.attend, tile=16))(*arrays[:3], arrays[4])  # and no layout
    np.testing.assert_allclose(o, _reference(*arrays)[0], rtol=0, atol=4 * FP32)


def test_zigzag_order_gives_a_device_a_chunk_from_each_end():
    assert context.order(16, 2).reshape(2, 2, 4).tolist() == [
        [[0, 1, 2, 3], [12, 13, 14, 15]],
        [[4, 5, 6, 7], [8, 9, 10, 11]],
    ]
    for shards in (1, 2, 4, 8):
        assert sorted(context.order(64, shards)) == list(range(64))


def test_a_batch_is_reordered_where_that_serves_and_nowhere_else():
    batch = {"tokens": np.arange(B * S, dtype=np.int32).reshape(B, S)}
    for way, sizes, zigzag in (
        (Ring(), dict(context=4), True),
        (Gathered(), dict(context=2, tensor=2), True),
        (Ring(zigzag=False), dict(context=4), False),
        (Ulysses(), dict(context=4), False),
        (Ring(), dict(tensor=4), False),
    ):
        with meshes.use(_mesh(**sizes), _rules(way)), context.balanced(batch) as ordered:
            columns = context.columns(S)
        expected = context.order(S, sizes.get("context", 1)) if zigzag else np.arange(S)
        np.testing.assert_array_equal(columns, expected)
        np.testing.assert_array_equal(ordered["tokens"], batch["tokens"][:, expected])
    assert context.columns(4).tolist() == [0, 1, 2, 3]  # after the block


def _counted(monkeypatch, way, arrays):
    """-> tiles multiplied on each of 4 devices, forward and backward, as the program ran."""
    counts = {"_add": Counter(), "_add_slopes": Counter()}

    def counting(name):
        inner = getattr(context, name)

        def count(*args):
            jax.debug.callback(lambda i: counts[name].update([int(i)]), jax.lax.axis_index("context"))
            return inner(*args)

        return count

    for name in counts:
        monkeypatch.setattr(context, name, counting(name))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "context")  # callbacks take no mesh of which a part is manual
    jax.block_until_ready(_on(mesh, _rules(way), arrays, tile=8))
    jax.effects_barrier()
    return [[count[i] for i in range(4)] for count in counts.values()]


@pytest.mark.parametrize("way", [Ring(), Gathered()], ids=["ring", "gathered"])
def test_every_device_multiplies_as_many_tiles_in_zigzag_order(way, monkeypatch):
    *arrays, _ = _arrays()
    counts = _counted(monkeypatch, way, (*arrays, np.ones((B, S), np.int32)))
    assert counts == [[9] * 4] * 2  # of chunks 0..7 a device has i and 7 - i, which see (i + 1) + (8 - i)


def test_in_natural_order_the_last_device_works_most_and_nothing_masked_is_multiplied(monkeypatch):
    *arrays, _ = _arrays()
    counts = _counted(monkeypatch, Ring(zigzag=False), (*arrays, np.ones((B, S), np.int32)))
    assert counts == [[1 + 2, 3 + 4, 5 + 6, 7 + 8]] * 2


def test_tiles_of_other_documents_are_not_multiplied(monkeypatch):
    *arrays, _ = _arrays()
    segments = np.repeat(np.arange(1, 9, dtype=np.int32), 8)[None].repeat(B, axis=0)  # as long as a tile
    assert _counted(monkeypatch, Ring(), (*arrays, segments)) == [[2] * 4] * 2


COLLECTIVES = {
    "ring": {"collective-permute"},
    "gathered": {"all-gather", "reduce-scatter"},
    "Ulysses": {"all-to-all", "all-gather"},  # the documents' numbers are gathered
}


def _program(way, arrays):
    """The text of the program on context 4 x tensor 2 whose arguments and results are laid out as they are used."""

    def run(q, k, v, do, segments):
        with meshes.use(mesh, rules):
            o, pull = jax.vjp(partial(context.attend, segments_BS=segments, tile=8), q, k, v)
            return o, pull(do)

    mesh, rules = _mesh(context=4, tensor=2), _rules(WAYS[way])
    places = [meshes.sharding(mesh, letters, rules.acts) for letters in ("BSNH", "BSKH", "BSKH", "BSNH", "BS")]
    outs = (places[0], tuple(places[:3]))
    return jax.jit(run, in_shardings=places, out_shardings=outs).lower(*arrays).compile().as_text()


@pytest.mark.parametrize("way", COLLECTIVES)
def test_a_way_adds_its_own_collectives_and_no_others(way):
    text = _program(way, _arrays(heads=8, kv_heads=8))
    found = re.findall(r"= [^=]*? (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)[-(]", text)
    assert set(found) == COLLECTIVES[way]


def test_the_ring_sends_the_bytes_that_the_page_says():
    """docs/parallelism.md. Of each message its bytes; each is in the program once, and all but two go n - 1 times."""
    kv = 2 * B * (S // 4) * (4 // 2) * H * 4  # keys and values of a shard, on one of 2 tensor devices, float32
    documents = B * (S // 4) * 4 + (S // 4 // 8) * 4  # and where each of the tiles of 8 begins
    text = _program("ring", _arrays(heads=8, kv_heads=4))
    sent = [2 * int(words) for words in re.findall(r"u16\[(\d+)\]\S* collective-permute\(", text)]
    forward, backward_first, backward, home = kv + documents, kv + documents, kv + documents + kv, kv
    assert sorted(sent) == sorted([forward, backward_first, backward, home])


def test_it_runs_inside_a_pipeline_stage():
    """A pipeline is manual over `stage`; the rest is not yet."""
    arrays = _arrays()
    mesh, rules = _mesh(stage=2, context=2, tensor=2), _rules(Ring(zigzag=False), B=("data",))

    def staged(q, k, v, do, segments):
        with meshes.use(mesh, rules):
            o, pull = jax.vjp(partial(context.attend, segments_BS=segments, tile=8), q, k, v)
            return (o, *pull(do))

    run = jax.shard_map(
        staged, mesh=mesh, axis_names={"stage"}, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    _assert_equal(jax.jit(run)(*arrays), _reference(*arrays), FP32)


def test_chunks_and_heads_that_do_not_divide_are_refused():
    batch = {"tokens": np.zeros((2, 20), np.int32)}
    with pytest.raises(LayoutError, match="20 does not divide into 8 chunks"):
        with meshes.use(_mesh(context=4), _rules(Ring())), context.balanced(batch):
            pass
    q, k, v, _, segments = _arrays(heads=6, kv_heads=2)
    with pytest.raises(LayoutError, match=r"N \(query heads\) = 6 does not divide into 4 shards"):
        with meshes.use(_mesh(context=4), _rules(Ulysses())):
            context.attend(q, k, v, segments)
