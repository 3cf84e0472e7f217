"""The reader of compiled programs, on programs whose collectives are written down, and on every form of replica groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import meshes
from jaxtrain.observe.hlo import Traffic, collectives, traffic

MESH = dict(data=2, fsdp=2, tensor=2)


def _mesh(**sizes):
    return meshes.make(meshes.MeshConfig(**({"fsdp": 1} | (sizes or MESH))))


def _compiled(f, mesh, spec, *shapes):
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(run).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_kinds_axes_bytes_and_loops_of_a_program_written_by_hand():
    mesh = _mesh()

    def f(x):
        def body(x, _):
            x = x + lax.psum(x, "tensor")
            return lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), None

        x, _ = lax.scan(body, x, None, length=5)
        return x + lax.all_gather(x, ("data", "fsdp")).sum(0) + lax.all_to_all(x, "data", 0, 0, tiled=True)

    found = traffic(collectives(_compiled(f, mesh, P(), (4, 16)), mesh))
    one = 4 * 16 * 4
    assert found == {
        ("all-gather", "data x fsdp"): Traffic(1, 4 * one),
        ("all-reduce", "tensor"): Traffic(5, 5 * one),
        ("all-to-all", "data"): Traffic(1, one),
        ("collective-permute", "fsdp"): Traffic(5, 5 * one),
    }


def test_a_collective_under_a_condition_is_marked():
    mesh = _mesh()

    def f(x):
        return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "tensor"), lambda x: x * lax.psum(1.0, "tensor"), x)

    found = collectives(_compiled(f, mesh, P(), (2, 2)), mesh)
    assert found and all(one.branch for one in found)


def _entry(line):
    return f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n"


GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": ("tensor",),
    "{{0,2},{1,3},{4,6},{5,7}}": ("fsdp",),
    "{}": ("data", "fsdp", "tensor"),
    "[2,4]<=[8]": ("fsdp", "tensor"),
    "[2,4]<=[4,2]T(1,0)": ("data", "fsdp"),
    "[4,2]<=[2,4]T(1,0)": ("data",),
    "mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_1'}": ("tensor",),
    "mesh['a'=2,'b'=2,'c'=2] {'a','c'}": ("data", "tensor"),
    "mesh['a'=8] {'a':(2)2}": ("fsdp",),
    "mesh['a'=8] {'a':(1)4}": ("data", "fsdp"),
    "mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}": ("fsdp",),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_every_form_of_replica_groups_is_read(groups):
    text = _entry(f"%r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert [one.axes for one in collectives(text, _mesh())] == [GROUPS[groups]]


STARTED = {
    "%r = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}": 32,
    "%r = ((f32[4]{0}, bf16[2]{0}), (f32[8]{0}, bf16[4]{0})) all-gather-start(%p, %q), replica_groups=[4,2]<=[8]": 40,
    "%r = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}": 16,
    "%r = (f32[8]{0}, f32[2,3]{1,0}) all-reduce-start(%p, %q), replica_groups=[4,2]<=[8], to_apply=%add": 56,
    "%r = f8e4m3fn[4]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add": 8,
}


@pytest.mark.parametrize("line", STARTED)
def test_the_bytes_of_a_started_or_combined_collective_are_those_of_its_results(line):
    (one,) = collectives(_entry(line), _mesh())
    assert (one.axes, one.bytes) == (("tensor",), STARTED[line])


def test_what_a_device_sends_is_that_of_a_ring():
    sent = {"all-reduce": 2 * 64 * 3 / 4, "all-gather": 64 * 3 / 4, "reduce-scatter": 4 * 64 * 3 / 4}
    for kind, num_bytes in sent.items():
        (one,) = collectives(_entry(f"%r = f32[16]{{0}} {kind}(%p), replica_groups=[2,4]<=[8], dimensions={{0}}"), _mesh())
        assert (one.group, one.wire_bytes) == (4, num_bytes)


def test_what_is_not_understood_is_an_error_and_never_a_collective_less():
    mesh = _mesh()
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("module @jit_f {}", mesh)
    with pytest.raises(ValueError, match="unknown form"):
        collectives(_entry("%r = f32[8] all-reduce(%p), replica_groups=<<0>>, to_apply=%add"), mesh)
    with pytest.raises(ValueError, match="trip count"):
        loop = "}\n\nENTRY %e (p: f32[8]) -> f32[8] {\n  %w = f32[8] while(%p), condition=%c, body=%main\n}\n"
        body = _entry("%r = f32[8] all-reduce(%p), replica_groups={}, to_apply=%add").replace("ENTRY ", "")
        collectives(body.rstrip("}\n") + "\n" + loop, mesh)


def test_a_partitioned_step_reads_as_what_its_layout_needs():
    """x W with W stored in parts over fsdp and computed whole: one gather forward; its gradient is reduced over the batch."""
    mesh = _mesh(fsdp=8)
    x, w = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32)
    rows, whole = (meshes.sharding(mesh, letters, {"B": "fsdp", "D": "fsdp"}) for letters in ("B_", "D_"))

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ lax.with_sharding_constraint(w, meshes.sharding(mesh, "__", {}))) ** 2)

    program = jax.jit(jax.grad(loss), in_shardings=(whole, rows), out_shardings=whole).lower(w, x).compile().as_text()
    found = traffic(collectives(program, mesh))
    assert found.pop(("all-gather", "fsdp")) == Traffic(1, 32 * 64 * 4)
    ((kind, axes), reduced), = found.items()
    assert kind in ("all-reduce", "reduce-scatter") and axes == "fsdp" and reduced == Traffic(1, 32 * 64 * 4)
    assert np.prod(mesh.devices.shape) == 8
