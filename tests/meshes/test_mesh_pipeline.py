"""The executor on a small tied model: gradients of every schedule, the memory of each, what the compiled program holds."""

from __future__ import annotations

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from meshes import DEFAULT, MeshConfig
from meshes.pipeline import Work, gradients
from meshes.schedules import BACKWARD, BACKWARD_INPUT, Table, divide, gpipe, interleaved, one_f_one_b, zero_bubble
from meshes.simulator import executed, simulate

# Relative to the largest entry: fp32 keeps 7 digits, and sums over microbatches in another order lose one.
REORDERED = 1e-6
DIM, VOCAB, ROWS, COLUMNS = 16, 11, 4, 8
SCALE = 1 / 7  # of the objective


def block(x_BSD, w):
    h_BSF = meshes.constrain(jnp.tanh(x_BSD @ meshes.constrain(w["up_DF"], "DF")), "BSF")
    return x_BSD + meshes.constrain(h_BSF @ meshes.constrain(w["down_FD"], "FD"), "BSD"), None


def first(ends, part):
    return meshes.constrain(meshes.constrain(ends["embed_VD"], "_D")[part["tokens"]], "BSD")


def through(stack, weights, x_BSD, part):
    x_BSD, _ = jax.lax.scan(block, x_BSD, weights)
    return x_BSD, {"objective": 0.1 * jnp.square(x_BSD).sum(), "rows": jnp.float32(len(weights["up_DF"]))}


def last(ends, x_BSD, part):
    log_p = jax.nn.log_softmax(x_BSD @ meshes.constrain(ends["embed_VD"], "_D").T)
    hit_BSV = part["targets"][..., None] == jnp.arange(VOCAB)[None, None]
    nll = -(jnp.where(hit_BSV, log_p, 0).sum(-1) * part["weights"]).sum()
    return nll, {"nll": nll, "count": part["weights"].sum()}


def lay(tree):
    """As stored within a stage."""
    letters = {"up_DF": "DF", "down_FD": "FD", "embed_VD": "_D"}
    mapping = DEFAULT.within_stage
    return jax.tree.map_with_path(
        lambda path, x: meshes.store(x, letters[path[-1].key].rjust(x.ndim, "_"), mapping), tree
    )


@cache
def data(layers, microbatches, dim=DIM, rows=ROWS, columns=COLUMNS):
    rng = np.random.default_rng(0)
    draw = lambda *shape, fan: (rng.standard_normal(shape) / fan**0.5).astype(np.float32)  # noqa: E731
    params = dict(
        embed_VD=draw(VOCAB, dim, fan=dim),
        layers=dict(up_DF=draw(layers, dim, 2 * dim, fan=dim), down_FD=draw(layers, 2 * dim, dim, fan=2 * dim)),
    )
    shape = microbatches, rows, columns
    ids = rng.integers(0, VOCAB, (2, *shape), dtype=np.int32)
    return params, dict(tokens=ids[0], targets=ids[1], weights=rng.random(shape, np.float32))


def plain(params, batch):
    """The objective over all microbatches on one device, with the sum of -log p beside it."""
    total = jnp.float32(0)
    for part in [jax.tree.map(lambda x: x[i], batch) for i in range(len(batch["tokens"]))]:
        x_BSD, ends = first(params, part), {"embed_VD": params["embed_VD"]}
        for i in range(len(params["layers"]["up_DF"])):
            x_BSD, _ = block(x_BSD, jax.tree.map(lambda w, i=i: w[i], params["layers"]))
        total += last(ends, x_BSD, part)[0]
    return SCALE * total


@cache
def expected(layers, microbatches):
    value, grads = jax.jit(jax.value_and_grad(plain))(*data(layers, microbatches))
    return float(value), jax.device_get(grads)


def program(table: Table, layers: int, keep: str, objective: bool = False, **sizes: int):
    """-> a function of (params, batch): the executor's sums, extras, and gradients laid out like the parameters."""
    mesh = meshes.make(MeshConfig(**({"fsdp": 1, "stage": table.num_stages} | sizes)), _devices(table, **sizes))
    counts = divide([1] * layers, table.num_virtual)
    shape = table.num_stages, table.num_chunks, max(counts)
    starts, virtual = np.cumsum([0, *counts]), np.repeat(np.arange(table.num_virtual), counts)
    where = virtual % table.num_stages, virtual // table.num_stages, np.arange(layers) - starts[virtual]
    index = np.zeros(shape, int)
    index[where] = np.arange(layers)

    def extras_too(stack, weights, x_BSD, part):
        x_BSD, extras = through(stack, weights, x_BSD, part)
        return x_BSD, extras if objective else {"rows": extras["rows"]}

    work = Work(
        layers=tuple((count,) for count in counts),
        first=first,
        through=extras_too,
        last=last,
        lay_x=lambda x: meshes.constrain(x, "BSD"),
        lay_weights=lay,
        lay_ends=lay,
        keep=keep,
    )

    def run(params, batch):
        with meshes.use(mesh, DEFAULT.staged):
            weights = (jax.tree.map(lambda w: w[index], params["layers"]),)
            ends = {"embed_VD": params["embed_VD"]}
            totals = gradients(mesh, simulate(table), work, ends, weights, batch, jnp.float32(SCALE))
        layers = jax.tree.map(lambda w: w[where], totals.weights[0])
        return totals.sums, totals.extras, dict(embed_VD=totals.ends["embed_VD"].sum(0), layers=layers)

    return jax.jit(run)


def _devices(table, **sizes):
    return jax.devices()[: table.num_stages * int(np.prod(list(sizes.values()) or [1]))]


def assert_close(ours, reference):
    compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=REORDERED * np.abs(y).max())  # noqa: E731
    jax.tree.map(compare, ours, reference)


@pytest.mark.parametrize("keep", ["residuals", "inputs"])
@pytest.mark.parametrize(
    "table, layers",
    [
        (gpipe(2, 3), 4),
        (one_f_one_b(1, 3), 2),
        (one_f_one_b(4, 6), 5),
        (interleaved(2, 4, 1), 3),
        (interleaved(2, 3, 2), 5),
        (interleaved(2, 4, 3), 6),
        (interleaved(8, 8, 1), 9),
        (zero_bubble(2, 1), 2),
        (zero_bubble(4, 5), 7),
    ],
    ids=lambda value: f"{value.num_stages}x{value.num_chunks} stages, {value.num_microbatches} microbatches"
    if isinstance(value, Table)
    else f"{value} layers",
)
def test_a_schedule_gives_the_gradients_of_plain_differentiation(table, layers, keep):
    sums, extras, grads = program(table, layers, keep)(*data(layers, table.num_microbatches))
    value, reference = expected(layers, table.num_microbatches)
    assert SCALE * float(sums["nll"]) == pytest.approx(value, rel=REORDERED)
    assert_close(grads, reference)
    assert extras[0]["rows"].sum() == layers * table.num_microbatches


@pytest.mark.parametrize("sizes", [dict(fsdp=2, tensor=2), dict(data=2, fsdp=2)], ids=str)
@pytest.mark.parametrize("make", [interleaved, zero_bubble], ids=["interleaved", "zero_bubble"])
def test_a_stage_is_sharded_within(make, sizes):
    table = make(2, 4, 1) if make is interleaved else make(2, 4)
    _, _, grads = program(table, 3, "residuals", **sizes)(*data(3, 4))
    assert_close(grads, expected(3, 4)[1])


def test_an_objective_of_the_layers_carries_gradient():
    """The same gradients whatever is kept and wherever the layers are, and not those without it."""
    one = program(one_f_one_b(1, 3), 4, "inputs", objective=True)(*data(4, 3))
    two = program(interleaved(2, 3, 2), 4, "residuals", objective=True)(*data(4, 3))
    assert float(two[1][0]["objective"].sum()) > 0
    assert np.abs(one[2]["embed_VD"] - expected(4, 3)[1]["embed_VD"]).max() > 0.01
    # One stage sums the squares of its last layer's output only, four of every layer's: so against four chunks of one.
    four = program(one_f_one_b(4, 3), 4, "inputs", objective=True)(*data(4, 3))
    assert_close(two[2], jax.device_get(four[2]))


@cache
def compiled(make, microbatches, keep):
    params, batch = data(8, microbatches, dim=32, rows=4, columns=16)
    return program(make(4, microbatches), 8, keep).lower(params, batch).compile()


def memory(make, microbatches, keep="residuals"):
    return compiled(make, microbatches, keep).memory_analysis().temp_size_in_bytes


def test_1f1b_keeps_as_much_for_32_microbatches_as_for_8():
    for make in (one_f_one_b, partial(interleaved, chunks=1), zero_bubble):
        assert memory(make, 32) <= 1.2 * memory(make, 8)


def test_gpipe_keeps_all_microbatches():
    slot = 2 * 5 * 4 * 16 * 32 * 4  # two layers keep x, tanh (2 x) and its slope (2 x) for each row and column, in fp32
    assert memory(gpipe, 32) - memory(gpipe, 8) >= 24 * slot
    assert memory(gpipe, 32) > 2 * memory(gpipe, 8)


def test_inputs_take_less_memory_than_residuals():
    assert memory(gpipe, 32, "inputs") < 0.3 * memory(gpipe, 32)


def computations(text: str) -> dict[str, str]:
    """The computations of a compiled program, by name."""
    return dict(re.findall(r"^(?:ENTRY )?(%\S+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))


def called(name: str, bodies: dict[str, str]) -> str:
    """A computation's text and that of all that it calls."""
    seen, queue = {}, [name]
    while queue:
        if (at := queue.pop()) in seen:
            continue
        seen[at] = bodies[at]
        queue += [other for other in re.findall(r"%[\w.\-]+", bodies[at]) if other in bodies]
    return "\n".join(seen.values())


def actions_of(bodies: dict[str, str]) -> list[str]:
    """The names of what a tick chooses from, in the order of their kinds."""
    switches = re.findall(r"conditional\(.*?branch_computations=\{(.*?)\}", "\n".join(bodies.values()))
    return max((switch.split(", ") for switch in switches), key=len)


@pytest.mark.parametrize("keep", ["residuals", "inputs"])
@pytest.mark.parametrize("make", [one_f_one_b, zero_bubble])
def test_actions_cost_what_the_simulator_says(make, keep):
    """In products: a layer has two, the loss one and one for each of its gradients."""
    bodies, table = computations(compiled(make, 8, keep).as_text()), make(4, 8)
    for kind, action in zip(np.unique(table.kind), actions_of(bodies), strict=True):
        products = len(re.findall(r"\bdot\(", called(action, bodies)))
        assert products == 2 * executed(table, keep).by_kind[kind] + 3 * (kind in (BACKWARD, BACKWARD_INPUT))


@pytest.mark.parametrize("make", [one_f_one_b, zero_bubble])
def test_the_program_takes_the_simulators_ticks_and_an_idle_one_computes_nothing(make):
    bodies = computations(compiled(make, 8, "residuals").as_text())
    branches = actions_of(bodies)
    kinds = len(np.unique(make(4, 8).kind))
    assert len(branches) == kinds
    idle, *actions = [called(branch, bodies) for branch in branches]
    assert not re.search(r"\b(dot|while|conditional|call|all-\w+|collective-\w+)\(", idle)
    assert all(re.search(r"\bdot\(", action) for action in actions)
    ticks = str(make(4, 8).num_ticks)
    loops = [body for body in bodies.values() if f"%{branches[0].lstrip('%')}" in body]
    assert len(loops) == 1  # in one loop and nowhere else
    trips = re.findall(r'while\(.*?body=(%[\w.\-]+).*?known_trip_count":\{"n":"(\d+)"', "\n".join(bodies.values()))
    assert [count for body, count in trips if bodies[body] == loops[0]] == [ticks]


def test_buffers_and_sums_are_changed_in_place():
    """XLA copies what a conditional passes through; a copy of the sums in every tick would cost more than an action."""
    bodies = computations(compiled(one_f_one_b, 8, "residuals").as_text())
    ticks = [name for name, body in bodies.items() if "collective-permute(" in body]
    assert len(ticks) == 1 and "conditional(" in bodies[ticks[0]]
    slots, text = simulate(one_f_one_b(4, 8)).saved.size, called(ticks[0], bodies)
    for shape in (f"{slots},2,4,16,64", "1,2,32,64", "1,2,64,32"):  # residuals of two layers; sums of their gradients
        assert f"f32[{shape}]" in text
        assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text)
