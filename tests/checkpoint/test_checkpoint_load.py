"""Restoring: onto other meshes, whole or in part; what differs is shown, what is damaged is named and never restored."""

import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import meshes
from jaxtrain.checkpoint import digest, load, manifest, restore, storage
from jaxtrain.checkpoint.names import named
from jaxtrain.checkpoint.verify import damage
from jaxtrain.errors import CheckpointError
from tests.checkpoint.states import FSDP_4X2, abstract, make_state, placed

LAYOUTS = {
    "one device": dict(config=None, rules=None),
    "fsdp 8": dict(config=meshes.MeshConfig(), rules=meshes.FSDP),
    "fsdp 2 x tensor 4": dict(config=meshes.MeshConfig(tensor=4), rules=meshes.FSDP_TP),
    "data 8": dict(config=meshes.MeshConfig(data=8, fsdp=1), rules=meshes.DP),
    "data 2 x fsdp 4": dict(config=meshes.MeshConfig(data=2), rules=meshes.HSDP),
}


def assert_equal(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_restores_onto_any_mesh_by_its_letters(saved, folder, layout):
    saved(3)
    config, rules = LAYOUTS[layout].values()
    mesh = config and meshes.make(config)
    restored = named(restore(folder.parent, mesh=mesh, rules=rules))
    expected = named(make_state(3) if mesh is None else placed(make_state(3), config, rules))
    assert_equal(restored, expected)
    assert {n: x.sharding for n, x in restored.items()} == {n: x.sharding for n, x in expected.items()}


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:3])
def test_a_state_restores_into_shapes_with_other_shardings(saved, folder, layout):
    saved(3)
    wanted = placed(make_state(0), **LAYOUTS[layout])
    restored = restore(folder, abstract(wanted))
    assert jax.tree.structure(restored) == jax.tree.structure(wanted) and digest(restored) == digest(make_state(3))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)


def test_a_state_saved_on_one_device_restores_onto_eight(opened):
    checkpoints = opened()
    checkpoints.save(1, make_state(1), config={}, data={})
    restored, _ = checkpoints.latest(abstract(placed(make_state(0), **FSDP_4X2)))
    assert_equal(restored, make_state(1))


def test_without_arguments_the_state_is_nested_dicts_on_one_device(saved, folder):
    saved(3)
    restored, state = restore(folder.parent), make_state(3)
    assert set(restored) == {"step", "params", "opt"} and int(restored["step"]) == 3
    assert_equal(restored["params"], state.params)
    assert_equal(restored["opt"]["0"]["1"]["0"]["mu"], state.opt[0][1][0].mu)
    assert {x.sharding for x in jax.tree.leaves(restored)} == {SingleDeviceSharding(jax.devices()[0])}


def test_parameters_alone_restore_into_a_whole_state_or_their_branch_or_nothing(saved, folder):
    saved(3)
    whole = abstract(placed(make_state(0), **LAYOUTS["fsdp 8"]))
    for given in (whole, whole.params, {"params": whole.params}, None):
        assert_equal(restore(folder.parent, given, only="params"), make_state(3).params)


def test_a_state_without_letters_is_replicated_over_a_mesh(opened, folder):
    checkpoints = opened()
    checkpoints.save(1, {"x": jnp.arange(16.0)}, config={}, data={})
    checkpoints.wait()
    restored = restore(folder, mesh=meshes.make(meshes.MeshConfig()), rules=meshes.FSDP)
    assert restored["x"].is_fully_replicated and len(restored["x"].sharding.device_set) == 8


def test_letters_that_do_not_divide_on_the_new_mesh_are_a_layout_error(saved, folder):
    saved(1)
    rules = meshes.Rules(params={"L": "fsdp"}, acts={})
    with pytest.raises(meshes.LayoutError, match="params/blocks/q"):
        restore(folder, mesh=meshes.make(meshes.MeshConfig()), rules=rules)


def test_a_checkpoint_is_found_by_run_folder_step_or_its_own_folder(saved, folder, monkeypatch):
    saved(1, 2)
    monkeypatch.chdir(folder.parent.parent)
    folder = folder.relative_to(folder.parent.parent)
    where = [folder.parent, f"{folder.parent}@1", folder, f"{folder}@1", folder / "1"]
    assert [int(restore(path)["step"]) for path in where] == [2, 1, 2, 1, 1]


def test_a_checkpoint_that_is_not_there_is_an_error_that_lists_the_steps(saved, folder):
    saved(1, 2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 9(.|\n)*steps 1, 2"):
        restore(f"{folder.parent}@9")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        restore(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="no branch 'parms'(.|\n)*did you mean 'params'"):
        restore(folder, only="parms")


def test_a_state_of_another_tree_shape_or_dtype_is_refused_with_a_table(saved):
    checkpoints = saved(3)
    wanted = abstract(make_state())
    params = {**wanted.params, "embed": jax.ShapeDtypeStruct((16, 9), "float32"), "mask": jax.ShapeDtypeStruct((5,), "int32")}
    params["extra"] = params["blocks"].pop("up")
    with pytest.raises(CheckpointError) as error:
        checkpoints.latest(type(wanted)(step=wanted.step, params=params, opt=wanted.opt))
    assert [line.split() for line in error.value.got.splitlines()] == [
        ["array", "checkpoint", "wanted"],
        ["params/blocks/up", "bfloat16[2,", "8,", "16]", "-"],
        ["params/embed", "float32[16,", "8]", "float32[16,", "9]"],
        ["params/extra", "-", "bfloat16[2,", "8,", "16]"],
        ["params/mask", "uint32[5]", "int32[5]"],
    ]


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_one_flipped_byte_in_any_file_is_named_and_the_checkpoint_before_is_used(opened, folder, capsys):
    sharding = meshes.sharding(meshes.make(meshes.MeshConfig()), "D_", meshes.FSDP.params)
    checkpoints, state = opened(), {"w": jax.device_put(jax.random.normal(jax.random.key(0), (8, 6)), sharding), "n": jnp.int32(5)}
    for step in (1, 2):
        checkpoints.save(step, state, config={}, data={})
        checkpoints.wait()
    paths = files_of(folder / "2")
    assert len(paths) > 6
    for path in paths:
        whole, name = path.read_bytes(), path.relative_to(folder / "2").as_posix()
        for position in {0, len(whole) // 2, len(whole) - 1}:
            flip(path, position)
            assert any(name in line for line in damage(folder / "2")), (name, position)
            restored, found = checkpoints.latest(state)
            assert found.step == 1 and digest(restored) == digest(state)
            said = capsys.readouterr().err
            assert "skipped the checkpoint of step 2" in said and name in said
            path.write_bytes(whole)
    assert damage(folder / "2") == [] and checkpoints.latest(state)[1].step == 2


def test_a_flipped_byte_of_an_array_is_found_by_its_content_and_the_array_is_named(opened, folder, monkeypatch, capsys):
    monkeypatch.setattr(load, "_SMALL_BYTES", 0)  # as for large files, whose bytes only verify reads
    checkpoints, names = opened(), ("first", "second")
    state = {name: jax.random.normal(jax.random.key(i), (64, 64)) for i, name in enumerate(names)}
    for step in (1, 2):
        checkpoints.save(step, state, config={}, data={})
        checkpoints.wait()
    for name in names:
        needle = np.asarray(state[name])[10].tobytes()
        path = next(path for path in files_of(folder / "2") if needle in path.read_bytes())
        whole = path.read_bytes()
        flip(path, whole.index(needle) + 5)
        lines = damage(folder / "2")
        assert [line.split()[:2] for line in lines] == [["file", path.relative_to(folder / "2").as_posix()], ["array", name]]
        assert checkpoints.latest(state)[1].step == 1
        assert f"{name} does not have the content that was saved" in capsys.readouterr().err
        path.write_bytes(whole)


@pytest.mark.parametrize("harm", ["cut", "lost", "grown"])
def test_a_file_of_another_length_is_named(saved, folder, harm):
    saved(1)
    path = max(files_of(folder / "1"), key=lambda p: p.stat().st_size * (p.name != "manifest.json"))
    {"cut": lambda: path.write_bytes(path.read_bytes()[:-1]), "lost": path.unlink, "grown": lambda: path.write_bytes(path.read_bytes() + b"0")}[harm]()
    assert any(path.name in line and ("bytes" in line or "missing" in line) for line in damage(folder / "1"))
    with pytest.raises(manifest.DamagedError, match=path.name):
        restore(folder)


def test_a_checkpoint_under_another_number_is_damaged_and_the_newest_of_its_own_is_used(saved, folder, capsys):
    checkpoints, state = saved(1, 2), abstract(placed(make_state(), **FSDP_4X2))
    for number in ("3", "400"):
        shutil.copytree(folder / "1", folder / number)
    assert damage(folder / "400") == ["file   its state is of step 1"]
    assert checkpoints.latest(state)[1].step == 2
    said = capsys.readouterr().err
    assert all(f"skipped the checkpoint of step {number}" in said for number in (3, 400)) and "its state is of step 1" in said
    assert checkpoints.newest() == 2
    checkpoints.save(3, placed(make_state(3), **FSDP_4X2), config={}, data={})
    checkpoints.wait()
    assert checkpoints.latest(state)[1].step == 3
    shutil.copytree(folder / "1", folder / "best")
    assert damage(folder / "best") == []


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(saved, folder):
    checkpoints = saved(1, 2)
    for step in (1, 2):
        flip(folder / str(step) / "manifest.json", 100)
    with pytest.raises(CheckpointError, match="none of the checkpoints(.|\n)*never starts over by itself"):
        checkpoints.latest(abstract(make_state()))


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_newest(saved, folder):
    checkpoints = saved(1, 2, keep_last=2)
    flip(folder / "2" / "manifest.json", 100)
    checkpoints.latest(abstract(make_state()))
    assert checkpoints.newest() == 1
    checkpoints.save(3, make_state(3), config={}, data={})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.newest() == 3


def test_a_device_without_memory_is_not_called_damage(saved, folder, monkeypatch):
    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    saved(1)
    monkeypatch.setattr(storage, "read", exhausted)
    with pytest.raises(jax.errors.JaxRuntimeError):
        restore(folder)


def test_arrays_are_read_in_batches_of_bounded_size(monkeypatch):
    monkeypatch.setattr(storage, "_BATCH_BYTES", 100)
    sharding = SingleDeviceSharding(jax.devices()[0])
    shapes = {str(i): jax.ShapeDtypeStruct((n,), "float32", sharding=sharding) for i, n in enumerate([10, 10, 10, 100, 1])}
    batches = [list(batch) for batch in storage._batches(shapes)]
    assert batches == [["0", "1"], ["2"], ["3"], ["4"]]


def test_nothing_is_unpickled(saved, monkeypatch):
    checkpoints = saved(1)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert checkpoints.latest(abstract(make_state()))[1].step == 1
