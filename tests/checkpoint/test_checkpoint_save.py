"""Saving: what is kept, what a manifest says, what the next step may do, and how a save fails."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.checkpoint.states import FSDP_4X2, abstract, letters, make_state, placed

import meshes
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, digest, manifest, save, storage
from jaxtrain.checkpoint.names import named
from jaxtrain.checkpoint.policy import expired
from jaxtrain.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
NOTE = dict(config={}, data={})


def test_the_newest_state_comes_back_bit_for_bit_with_its_tree_and_shardings(saved):
    checkpoints = saved(1, 2)
    state = placed(make_state(2), **FSDP_4X2)
    restored, found = checkpoints.latest(abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)
    assert digest(restored) == digest(state) == found.digest and found.step == 2


def test_there_is_no_latest_where_nothing_was_saved(opened):
    checkpoints = opened()
    assert checkpoints.latest(abstract(make_state())) is None and checkpoints.newest() is None


def test_the_manifest_says_what_is_in_the_checkpoint(saved, folder):
    saved(7)
    found = manifest.read(folder / "7")
    assert (found.step, found.config, found.data, found.processes) == (7, {"batch": 8}, {"examples": 56}, 1)
    assert {axis: size for axis, size in found.mesh.items() if size > 1} == {"fsdp": 4, "tensor": 2}
    q = found.arrays["params/blocks/q"]
    assert (q.shape, q.dtype, q.letters, q.spec) == ((2, 8, 4, 2), "float32", "LDNH", [None, "fsdp", "tensor", None])
    assert {name: entry.letters for name, entry in found.arrays.items()} == named(letters())


def test_names_hold_no_class_of_the_optimizer(saved, folder):
    saved(1)
    names = set(manifest.read(folder / "1").arrays)
    assert {"step", "params/embed", "opt/0/1/0/count", "opt/0/1/0/mu/blocks/q", "opt/0/1/0/nu/blocks/q", "opt/1/seen"} <= names


def test_every_file_is_in_the_manifest_but_the_manifest(saved, folder):
    saved(1)
    files = {p.relative_to(folder / "1").as_posix() for p in (folder / "1").rglob("*") if p.is_file()}
    assert files - {"manifest.json"} == set(manifest.read(folder / "1").files) and len(files) > 5


@pytest.mark.parametrize("layout", [None, FSDP_4X2], ids=["one device", "eight devices"])
def test_a_state_donated_right_after_the_call_is_saved_as_it_was(opened, layout):
    step = jax.jit(lambda s: jax.tree.map(lambda x: jnp.bitwise_not(x) if x.dtype != jnp.bool_ else ~x, s), donate_argnums=0)
    bits = {"a": jnp.arange(1 << 16, dtype=jnp.uint32).reshape(256, 256), "b": jnp.array([True, False])}
    if layout is not None:
        bits = jax.tree.map(lambda x: jax.device_put(x, placed(make_state(), **layout).step.sharding), bits)
    expected, checkpoints = digest(bits), opened()
    for number in range(3):  # the second and third save reuse the first one's memory
        checkpoints.save(number, bits, **NOTE)
        bits = step(bits)
        bits = step(bits)
    checkpoints.wait()
    assert {manifest.read(checkpoints.directory / str(n)).digest for n in range(3)} == {expected}
    assert digest(checkpoints.latest(abstract(bits))[0]) == expected


def test_the_step_after_a_save_gets_the_buffers_that_it_was_donated(opened, monkeypatch):
    release = threading.Event()
    end = storage.end_write
    monkeypatch.setattr(storage, "end_write", lambda *args: (release.wait(30), end(*args)))
    state, checkpoints = {"x": jnp.ones((512, 512))}, opened()
    checkpoints.save(1, state, **NOTE)
    before = state["x"].unsafe_buffer_pointer()
    after = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)["x"].unsafe_buffer_pointer()
    release.set()
    assert after == before


def test_the_policy_keeps_the_newest_and_the_multiples(saved):
    checkpoints = saved(*range(2, 20, 2), keep_last=2, keep_every=6)
    assert checkpoints.steps() == [6, 12, 14, 16, 18]  # 14 goes when the next save begins
    checkpoints.close()
    assert checkpoints.steps() == [6, 12, 16, 18]


@pytest.mark.parametrize("keep_last", [1, 3])
@pytest.mark.parametrize("keep_every", [0, 4])
def test_a_step_expires_unless_it_is_new_or_a_multiple(keep_last, keep_every):
    steps = [8, 3, 5, 4, 10]
    config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        newer = sum(other > step for other in steps)
        stays = newer < keep_last or (keep_every and step % keep_every == 0)
        assert (step not in expired(steps, config)) == bool(stays)


def test_a_policy_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="keep_last = 0"):
        CheckpointConfig(keep_last=0)


def test_saving_a_step_again_replaces_it(opened):
    checkpoints = opened()
    for value in (1.0, 2.0):
        checkpoints.save(5, {"x": jnp.full(3, value)}, **NOTE)
    state, _ = checkpoints.latest({"x": jnp.zeros(3)})
    assert state["x"].tolist() == [2, 2, 2] and checkpoints.steps() == [5]


def test_a_kill_while_the_old_one_is_removed_leaves_the_new_one(folder, opened, monkeypatch):
    checkpoints = Checkpoints(folder, CheckpointConfig())
    checkpoints.save(5, {"x": jnp.zeros(3)}, **NOTE)
    checkpoints.wait()

    class Killed(BaseException):
        pass

    def killed(path, **how):
        raise Killed(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        checkpoints.save(5, {"x": jnp.ones(3)}, **NOTE)
        with pytest.raises(Killed):
            checkpoints.wait()
    state, _ = opened().latest({"x": jnp.zeros(3)})
    assert state["x"].tolist() == [1, 1, 1]


def test_an_old_one_that_cannot_be_removed_fails_no_save_and_goes_with_the_next(opened, folder, monkeypatch):
    checkpoints = opened()

    def save(step, value):
        checkpoints.save(step, {"x": jnp.full(3, value)}, **NOTE)
        checkpoints.wait()

    def refused(path):
        raise OSError(errno.EIO, "no", path)

    save(5, 0.0)
    with monkeypatch.context() as patch:
        real = os.unlink
        patch.setattr(os, "unlink", lambda path, **how: refused(path) if Path(path).name == "manifest.json" else real(path, **how))
        save(5, 1.0)
    assert checkpoints.steps() == [5] and (folder / "5.deleting").is_dir()
    save(6, 2.0)
    assert not (folder / "5.deleting").exists()


@pytest.mark.parametrize("step", [-1, 4.0, True, "5"])
def test_a_step_that_is_no_count_of_updates_is_refused(opened, step):
    with pytest.raises(CheckpointError, match="cannot be saved"):
        opened().save(step, {"x": jnp.zeros(3)}, **NOTE)


def test_numpys_and_jaxs_counts_are_steps(opened):
    checkpoints = opened()
    for step in (np.int64(3), jnp.int32(4)):
        checkpoints.save(step, {"x": jnp.zeros(3)}, **NOTE)
        checkpoints.wait()
    assert checkpoints.steps() == [3, 4]


def test_what_unfinished_saves_left_is_no_checkpoint_and_goes_at_the_next_opening(saved, folder, opened):
    saved(1)
    for name in ("2.deleting", "3.saving"):
        shutil.copytree(folder / "1", folder / name)
    assert opened().steps() == [1]
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_what_has_a_checkpoints_name_and_no_manifest_is_damaged_and_no_run_starts_over_beside_it(opened, folder, capsys):
    state = {"x": jnp.ones(3)}
    for step in (5, 7):
        checkpoints = opened()
        checkpoints.save(step, state, **NOTE)
        checkpoints.wait()
    (folder / "7" / "manifest.json").unlink()
    assert opened().latest(state)[1].step == 5
    assert "skipped the checkpoint of step 7" in (said := capsys.readouterr().err) and "manifest.json is missing" in said
    (folder / "5" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints(.|\n)*steps \[5, 7\], all damaged"):
        opened().latest(state)


def test_folders_of_other_programs_are_neither_restored_nor_removed(opened, folder):
    (folder / "7" / "default").mkdir(parents=True)
    (folder / "notes.deleting").mkdir()
    checkpoints = opened()
    for _ in range(2):
        checkpoints.save(7, {"x": jnp.zeros(3)}, **NOTE)
        checkpoints.wait()
    assert checkpoints.latest({"x": jnp.ones(3)})[1].step == 7
    assert sorted(path.name for path in folder.iterdir()) == ["7", "7.damaged.1", "notes.deleting"]
    assert (folder / "7.damaged.1" / "default").is_dir()


def test_a_copy_under_a_number_with_zeros_is_a_folder_of_somebody_elses(saved, folder, opened):
    saved(1)
    for name in ("080", "080.saving"):
        shutil.copytree(folder / "1", folder / name)
    assert opened().steps() == [1]
    assert sorted(path.name for path in folder.iterdir()) == ["080", "080.saving", "1"]


KILLED = """
import sys, threading, time
import jax, jax.numpy as jnp
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, files, manifest, storage

checkpoints = Checkpoints(sys.argv[1], CheckpointConfig())
state = {"x": jnp.arange(1 << 18, dtype=jnp.float32)}
checkpoints.save(1, state, config={}, data={})
checkpoints.wait()

def hang(*args):
    print("in the middle", flush=True)
    time.sleep(600)

place = {"write": (storage, "end_write"), "merge": (storage, "merge"), "manifest": (files, "write_durably")}[sys.argv[2]]
setattr(manifest if sys.argv[2] == "manifest" else place[0], place[1], hang)
checkpoints.save(2, {"x": state["x"] + 1}, config={}, data={})
time.sleep(600)
"""


@pytest.mark.parametrize("place", ["write", "manifest"])
def test_a_process_killed_in_the_middle_of_a_save_leaves_the_checkpoint_before(folder, opened, place):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), place], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in the middle\n"
        assert (folder / "2.saving" / "state").is_dir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    checkpoints = opened()
    state, found = checkpoints.latest({"x": jnp.zeros(1 << 18)})
    assert found.step == 1 and bool((state["x"] == jnp.arange(1 << 18)).all())
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_a_disk_without_room_is_refused_before_anything_is_written(saved, monkeypatch):
    checkpoints = saved(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    checkpoints.save(2, make_state(2), **NOTE)
    with pytest.raises(CheckpointError, match="step 2 was not saved(.|\n)*0.00 GB free(.|\n)*free space"):
        checkpoints.wait()
    assert checkpoints.steps() == [1] and not list(checkpoints.directory.glob("2*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's: its other writes outlive its loop
def test_a_write_that_the_disk_refuses_is_an_error_and_leaves_nothing(saved):
    checkpoints, limits = saved(1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # larger files are refused as on a full disk
    try:
        checkpoints.save(2, {"x": jnp.ones(1 << 18)}, **NOTE)
        with pytest.raises(CheckpointError, match="step 2 was not saved(.|\n)*File too large"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in checkpoints.directory.iterdir()] == ["1"]
    checkpoints.save(3, make_state(3), **NOTE)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


@pytest.mark.parametrize("call", ["save", "wait", "check", "latest", "close"])
def test_a_failure_in_the_background_surfaces_once_at_the_next_call(opened, monkeypatch, call):
    checkpoints, state, end = opened(patience=1), {"x": jnp.ones(2)}, storage.end_write

    def refuse(*args):
        end(*args)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "end_write", refuse)
        checkpoints.save(1, state, **NOTE)
        checkpoints._pending[1].exception(30)
    calls = dict(save=lambda: checkpoints.save(2, state, **NOTE), latest=lambda: checkpoints.latest(state))
    with pytest.raises(CheckpointError, match="step 1 was not saved(.|\n)*Input/output error"):
        calls.get(call, getattr(checkpoints, call))()
    checkpoints.wait()
    assert checkpoints.steps() == []


def test_copies_that_differ_between_devices_are_named_and_the_first_is_saved(opened, capsys):
    sharding = meshes.sharding(meshes.make(meshes.MeshConfig()), "", {})
    parts = [jax.device_put(jnp.full(4, float(device.id == 5)), device) for device in jax.devices()]
    state = {"good": jax.device_put(jnp.ones(4), sharding), "bad": jax.make_array_from_single_device_arrays((4,), sharding, parts)}
    checkpoints = opened()
    checkpoints.save(1, state, **NOTE)
    restored, _ = checkpoints.latest(state)
    assert "step 1: the copies of bad on different devices differ" in capsys.readouterr().err
    assert restored["bad"].tolist() == [0, 0, 0, 0]


def test_check_does_not_wait(opened, monkeypatch):
    release = threading.Event()
    end = storage.end_write
    monkeypatch.setattr(storage, "end_write", lambda *args: (release.wait(30), end(*args)))
    checkpoints = opened()
    checkpoints.save(1, {"x": jnp.ones(2)}, **NOTE)
    checkpoints.check()
    assert checkpoints.steps() == []
    release.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("place", ["begin_write", "end_write"])
def test_a_disk_that_hangs_is_given_up_at_the_deadline(opened, monkeypatch, place):
    release = threading.Event()
    monkeypatch.setattr(storage, place, lambda *args: release.wait(30))
    monkeypatch.setattr(save, "_SLACK_SECONDS", 0.1)
    checkpoints = opened(deadline_seconds=1)
    begun = time.monotonic()
    checkpoints.save(1, {"x": jnp.ones(2)}, **NOTE)
    with pytest.raises(CheckpointError, match="step 1 was not saved in time"):
        checkpoints.wait()
    release.set()
    assert time.monotonic() - begun < 10


def test_a_folder_that_cannot_be_written_is_an_error_at_the_opening(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be kept in(.|\n)*can be a folder(.|\n)*remove the file in its way"):
        Checkpoints(tmp_path / "file" / "checkpoints", CheckpointConfig())


def test_leaves_that_cannot_be_saved_are_named(opened):
    state = {"ok": jnp.ones(2), "key": jax.random.key(0), "number": 3, "wave": jnp.ones(2, jnp.complex64), "half": jnp.ones(2, jnp.int4)}
    with pytest.raises(CheckpointError) as error:
        opened().save(1, state, **NOTE)
    assert all(f"{name}: " in error.value.got for name in ("key", "number", "wave", "half")) and "ok" not in error.value.got


def test_leaves_that_share_a_name_are_refused(opened):
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        opened().save(1, {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, **NOTE)
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        opened().save(1, {"a": jnp.ones(2), "a/b": jnp.ones(2)}, **NOTE)


def test_letters_that_do_not_fit_are_refused(opened):
    with pytest.raises(CheckpointError, match="'VDF' do not fit embed"):
        opened().save(1, {"embed": jnp.ones((2, 2))}, **NOTE, letters={"embed": "VDF"})


def test_the_manifest_is_json_that_says_when_it_was_changed(saved, folder):
    saved(1)
    path = folder / "1" / "manifest.json"
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps({**fields, "step": 2}, indent=1))
    with pytest.raises(manifest.DamagedError, match="manifest.json is damaged"):
        manifest.read(folder / "1")


def test_the_processes_priority_is_left_alone(saved):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    saved(1)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
