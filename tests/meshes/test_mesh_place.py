"""Placement: specs, constraints under every preset, host-local rows and global batches."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import meshes
from meshes import DEFAULT, PRESETS, LayoutError, MeshConfig, Rules

# Reduction order differs between layouts: float32 rounding (6e-8) through two sums of at most 64 terms of size ~1.
FLOAT32_SUMS = 1e-5
MESHES = [
    MeshConfig(data=2, tensor=2),
    MeshConfig(replica=2, context=2, tensor=2, fsdp=1),
    MeshConfig(stage=2, expert=2),
    MeshConfig(tensor=8),
]


def block(x_BRD, up_DF, down_FD):
    x_BSD = meshes.constrain(meshes.constrain(x_BRD, "BRD"), "BSD")
    h_BSF = meshes.constrain(jnp.tanh(x_BSD @ meshes.constrain(up_DF, "DF")), "BSF")
    return meshes.constrain(h_BSF @ meshes.constrain(down_FD, "FD"), "BRD")


def loss(weights, x_BRD):
    return jnp.square(block(x_BRD, *weights)).mean()


def reference(weights, x):
    """Loss and gradients of `loss`, by hand in float64."""
    (up, down), x = (w.astype(np.float64) for w in weights), x.astype(np.float64)
    h = np.tanh(x @ up)
    y = h @ down
    dy = 2 * y / y.size
    dh = dy @ down.T * (1 - h**2)
    return (y**2).mean(), (np.einsum("bsd,bsf->df", x, dh), np.einsum("bsf,bsd->fd", h, dy))


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_the_maths_is_the_same_under_every_preset_on_every_mesh(name, config):
    mesh, rules = meshes.make(config), PRESETS[name]
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((16, 32), (32, 16))]
    x = rng.standard_normal((8, 8, 16)).astype(np.float32)
    stored = meshes.shardings(mesh, rules.params, ["DF", "FD"])
    batch = meshes.globalize(x, mesh, rules, 8, "BSD")
    with meshes.use(mesh, rules):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, stored))
        value, grads = step(jax.device_put(weights, stored), batch)
    want_value, want_grads = reference(weights, x)
    np.testing.assert_allclose(value, want_value, rtol=FLOAT32_SUMS)
    for grad, want, sharding in zip(grads, want_grads, stored, strict=True):
        np.testing.assert_allclose(grad, want, atol=FLOAT32_SUMS)
        assert grad.sharding.is_equivalent_to(sharding, grad.ndim)


@pytest.mark.parametrize(("name", "gathers"), [("DP", 0), ("HSDP", 1), ("FSDP", 1)])
def test_the_compiled_product_gathers_the_weight_only_where_it_is_stored_in_parts(name, gathers):
    mesh, rules = meshes.make(MeshConfig(data=2, fsdp=4)), PRESETS[name]
    abstract = lambda letters, mapping, shape: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.float32, sharding=meshes.sharding(mesh, letters, mapping)
    )
    product = lambda x, w: meshes.constrain(x @ meshes.constrain(w, "DF"), "BSF")  # noqa: E731
    x, w = abstract("BSD", rules.acts, (8, 4, 16)), abstract("DF", rules.params, (16, 32))
    with meshes.use(mesh, rules):
        lowered = jax.jit(product).lower(x, w)
    compiled = lowered.compile()
    assert compiled.as_text().count(" all-gather(") == gathers
    assert compiled.output_shardings.shard_shape((8, 4, 32)) == (1, 4, 32)


def test_constrain_lays_out_by_the_compute_map():
    mesh = meshes.make(MeshConfig(data=2, tensor=2))
    with meshes.use(mesh, DEFAULT):
        out = jax.jit(lambda x: meshes.constrain(x, "BSF"))(jnp.ones((8, 4, 16)))
        assert out.sharding.shard_shape(out.shape) == (2, 4, 8)
        assert {letters: meshes.axis_size(letters) for letters in ("B", "F", "BF", "D")} == dict(B=4, F=2, BF=8, D=1)


def test_without_a_layout_constrain_gives_back_its_argument():
    x = jnp.ones((3, 5))
    assert meshes.constrain(x, "BF") is x
    assert meshes.current() is None and meshes.axis_size("B") == 1


def test_the_platform_is_that_of_the_layouts_devices(pod):
    assert meshes.platform() == "cpu"
    with meshes.use(meshes.make(MeshConfig(), pod(1, 8)), DEFAULT):
        assert meshes.platform() == "gpu"
    with meshes.use(meshes.make(MeshConfig()), DEFAULT):
        assert meshes.platform() == "cpu"


def test_one_element_for_each_device_in_the_meshes_order():
    mesh = meshes.make(MeshConfig(data=2, tensor=2), jax.devices()[::-1])
    array = jax.device_put(np.arange(8), meshes.per_device(mesh))
    assert [(s.device, int(s.data[0])) for s in array.addressable_shards] == list(zip(mesh.devices.flat, range(8)))


def test_layouts_nest_and_end_with_their_block_even_by_an_error():
    mesh = meshes.make(MeshConfig())
    with pytest.raises(ZeroDivisionError), meshes.use(mesh, DEFAULT) as layout:
        assert meshes.current() == layout and layout.mesh is mesh
        with meshes.use(mesh, meshes.DP):
            assert meshes.current().rules is meshes.DP
        assert meshes.current().rules is DEFAULT
        raise ZeroDivisionError
    assert meshes.current() is None


def test_a_jitted_function_is_traced_anew_under_another_layout():
    traces = []

    @jax.jit
    def f(x):
        traces.append(meshes.current())
        return meshes.constrain(x, "BF")

    mesh, x = meshes.make(MeshConfig(tensor=2)), jnp.ones((8, 8))
    shards = []
    for rules in (meshes.DP, meshes.TP, meshes.DP):
        with meshes.use(mesh, rules):
            shards.append(f(x).sharding.shard_shape(x.shape))
    f(x)
    assert shards == [(1, 8), (2, 4), (1, 8)]
    assert [layout and layout.rules for layout in traces] == [meshes.DP, meshes.TP, None]


def test_constrain_inside_a_shard_map_leaves_its_manual_axes_alone():
    mesh = meshes.make(MeshConfig(stage=2, tensor=2))
    manual = partial(jax.shard_map, mesh=mesh, axis_names={"stage"}, in_specs=P("stage"), out_specs=P("stage"))
    x = jnp.arange(64.0).reshape(4, 16)
    with meshes.use(mesh, DEFAULT):
        out = jax.jit(manual(lambda x: meshes.constrain(x * 2, "BF")))(x)
    np.testing.assert_array_equal(out, np.arange(64.0).reshape(4, 16) * 2)
    assert out.sharding.shard_shape(x.shape) == (1, 8)


def test_a_tree_of_letters_becomes_the_same_tree_of_shardings():
    mesh = meshes.make(MeshConfig(tensor=2))
    tree = meshes.shardings(mesh, DEFAULT.params, {"up": "LDF", "norms": ["LD", None], "step": ""})
    assert jax.tree.map(lambda s: s.spec, tree) == {
        "up": P(None, "fsdp", "tensor"),
        "norms": [P(None, "fsdp"), P()],
        "step": P(),
    }


def test_a_leaf_of_a_tree_that_cannot_be_laid_out_is_refused_by_name():
    mesh = meshes.make(MeshConfig(tensor=2))
    for tree, said in (({"a": [None, {"up": "DQ"}]}, "^a/1/up 'DQ': 'Q' is no"), ("FN", "^an array 'FN': F and N are both")):
        with pytest.raises(LayoutError, match=said):
            meshes.shardings(mesh, DEFAULT.params, tree)


def test_axes_of_size_one_are_left_out_of_shardings_and_kept_in_specs():
    mesh = meshes.make(MeshConfig(data=2, fsdp=4))
    assert meshes.spec("BS", DEFAULT.acts) == P(("replica", "data", "stage", "fsdp", "expert"), "context")
    assert meshes.sharding(mesh, "BS", DEFAULT.acts).spec == P(("data", "fsdp"), None)


def test_rules_work_on_a_mesh_that_lacks_axes_or_has_its_own():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert meshes.sharding(mesh, "BSF", DEFAULT.acts).spec == P("data", None, None)
    assert meshes.sharding(jax.make_mesh((8,), ("x",)), "BF", {"F": "x"}).spec == P(None, "x")
    with pytest.raises(LayoutError, match="did you mean 'tensor'"):
        meshes.sharding(mesh, "BF", {"F": "tensors"})


def test_a_spec_of_an_axis_that_is_none_is_refused():
    with pytest.raises(LayoutError, match="F is put on 'tensors', which is no mesh axis(?s:.*)did you mean 'tensor'"):
        meshes.spec("BF", {"F": "tensors"})


def test_shards_of_what_is_no_letter_are_refused_with_and_without_a_layout():
    with pytest.raises(LayoutError, match="dims 'BQ': 'Q' is no letter of the alphabet"):
        meshes.axis_size("BQ")
    with meshes.use(meshes.make(MeshConfig(tensor=2)), DEFAULT), pytest.raises(LayoutError, match="'Q' is no letter"):
        meshes.axis_size("Q")


def test_a_mesh_with_an_axis_that_no_rules_can_name_is_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensors"))
    with pytest.raises(LayoutError, match="(?s)'tensors', which no rules can name.*data 2 x tensors 4.*mean 'tensor'"):
        with meshes.use(mesh, DEFAULT):
            pass
    for call in (
        lambda: meshes.shardings(mesh, DEFAULT.params, {"up": "DF"}),
        lambda: meshes.check(mesh, DEFAULT.acts, "BF", (8, 8), "x"),
        lambda: meshes.local_rows(mesh, DEFAULT, 8),
    ):
        with pytest.raises(LayoutError, match="'tensors', which no rules can name"):
            call()
    assert meshes.sharding(mesh, "", DEFAULT.params).spec == P()
    idle = jax.sharding.Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "mine"))
    with meshes.use(idle, DEFAULT):
        assert meshes.axis_size("B") == 8


def test_a_mesh_of_explicit_axes_is_refused_and_the_offered_fix_works():
    shape, names = (2, 4), ("data", "tensor")
    with pytest.raises(LayoutError, match="(?s)not Auto.*data Explicit, tensor Explicit") as error:
        with meshes.use(jax.make_mesh(shape, names), DEFAULT):
            pass
    types = eval(error.value.fix.removeprefix("axis_types=").removesuffix(" where the mesh is made"))
    with meshes.use(jax.make_mesh(shape, names, axis_types=types), DEFAULT):
        out = jax.jit(lambda x: meshes.constrain(x, "BF"))(jnp.ones((8, 8)))
    assert out.sharding.shard_shape(out.shape) == (4, 2)


def test_rules_work_on_an_abstract_mesh():
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
    assert meshes.sharding(mesh, "DF", DEFAULT.params).shard_shape((8, 8)) == (2, 4)


@pytest.mark.parametrize(
    ("letters", "shape", "said"),
    [
        ("DF", (6, 8), r"up_DF 'DF': D \(model\) = 6 does not divide into 4 shards"),
        ("DF", (8, 7), r"F \(ffn\) = 7 does not divide into 2 shards"),
        ("DF", (8, 8, 8), r"has 3 dims"),
        ("FN", (8, 8), r"F and N are both on mesh axis 'tensor'"),
        ("DD", (8, 8), r"D and D are both on mesh axis"),
        ("Df", (8, 8), r"'f' is no letter"),
    ],
)
def test_an_array_that_cannot_be_laid_out_is_refused_by_name(letters, shape, said):
    mesh = meshes.make(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(LayoutError, match=said):
        meshes.check(mesh, DEFAULT.params, letters, shape, "up_DF")


def test_constrain_refuses_what_check_refuses():
    with meshes.use(meshes.make(MeshConfig(tensor=2)), DEFAULT):
        for letters, shape in (("BF", (3, 8)), ("BF", (8, 7)), ("BE", (8, 8)), ("BS", (8,)), ("BQ", (8, 8))):
            with pytest.raises(LayoutError):
                jax.eval_shape(partial(meshes.constrain, letters=letters), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "sizes",
    [{}, dict(data=4, tensor=8), dict(tensor=16), dict(context=16), dict(context=4, tensor=4), dict(stage=2, expert=4)],
)
def test_local_rows_are_those_that_the_processes_devices_hold(pod, name, sizes):
    """Against jax's own index map of the whole batch; together the processes provide every row."""
    mesh, rules, num_rows = meshes.make(MeshConfig(**sizes), pod(4, 8)), PRESETS[name], 64
    batch = NamedSharding(mesh, meshes.spec("BS", rules.acts))
    held = {process: set() for process in range(4)}
    for device, index in batch.devices_indices_map((num_rows, 32)).items():
        held[device.process_index] |= set(range(num_rows)[index[0]])
    for process, want in held.items():
        rows = meshes.local_rows(mesh, rules, num_rows, process_index=process)
        assert rows.tolist() == sorted(want)
    assert set.union(*held.values()) == set(range(num_rows))


def test_what_is_no_number_of_rows_is_refused_and_leaves_the_next_call_alone():
    mesh = meshes.make(MeshConfig())
    for num_rows in (-8, 40.0, "8", None):  # no other test has 40 rows: jax keeps what it has found of a shape
        with pytest.raises(LayoutError, match=f"num_rows = {num_rows!r} is no number of rows"):
            meshes.local_rows(mesh, DEFAULT, num_rows)
    assert meshes.local_rows(mesh, DEFAULT, 40).tolist() == meshes.local_rows(mesh, DEFAULT, np.int64(40)).tolist()
    assert meshes.local_rows(mesh, DEFAULT, 0).tolist() == []


def test_processes_share_rows_where_tensor_crosses_them_and_not_otherwise(pod):
    def rows(**sizes):
        mesh = meshes.make(MeshConfig(**sizes), pod(4, 8))
        return [meshes.local_rows(mesh, DEFAULT, 32, process_index=process).tolist() for process in range(4)]

    assert rows() == [list(range(8 * p, 8 * p + 8)) for p in range(4)]
    assert rows(tensor=16) == [list(range(16))] * 2 + [list(range(16, 32))] * 2
    assert rows(context=32) == [list(range(32))] * 4


def test_a_process_may_hold_rows_that_are_not_neighbours(pod):
    rules = Rules(params={}, acts={"B": ("fsdp", "data")})  # against the order of the mesh
    mesh = meshes.make(MeshConfig(data=4, fsdp=8), pod(4, 8))
    assert meshes.local_rows(mesh, rules, 32, process_index=1).tolist() == list(range(1, 32, 4))


@pytest.mark.parametrize("sizes", [dict(), dict(tensor=8), dict(context=8), dict(data=2, context=2, tensor=2)])
def test_a_batch_made_global_holds_every_value_in_its_place(sizes):
    mesh = meshes.make(MeshConfig(**sizes))
    host = {"tokens": np.arange(8 * 16, dtype=np.int32).reshape(8, 16), "weights": np.ones((8, 16), np.float32)}
    batch = meshes.globalize(host, mesh, DEFAULT, 8)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, host[name])
        assert array.dtype == host[name].dtype
        assert array.sharding == meshes.sharding(mesh, "BS", DEFAULT.acts)


def test_a_batch_of_the_wrong_size_is_refused():
    mesh = meshes.make(MeshConfig(context=2, fsdp=4))
    for rows, num_rows, length in ((4, 8, 16), (6, 6, 16), (8, 8, 15)):
        with pytest.raises(LayoutError):
            meshes.globalize(np.zeros((rows, length)), mesh, DEFAULT, num_rows)


@pytest.mark.parametrize("letters", ["SB", "_S", ""])
def test_a_batch_whose_first_letter_is_not_its_rows_is_refused(letters):
    with pytest.raises(LayoutError, match="does not begin with its rows"):
        meshes.globalize(np.zeros((8, 8)), meshes.make(MeshConfig(context=2)), DEFAULT, 8, letters)


@pytest.mark.parametrize(
    ("tree", "said"),
    [(np.float32(3), "holds 3.0, which has no rows"), ({"x": [[1, 2]] * 8}, "(?s)holds 1, which.*np.asarray for a list")],
)
def test_a_leaf_of_a_batch_that_has_no_rows_is_refused(tree, said):
    with pytest.raises(LayoutError, match=said):
        meshes.globalize(tree, meshes.make(MeshConfig()), DEFAULT, 8)


@pytest.mark.parametrize(("given", "made"), [("float64", "float32"), ("int64", "int32"), ("bool", "bool")])
def test_a_batch_made_global_has_the_dtypes_that_jax_has(given, made):
    batch = meshes.globalize(np.ones((8, 8), given), meshes.make(MeshConfig()), DEFAULT, 8)
    assert batch.dtype == made
