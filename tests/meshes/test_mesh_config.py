"""Sizes, device order, refusals and drawings of meshes, on pretend GPUs and on eight CPU devices."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import jax
import numpy as np
import pytest

import meshes
from meshes import AXES, LayoutError, MeshConfig
from meshes.mesh import domain_grid, domains_per_line


def test_the_config_has_the_axes_of_the_alphabet_in_its_order():
    assert [field.name for field in dataclasses.fields(MeshConfig)] == list(AXES)


def test_the_axis_at_minus_one_takes_what_the_others_leave():
    assert MeshConfig(data=2, tensor=4).sizes(64) == dict.fromkeys(AXES, 1) | {"data": 2, "tensor": 4, "fsdp": 8}
    assert MeshConfig(data=-1, fsdp=4).sizes(8)["data"] == 2
    assert MeshConfig().sizes(1) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeshConfig(data=2, fsdp=6, tensor=4), ["data 2 x fsdp 6 x tensor 4 = 48", "cannot fill 64"]),
        (MeshConfig(fsdp=16), ["cannot fill 64 devices", "mesh.fsdp = 64"]),
        (MeshConfig(tensor=5), ["tensor 5 = 5", "must divide", "mesh.tensor = 4"]),
        (MeshConfig(tensor=128), ["mesh.tensor = 64"]),
        (MeshConfig(data=3, tensor=3), ["mesh.data = 2 and mesh.tensor = 2"]),
        (MeshConfig(data=3, fsdp=5, tensor=3), ["mesh.data = 2 and mesh.fsdp = -1 and mesh.tensor = 2"]),
    ],
)
def test_sizes_that_do_not_fill_are_refused_with_what_would_fit(config, said):
    with pytest.raises(LayoutError) as error:
        config.sizes(64)
    assert all(text in str(error.value) for text in said)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (dict(data=-1), "mesh.data and mesh.fsdp are all -1.*fix   mesh.data = 1 or mesh.fsdp = 1"),
        (dict(tensor=0), "mesh.tensor = 0 is no size"),
        (dict(tensor=-2), "mesh.tensor = -2 is no size"),
        (dict(tensor="2"), "mesh.tensor = '2' is no size.*a whole number"),
        (dict(fsdp=2.0), "mesh.fsdp = 2.0 is no size"),
        (dict(tensor=True), "mesh.tensor = True is no size"),
    ],
)
def test_what_fits_no_number_of_devices_is_refused_when_it_is_written(sizes, said):
    with pytest.raises(LayoutError, match=f"(?s){said}"):
        MeshConfig(**sizes)


def _changes(error):
    """What a fix offers: of each alternative the axes with their new sizes."""
    alternatives = [fix.split(" and ") for fix in error.fix.split(" or ")]
    return [{axis: int(size) for axis, size in (change.removeprefix("mesh.").split(" = ") for change in fix)} for fix in alternatives]


def test_every_fix_that_is_offered_for_sizes_works():
    fixes = 0
    few, many = (-1, 1, 2, 3, 6), (1, 2, 3, 4, 6)
    for data, fsdp, tensor, num_devices in itertools.product(many, few, many, (1, 4, 6, 8, 12, 64)):
        config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        try:
            config.sizes(num_devices)
        except LayoutError as error:
            for change in _changes(error):
                assert math.prod(dataclasses.replace(config, **change).sizes(num_devices).values()) == num_devices
                fixes += 1
    assert fixes > 500


def test_a_mesh_has_all_axes_and_is_auto_on_the_devices_that_are_there():
    mesh = meshes.make(MeshConfig(data=2, tensor=2))
    assert mesh.axis_names == tuple(AXES) and mesh.devices.shape == (1, 2, 1, 2, 1, 1, 2)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert list(mesh.devices.flat) == jax.devices()


def test_a_mesh_of_no_devices_is_refused():
    with pytest.raises(LayoutError, match="(?s)a mesh has no devices.*got   0 devices"):
        meshes.make(MeshConfig(), [])


def test_device_order_does_not_depend_on_the_order_given(pod):
    devices = pod(4, 8)
    shuffled = random.Random(0).sample(devices, len(devices))
    assert list(meshes.make(MeshConfig(tensor=8), shuffled).devices.flat) == devices


def test_inner_axes_stay_inside_a_host_and_outer_axes_cross(pod):
    mesh = meshes.make(MeshConfig(replica=2, data=2, tensor=4, context=2), pod(8, 8))
    reach = dict(zip(AXES, (domains_per_line(domain_grid(mesh), dim) for dim in range(len(AXES))), strict=True))
    assert reach == dict(replica=2, data=2, stage=1, fsdp=2, expert=1, context=1, tensor=1)
    assert {d.process_index for d in mesh.devices[0, 0, 0, 0, 0].flat} == {0}


def test_one_process_per_gpu_gives_the_same_mesh_as_one_per_host(pod):
    config = MeshConfig(tensor=8)
    whole, split = (meshes.make(config, pod(4, 8, processes_per_host=n)) for n in (1, 8))
    assert [d.id for d in whole.devices.flat] == [d.id for d in split.devices.flat]
    assert (domain_grid(whole) == domain_grid(split)).all()


@pytest.mark.parametrize(
    ("sizes", "axis", "fix"),
    [
        (dict(tensor=3), "tensor", "1 or 2 or 4 or 8"),
        (dict(tensor=12), "tensor", "1 or 2 or 4 or 8"),
        (dict(tensor=2, context=3), "context", "1 or 2 or 4"),
        (dict(expert=6), "expert", "1 or 2 or 4 or 8"),
        (dict(data=4, tensor=3), "tensor", "1 or 2"),  # 4 x 4 and 4 x 8 do not divide 24
        (dict(tensor=8, context=1, expert=3, fsdp=1), None, None),  # three whole hosts
        (dict(tensor=8, fsdp=3), None, None),
        (dict(data=4, fsdp=6), None, None),  # outer axes may be uneven
        (dict(tensor=24), None, None),  # equal parts of three hosts
    ],
)
def test_an_inner_axis_that_straddles_hosts_unevenly_is_refused(pod, sizes, axis, fix):
    devices = pod(3, 8)
    if axis is None:
        assert meshes.make(MeshConfig(**sizes), devices).size == 24
        return
    with pytest.raises(LayoutError, match=rf"mesh.{axis} = {sizes[axis]} would straddle hosts unevenly") as error:
        meshes.make(MeshConfig(**sizes), devices)
    assert error.value.fix == f"mesh.{axis} = {fix}"


def test_every_fix_that_is_offered_for_an_uneven_axis_works(pod):
    fixes, devices = 0, pod(3, 8)
    for data, fsdp, context, tensor in itertools.product((1, 2, 3, 4), (-1, 1, 2), (1, 2, 3, 4), (2, 3, 4, 6, 12)):
        sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
        try:
            meshes.make(MeshConfig(**sizes), devices)
        except LayoutError as error:
            if "straddle" in str(error) and error.fix.startswith("mesh."):
                axis, fits = error.fix.removeprefix("mesh.").split(" = ")
                for size in fits.split(" or "):
                    assert meshes.make(MeshConfig(**sizes | {axis: int(size)}), devices).size == 24
                    fixes += 1
    assert fixes > 20


def test_where_no_size_of_an_uneven_axis_alone_helps_the_rule_for_all_inner_ones_is_offered(pod):
    for sizes in (dict(data=8, fsdp=1, tensor=3), dict(context=2, tensor=3)):
        with pytest.raises(LayoutError, match="straddle") as error:
            meshes.make(MeshConfig(**sizes), pod(3, 8))
        assert error.value.fix == "expert x context x tensor that divides 8, and one axis at -1 for the rest"
    for context, tensor in ((2, 2), (2, 4), (8, 1)):
        meshes.make(MeshConfig(context=context, tensor=tensor), pod(3, 8))


def test_an_odd_inner_axis_is_fine_inside_one_host_or_one_nvlink_domain(pod):
    assert meshes.make(MeshConfig(tensor=3), pod(1, 6)).shape["fsdp"] == 2
    assert meshes.make(MeshConfig(tensor=3), pod(9, 4, "NVIDIA GB200", hosts_per_slice=9)).shape["fsdp"] == 12


def test_an_inner_axis_over_hosts_of_unequal_size_is_refused(pod):
    devices = [d for d in pod(2, 8) if d.id not in (6, 7, 14, 15)]  # 6 + 6
    assert meshes.make(MeshConfig(tensor=6), devices).shape["fsdp"] == 2
    uneven = [d for d in pod(2, 8) if d.id not in (0, 8, 9, 10)]  # 7 + 5
    for given, fix in ((devices, "mesh.tensor = 1 or 2 or 3 or 6"), (uneven, "mesh.tensor = 1")):
        with pytest.raises(LayoutError, match="tensor = 4") as error:
            meshes.make(MeshConfig(tensor=4), given)
        assert error.value.fix == fix


def test_lines_are_counted_like_a_plain_loop_counts_them():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        grid = rng.integers(0, 2, (2, 2, 4)) if rng.random() < 0.5 else np.sort(rng.integers(0, 3, 16)).reshape(2, 2, 4)
        for dim in range(3):
            lines = [tuple(line) for line in np.moveaxis(grid, dim, -1).reshape(-1, grid.shape[dim])]
            shares = {(len(set(line)), tuple({line.count(value) for value in line})) for line in lines}
            want = next(iter(shares))[0] if len(shares) == 1 and len(next(iter(shares))[1]) == 1 else None
            assert domains_per_line(grid, dim) == want
            seen.add(want)
    assert seen >= {None, 1, 2}


def test_a_drawing_of_eight_devices():
    assert meshes.describe(meshes.make(MeshConfig(data=2, tensor=2))).splitlines() == [
        "8 x cpu: 1 host of 8",
        "data        2  within one host",
        "fsdp        2  within one host",
        "tensor      2  within one host",
        "host 0    data 0-1 fsdp 0-1 tensor 0-1",
    ]
    one = meshes.make(MeshConfig(), jax.devices()[:1])
    assert meshes.describe(one).splitlines() == ["1 x cpu: 1 host of 1", "host 0"]


def test_a_drawing_of_1024_devices_stays_on_one_screen(pod):
    text = meshes.describe(meshes.make(MeshConfig(data=2, context=2, tensor=2), pod(128, 8)))
    assert text.splitlines() == [
        "1024 x NVIDIA H100 80GB HBM3: 128 hosts of 8",
        "data        2  across hosts",
        "fsdp      128  2 within one host x 64 across",
        "context     2  within one host",
        "tensor      2  within one host",
        "host 0    data 0 fsdp 0-1 context 0-1 tensor 0-1",
        "host 1    data 0 fsdp 2-3 context 0-1 tensor 0-1",
        "host 2    data 0 fsdp 4-5 context 0-1 tensor 0-1",
        "... 124 more in the same order",
        "host 127  data 1 fsdp 126-127 context 0-1 tensor 0-1",
    ]


def test_a_drawing_says_where_uneven_outer_axes_begin_and_end(pod):
    text = meshes.describe(meshes.make(MeshConfig(data=4, fsdp=6), pod(3, 8)))
    assert "fsdp        6  unevenly over hosts" in text
    assert "host 1    data 1 fsdp 2 to data 2 fsdp 3" in text


def test_a_drawing_counts_nvlink_domains_where_they_span_hosts(pod):
    text = meshes.describe(meshes.make(MeshConfig(data=2, tensor=8), pod(32, 4, "NVIDIA GB200", hosts_per_slice=16)))
    assert text.splitlines()[:2] == [
        "128 x NVIDIA GB200: 32 hosts of 4, 2 NVLink domains of 64",
        "data        2  across NVLink domains",
    ]
