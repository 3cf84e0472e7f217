"""Content hashes against numpy's arithmetic, other layouts and flipped bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.checkpoint.states import FSDP_4X2, make_state, placed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import meshes
from jaxtrain.checkpoint import digest, hashing
from jaxtrain.checkpoint.hashing import LANES, Hashing, _odd, _program, total
from jaxtrain.errors import CheckpointError

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "bool", "int8", "float8_e4m3fn")
SHAPES = ((), (3, 0), (7,), (2, 3, 4, 5))


def drawn(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
    return bits[..., 0] % 2 == 1 if dtype == "bool" else bits.view(jnp.dtype(dtype)).reshape(shape)


def lanes(x) -> list[int]:
    return Hashing({"x": jnp.asarray(x)}).sums()["x"]["0"]


def by_hand(x: np.ndarray) -> list[int]:
    """The definition, element by element, in Python's integers."""
    mask, sums = 2**32 - 1, [0] * LANES
    for index in np.ndindex(x.shape):
        bits = int.from_bytes(x[index].tobytes(), "little")
        for lane in range(LANES):
            h = bits * int(_odd(lane, -1)) + int(_odd(lane, -2)) + sum(i * int(_odd(lane, d)) for d, i in enumerate(index))
            h &= mask
            h = (h ^ h >> 16) * 0x7FEB352D & mask
            h = (h ^ h >> 15) * 0x846CA68B & mask
            sums[lane] += h ^ h >> 16
    return [total & mask for total in sums]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_hash_is_the_sum_that_python_computes(shape, dtype):
    x = drawn(shape, dtype)
    assert lanes(x) == by_hand(x)


def test_an_element_of_eight_bytes_is_hashed_as_two_words():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((3, 2))
        assert lanes(x) == by_hand(x.view(np.uint32).reshape(3, 2, 2))


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, "fsdp"), P("tensor", "fsdp"), P(None, ("fsdp", "tensor")), P("tensor")])
def test_the_hash_does_not_depend_on_the_sharding(spec):
    x = jnp.asarray(drawn((8, 16, 3), "float32"))
    mesh = meshes.make(meshes.MeshConfig(fsdp=4, tensor=2))
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    assert lanes(sharded) == lanes(x)


def test_the_devices_exchange_nothing(monkeypatch):
    programs = []

    def kept(*key):
        program = _program(*key)
        return lambda *args: programs.append(program.lower(*args).compile().as_text()) or program(*args)

    monkeypatch.setattr(hashing, "_program", kept)
    mesh = meshes.make(meshes.MeshConfig(fsdp=4, tensor=2))
    x = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("fsdp", "tensor")))
    Hashing({"x": x}).sums()
    assert len(programs) == 1 and "reduce" in programs[0]
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", programs[0])


def test_the_parts_of_several_processes_add_up():
    parts = [{"x": {"0": [2**32 - 1, 1]}}, {"x": {"0": [2, 3], "10": [7, 7]}}, {"x": {"2": [0, 1]}}]
    assert total(parts) == {"x": ["0000000100000004", "0000000000000001", "0000000700000007"]}


def test_every_copy_has_a_hash_of_its_own():
    mesh = meshes.make(meshes.MeshConfig(data=2, fsdp=4))
    sharding = NamedSharding(mesh, P("fsdp"))
    x = jnp.arange(8.0)
    parts = [np.array(x[sharding.devices_indices_map((8,))[device]]) for device in mesh.devices.flat]
    parts[6][0] = -1
    arrays = [jax.device_put(part, device) for part, device in zip(parts, mesh.devices.flat)]
    copies = total([Hashing({"x": jax.make_array_from_single_device_arrays((8,), sharding, arrays)}).sums()])["x"]
    assert len(copies) == 2 and copies[0] != copies[1] and copies[0] == "".join(f"{lane:08x}" for lane in by_hand(np.asarray(x)))


def test_arrays_on_different_devices_are_hashed_together():
    x = jnp.arange(6.0)
    both = {"one": x, "other": jax.device_put(x, jax.devices()[5]), "all": placed(make_state(), **FSDP_4X2).params["embed"]}
    sums = Hashing(both).sums()
    assert sums["one"]["0"] == sums["other"]["0"] == lanes(x) and sums["all"]["0"] == lanes(make_state().params["embed"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint32", "int8"])
def test_every_single_flipped_bit_changes_the_hash(dtype):
    x = drawn((3, 5), dtype)
    flipped = []
    for position in range(8 * x.nbytes):
        y = x.copy()
        y.view(np.uint8).reshape(-1)[position // 8] ^= 1 << position % 8
        flipped.append(tuple(lanes(y)))
    assert len({*flipped, tuple(lanes(x))}) == 8 * x.nbytes + 1


def test_moved_elements_change_the_hash():
    x = drawn((4, 6), "float32")
    moved = [x, x[::-1], x[:, ::-1], np.roll(x, 1, 0), np.roll(x, 1, 1), x.reshape(6, 4).T, x.reshape(6, 4)]
    assert len({tuple(lanes(y)) for y in moved}) == len(moved)


def test_zeros_of_both_signs_differ():
    assert lanes(jnp.zeros(3)) != lanes(-jnp.zeros(3))


def test_the_digest_of_a_state_does_not_depend_on_the_mesh():
    state = make_state()
    layouts = [FSDP_4X2, dict(config=meshes.MeshConfig(data=2, fsdp=4), rules=meshes.HSDP), dict(config=meshes.MeshConfig(), rules=meshes.DP)]
    assert {digest(placed(state, **layout)) for layout in layouts} == {digest(state)}


def test_a_digest_of_what_a_checkpoint_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="cannot be saved"):
        digest({"a": np.ones(3)})


def test_the_digest_depends_on_names_shapes_dtypes_and_contents():
    trees = [
        {"a": jnp.zeros(4)},
        {"b": jnp.zeros(4)},
        {"a": jnp.zeros((4, 1))},
        {"a": jnp.zeros(4, jnp.int32)},
        {"a": jnp.zeros(4).at[1].set(1)},
        {"a": jnp.zeros(4), "b": jnp.zeros(0)},
        {"a": jnp.zeros(4), "b": jnp.zeros((0, 2))},
        {"a": jnp.zeros(4), "b": jnp.zeros(0, jnp.bool_)},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)
