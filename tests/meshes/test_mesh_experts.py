"""Tokens to experts and back: every transport against a loop over tokens, and against each other, bit for bit repeated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import meshes
from meshes import DEFAULT, LayoutError, MeshConfig, experts
from meshes.experts import Weights
from meshes.rules import Capacity, Ragged

# Relative to the largest entry: fp32 keeps 7 digits, sums of some dozen terms in another order lose one.
FP32 = 2e-6
B, S, D, F, E, K = 4, 16, 6, 10, 8, 3

RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, S, D)).astype(np.float32)
CHOSEN = np.argsort(RNG.normal(size=(B, S, E)) + np.linspace(0, 2, E), axis=-1)[..., :K].astype(np.int32)
CHOSEN[0, :5] = E  # tokens that choose no expert
GATES = RNG.random((B, S, K)).astype(np.float32)
SHAPES = Weights((E, D, F), (E, D, F), (E, F, D))
WEIGHTS = Weights(*(RNG.normal(size=shape).astype(np.float32) / 2 for shape in SHAPES))
OUT = RNG.normal(size=(B, S, D)).astype(np.float32)
MESHES = {
    "expert 2": dict(expert=2),
    "expert 4": dict(expert=4),
    "expert 2 x fsdp 2 x tensor 2": dict(expert=2, fsdp=2, tensor=2),
    "expert 4 x context 2": dict(expert=4, context=2),
    "expert 2 x context 2 x tensor 2": dict(expert=2, context=2, tensor=2),
}


def reference(room=None):
    """-> y, dropped by expert, and the gradients of sum(y OUT) by x, gates and weights: float64, choice by choice."""
    y, dropped, dx, dgates = np.zeros((B, S, D)), np.zeros(E), np.zeros((B, S, D)), np.zeros((B, S, K))
    dw = [np.zeros(shape) for shape in SHAPES]
    for b in range(B):
        taken = np.zeros(E)
        for s, j in np.ndindex(S, K):
            e, gate = CHOSEN[b, s, j], float(GATES[b, s, j])
            if e == E:
                continue
            if room is not None and taken[e] >= room:
                dropped[e] += 1
                continue
            taken[e] += 1
            x, (w_gate, w_up, w_down) = X[b, s].astype(float), (w[e].astype(float) for w in WEIGHTS)
            g, u = x @ w_gate, x @ w_up
            sigma = 1 / (1 + np.exp(-g))
            h, do = g * sigma * u, gate * OUT[b, s].astype(float)
            y[b, s] += gate * (h @ w_down)
            dgates[b, s, j] = OUT[b, s] @ (h @ w_down)
            dh = w_down @ do
            dg, du = dh * u * (sigma + g * sigma * (1 - sigma)), dh * g * sigma
            dx[b, s] += w_gate @ dg + w_up @ du
            for total, part in zip(dw, (np.outer(x, dg), np.outer(x, du), np.outer(h, do)), strict=True):
                total[e] += part
    return y, dropped, (dx, dgates, *dw)


def value_and_gradients(way, sizes=None):
    def run(x, gates, weights):
        y, dropped = experts.apply(weights, x, jnp.asarray(CHOSEN), gates)
        return (y * OUT).sum(), (y, dropped)

    call = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))
    if sizes is None:
        mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    else:
        mesh = meshes.make(MeshConfig(**({"fsdp": 1} | sizes)), jax.devices()[: int(np.prod(list(sizes.values())))])
    with meshes.use(mesh, dataclasses.replace(DEFAULT, experts=way)):
        (_, (y, dropped)), (dx, dgates, dw) = call(jnp.asarray(X), jnp.asarray(GATES), jax.tree.map(jnp.asarray, WEIGHTS))
    return jax.device_get((y, dropped, (dx, dgates, *dw)))


def assert_equal(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=FP32 * max(np.abs(y).max(), 1.0))


@pytest.mark.parametrize("room", [None, 2, 5])
def test_on_one_device_values_and_gradients_equal_a_loop_over_choices(room):
    way = Ragged() if room is None else Capacity(factor=room * E / (S * K))
    assert_equal(value_and_gradients(way), reference(room))


@pytest.mark.parametrize("room", [None, 5])
@pytest.mark.parametrize("mesh", MESHES)
def test_over_a_mesh_every_transport_equals_that_loop(mesh, room):
    way = Ragged() if room is None else Capacity(factor=room * E / (S * K))
    assert_equal(value_and_gradients(way, MESHES[mesh]), reference(room))


@pytest.mark.parametrize(("mesh", "sorts"), [("expert 4", 1), ("expert 4 x context 2", 2)])
def test_a_fixed_capacity_sorts_choices_once_and_again_only_where_the_sequence_is_cut(mesh, sorts):
    mesh = meshes.make(MeshConfig(**{"fsdp": 1} | MESHES[mesh]), jax.devices()[: int(np.prod(list(MESHES[mesh].values())))])
    with meshes.use(mesh, dataclasses.replace(DEFAULT, experts=Capacity())):
        program = jax.jit(experts.apply).lower(WEIGHTS, X, CHOSEN, GATES).compile().as_text()
    assert program.count(" sort(") == sorts


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` as its documentation defines it, from everybody's arguments; and a check of recv_sizes."""
    everyone = [lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    me, per_peer = lax.axis_index(axis_name), len(send_sizes) // lax.axis_size(axis_name)
    row, wrong = jnp.arange(len(output)), jnp.zeros((), bool)
    for sender in range(len(everyone[0])):
        sent, starts, sizes, targets = (x[sender] for x in everyone)
        for i in range(per_peer):
            n = me * per_peer + i
            at = row - targets[n]
            wrong |= sizes[n] != recv_sizes[sender * per_peer + i]
            inside = (at >= 0) & (at < sizes[n])
            output = jnp.where(inside[:, None], sent.at[starts[n] + at].get(mode="clip"), output)
    return jnp.where(wrong, jnp.nan, output)


@pytest.fixture
def as_on_gpus(monkeypatch):
    monkeypatch.setattr(experts, "platform", lambda: "gpu")
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated)


@pytest.mark.parametrize("mesh", ["expert 2", "expert 4", "expert 2 x context 2 x tensor 2"])
def test_what_gpus_run_equals_that_loop_with_the_exchange_emulated(mesh, as_on_gpus):
    assert_equal(value_and_gradients(Ragged(), MESHES[mesh]), reference())


def test_where_nothing_is_dropped_the_transports_equal_each_other():
    roomy = value_and_gradients(Capacity(factor=E / K), MESHES["expert 4"])
    assert not roomy[1].any()
    assert_equal(roomy, value_and_gradients(Ragged(), MESHES["expert 4"]))
    assert_equal(roomy, value_and_gradients(Ragged()))


@pytest.mark.parametrize("way", [Ragged(), Capacity(factor=1.0)])
def test_two_runs_give_the_same_bits(way):
    jax.tree.map(np.testing.assert_array_equal, *(value_and_gradients(way, MESHES["expert 4 x context 2"]) for _ in range(2)))


@pytest.mark.parametrize("chosen", [0, E - 1])
def test_all_tokens_to_one_expert_are_all_served(chosen, monkeypatch):
    monkeypatch.setitem(globals(), "CHOSEN", np.full((B, S, 1), chosen, np.int32))
    monkeypatch.setitem(globals(), "GATES", GATES[..., :1])
    monkeypatch.setitem(globals(), "K", 1)
    assert_equal(value_and_gradients(Ragged(), MESHES["expert 4"]), reference())


def test_the_gradients_hold_no_scatter_that_adds():
    """Of rows, that is: a scatter-add of several into one has no order on a GPU."""

    def run(x, gates, weights):
        return experts.apply(weights, x, jnp.asarray(CHOSEN), gates)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(X, GATES, WEIGHTS))
    assert "scatter_add" not in text.replace("scatter-add", "scatter_add") or _only_weights(text)


def _only_weights(text):
    """On CPU a block's product is added to its expert's gradient: one after the other, in a loop."""
    lines = [line for line in text.splitlines() if "scatter-add" in line or "scatter_add" in line]
    return all(f"f32[{E},{D},{F}]" in line or f"f32[{E},{F},{D}]" in line for line in lines if "=" in line)


def test_the_exchange_lowers_for_gpus(monkeypatch):
    monkeypatch.setattr(experts, "platform", lambda: "gpu")
    mesh = meshes.make(MeshConfig(expert=2, fsdp=2), jax.devices()[:4])

    def run(x, gates, weights):
        return experts.apply(weights, x, jnp.asarray(CHOSEN), gates)[0].sum()

    with meshes.use(mesh, DEFAULT):
        traced = jax.jit(jax.grad(run, (0, 1, 2))).trace(X, GATES, WEIGHTS)
    assert str(traced.jaxpr).count("ragged_all_to_all[") == 4  # there and back, and the same for the gradients
    assert "ragged_all_to_all" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_fallback_says_so_once_and_can_be_refused(capsys):
    experts._say.cache_clear()
    for _ in range(2):
        value_and_gradients(Ragged(), MESHES["expert 2"])
    said = "experts: ragged_all_to_all runs on GPUs, and these devices are cpu: an all-to-all padded to the worst case instead"
    assert capsys.readouterr().err.count(said) == 1
    value_and_gradients(Ragged(require=True))  # no exchange is needed on one device
    with pytest.raises(LayoutError, match="experts = Ragged is required and cannot run"):
        value_and_gradients(Ragged(require=True), MESHES["expert 2"])


def test_experts_on_an_axis_that_holds_no_tokens_are_refused():
    rules = dataclasses.replace(DEFAULT, acts=DEFAULT.acts | dict(E="tensor", F=None))
    with meshes.use(meshes.make(MeshConfig(tensor=2)), rules), pytest.raises(LayoutError, match="experts cannot be on tensor"):
        experts.apply(WEIGHTS, X, CHOSEN, GATES)


def test_a_capacity_is_a_positive_factor():
    assert experts.capacity(1.25, 16, 3, 8) == 8 and experts.capacity(0.01, 16, 3, 8) == 1
    assert experts.capacity(1.1, 100, 1, 10) == 11  # where 1.1 * 100 / 10 in floating point is more
    with pytest.raises(LayoutError, match="leaves no room"):
        Capacity(factor=0.0)
