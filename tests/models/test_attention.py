"""Ways to compute attention: what each refuses, which is taken, and that all compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.attention
from meshes import DEFAULT, Gathered, LayoutError, Ring, Ulysses
from models.attention import Auto, Chunked, CuDNN, Dense, Site, Tiled, check_cut, choose
from models.kernels import attend, cudnn
from tests.models import reference

GPU = Site(platform="gpu", dtype="bfloat16", seq_len=8192, head_dim=128, packed=False)
CPU = dataclasses.replace(GPU, platform="cpu", dtype="float32")
FP32 = 1e-5  # fp32 keeps 7 digits; sums of tens of numbers of size 1 lose less than two
BF16 = 0.03  # values of size 1 with three roundings to 8 bits


@pytest.fixture(autouse=True)
def _forget_what_was_said():
    models.attention._say.cache_clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(platform="cpu"), "needs an NVIDIA GPU, and these devices are cpu"),
        (dict(dtype="float32"), "takes bfloat16 and float16, not float32"),
        (dict(head_dim=60), "a head of 60 is not a multiple of 8, at most 128"),
        (dict(head_dim=256), "a head of 256"),
        (dict(shards=4), "the sequence is sharded 4 ways"),
        (dict(packed=True, seq_len=32_768), "packed documents need a mask, at most 16,384 long"),
    ],
)
def test_cudnn_refuses_with_a_reason_and_the_next_way_is_taken(change, reason, capsys):
    site = dataclasses.replace(GPU, **change)
    taken = choose(CuDNN(), site)
    assert taken == (Tiled() if site.shards > 1 or site.seq_len > 8192 else Chunked())
    said = capsys.readouterr().err
    assert reason in said and "CuDNN refused" in said
    choose(CuDNN(), site)
    assert capsys.readouterr().err == ""  # once
    with pytest.raises(LayoutError, match=reason):
        choose(CuDNN(require=True), site)


@pytest.mark.parametrize("way", [Chunked(chunk=64), Dense()])
def test_ways_that_keep_probabilities_refuse_a_sharded_sequence(way, capsys):
    sharded, name = dataclasses.replace(CPU, shards=2), type(way).__name__
    assert choose(way, sharded) == Tiled()
    assert f"{name} refused, Tiled instead: the sequence is sharded 2 ways" in capsys.readouterr().err
    with pytest.raises(LayoutError, match=f"{name} is required"):
        choose(dataclasses.replace(way, require=True), sharded)


def test_chunks_refuse_a_sequence_whose_probabilities_fill_the_memory(capsys):
    assert choose(Chunked(), dataclasses.replace(CPU, seq_len=16_384)) == Tiled()
    assert "Chunked refused, Tiled instead: it keeps probabilities, at most 8,192 long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("site", "way"),
    [
        (GPU, CuDNN()),
        (dataclasses.replace(GPU, packed=True), CuDNN()),
        (dataclasses.replace(GPU, dtype="float32"), Chunked()),
        (CPU, Chunked()),
        (dataclasses.replace(CPU, shards=2), Tiled()),
        (dataclasses.replace(CPU, seq_len=16_384), Tiled()),
    ],
)
def test_auto_takes_the_best_way_and_says_on_a_gpu_why_it_is_not_the_fastest(site, way, capsys):
    assert choose(Auto(), site) == way
    said = capsys.readouterr().err
    assert said == ("" if site.platform == "cpu" or way == CuDNN() else f"attention: Chunked, as CuDNN refused: {CuDNN().refuses(site)}\n")


@pytest.mark.parametrize("way", [CuDNN(), Chunked(chunk=32), Tiled(tile=32), Dense()])
def test_a_way_that_is_not_refused_is_taken_as_it_is(way, capsys):
    assert choose(way, GPU) is way
    assert capsys.readouterr().err == ""


def _arrays(N=6, K=2, S=23, H=8):
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(2, S, heads, H)), jnp.float32) for heads in (N, K, K))
    return q, k, v, jnp.asarray(np.sort(rng.integers(0, 3, (2, S)), axis=1))


def _expected(q, k, v, segments):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    rows = range(len(q))
    heads = range(q.shape[2])
    one = lambda b, n: reference.attend(q[b, :, n], k[b, :, n // group], v[b, :, n // group], segments[b])  # noqa: E731
    return np.stack([np.stack([one(b, n) for n in heads], axis=1) for b in rows])


WAYS = {"dense": Dense(), "auto": Auto(), **{f"chunks of {n}": Chunked(chunk=n) for n in (5, 22, 64)}}
WAYS |= {f"tiles of {n}": Tiled(tile=n) for n in (1, 5, 64)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_float64_numpy(way, packed):
    q, k, v, segments = _arrays()
    out = jax.jit(lambda *x: attend(WAYS[way], *x))(q, k, v, segments if packed else None)
    expected = _expected(q, k, v, np.asarray(segments) if packed else np.ones_like(segments))
    np.testing.assert_allclose(out, expected, rtol=0, atol=FP32)


def _derived(q, k, v, segments):
    """The same in three lines, for jax to derive."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    mask = jnp.tril(jnp.ones((1, q.shape[1], q.shape[1]), bool)) & (segments[:, :, None] == segments[:, None])
    logits = jnp.where(mask[:, None], jnp.einsum("BSNH,BTNH->BNST", q, k) / np.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.einsum("BNST,BTNH->BSNH", jax.nn.softmax(logits), v)


@pytest.mark.parametrize("way", WAYS)
def test_the_backward_that_is_written_out_equals_the_derived_one(way):
    q, k, v, segments = _arrays()
    weight = jax.random.normal(jax.random.key(0), q.shape)
    ours, theirs = (
        jax.jit(jax.grad(lambda *x: (weight * f(*x, segments)).sum(), (0, 1, 2)))(q, k, v)  # noqa: B023
        for f in (lambda *x: attend(WAYS[way], *x), _derived)
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=FP32 * 4)


def test_logits_too_large_for_exp_and_bfloat16_stay_right():
    q, k, v, segments = _arrays()
    q = 300.0 * q  # logits of hundreds: exp overflows in fp32 at 88
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    expected = _expected(*(x.astype(jnp.float32) for x in half), np.asarray(segments))
    run = jax.jit(lambda *x: attend(Chunked(chunk=12), *x))
    np.testing.assert_allclose(run(q, k, v, segments), _expected(q, k, v, np.asarray(segments)), atol=1e-3)
    out = run(*half, segments)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=0, atol=BF16)


def test_chunks_multiply_half_of_what_dense_does():
    q, k, v, _ = _arrays(S=64)

    def flops(way):
        return jax.jit(lambda *x: attend(way, *x)).lower(q, k, v).cost_analysis()["flops"]

    assert flops(Chunked(chunk=8)) < 0.6 * flops(Dense())  # (1 + 8 / 64) / 2 = 0.5625


CUT = dict(axes={"context": 4, "tensor": 2}, seq_len=64, num_heads=16)


@pytest.mark.parametrize(
    ("rules", "wanted", "change", "said"),
    [
        (Ring(), Auto(), dict(seq_len=60), r"seq_len = 60 .* 8 chunks[^$]*fix   seq_len = 64, or Ring\(zigzag=False\)"),
        (Gathered(), CuDNN(require=True), {}, r"CuDNN is required and takes no sequence that is cut[^$]*Ulysses\(\)"),
        (Ring(), Dense(require=True), {}, r"Dense is required[^$]*mesh.context = 1"),
        (Ulysses(), Auto(), dict(num_heads=12), r"12 does not divide over 8[^$]*copied to all[^$]*context axis of 2"),
        (Ulysses(), Auto(), dict(num_heads=2), r"num_heads = 2[^$]*fix   rules.context = Ring\(\).* context axis of 1"),
    ],
)
def test_what_cannot_run_over_a_cut_sequence_is_refused_before_it_runs(rules, wanted, change, said):
    rules = dataclasses.replace(DEFAULT, context=rules)
    with pytest.raises(LayoutError, match=said):
        check_cut(wanted, rules, **(CUT | change))
    check_cut(wanted, rules, **(CUT | change | dict(axes={"tensor": 2})))


@pytest.mark.parametrize(
    ("rules", "wanted", "change"),
    [
        (Ring(zigzag=False), Auto(), dict(seq_len=60)),
        (Ulysses(), CuDNN(require=True), dict(seq_len=60)),
        (Ring(), Tiled(require=True), {}),
        (Gathered(), Dense(), dict(num_heads=2)),
    ],
)
def test_what_can_run_over_a_cut_sequence_is_not_refused(rules, wanted, change):
    check_cut(wanted, dataclasses.replace(DEFAULT, context=rules), **(CUT | change))


@pytest.mark.parametrize("width", [4, 8, 12])
def test_values_narrower_or_wider_than_keys_are_brought_to_one_width_for_cudnn(width, monkeypatch):
    q, k, _, segments = _arrays()
    v, widths = _arrays(H=width)[2], []
    plain = jax.nn.dot_product_attention

    def kernel(q, k, v, implementation, **options):
        widths.append({x.shape[-1] for x in (q, k, v)})
        return plain(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    out = cudnn(q, k, v, segments)
    np.testing.assert_allclose(out, attend(Dense(), q, k, v, segments), rtol=0, atol=FP32)
    assert widths == [{max(8, width)}]


@pytest.mark.gpu
@pytest.mark.parametrize(("packed", "width"), [(False, 64), (True, 64), (False, 128)])
def test_cudnn_equals_dense_on_a_gpu(packed, width):
    q, k, _, segments = (x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16) for x in _arrays(N=8, K=2, S=256, H=64))
    v, segments = _arrays(K=2, S=256, H=width)[2].astype(jnp.bfloat16), segments if packed else None

    def run(way):
        total = lambda *x: attend(way, *x, segments).astype(jnp.float32).sum()  # noqa: E731
        return jax.tree.leaves(jax.value_and_grad(total, (0, 1, 2))(q, k, v))

    for ours, theirs in zip(run(CuDNN(require=True)), run(Dense()), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=0.05, atol=0.05)
