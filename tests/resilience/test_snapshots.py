"""Snapshots: whole or not there, restored bit for bit onto any mesh, within their budget, damage named and passed by."""

import json
import shutil
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tests.checkpoint.states import FSDP_4X2, abstract, letters, make_state, placed

import meshes
from jaxtrain.checkpoint import CheckpointConfig, Checkpoints, digest
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.errors import CheckpointError, ConfigError
from jaxtrain.resilience import slots, tiers
from jaxtrain.resilience.policy import SnapshotConfig, place, too_large
from jaxtrain.resilience.slots import Moment
from jaxtrain.resilience.snapshots import Snapshots

LAYOUTS = {
    "fsdp 4 x tensor 2": FSDP_4X2,
    "data 2 x tensor 4": dict(config=meshes.MeshConfig(data=2, tensor=4, fsdp=1), rules=meshes.TP),
    "fsdp 8": dict(config=meshes.MeshConfig(), rules=meshes.FSDP),
    "replicas 2": dict(config=meshes.MeshConfig(data=2), rules=meshes.HSDP),
}


def state_of(step):
    return placed(make_state(step), **FSDP_4X2)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "memory"


@pytest.fixture
def opened(folder):
    def make(generation=1, run="run", **fields):
        return Snapshots(folder, replace(SnapshotConfig(memory_gb=1), **fields), run=run, generation=generation)

    return make


@pytest.fixture
def taken(opened):
    """taken(*steps) -> Snapshots with make_state(step) of each, one after the other."""

    def make(*steps, **fields):
        snapshots = opened(**fields)
        for step in steps:
            snapshots.save(step, state_of(step), data={"examples": 8 * step})
            assert snapshots.wait() == step
        return snapshots

    return make


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(deadline_seconds=60))
    yield made
    made.close()


def flip(path, where=-1):
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)


def newest_file(folder, suffix=".data"):
    return max(slots.snapshots(folder), key=lambda part: part.header.moment).path.with_suffix(suffix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_snapshot_comes_back_bit_for_bit_onto_any_mesh(taken, layout):
    snapshots = taken(3, 6)
    wanted = abstract(placed(make_state(0), **LAYOUTS[layout]))
    assert snapshots.known(wanted).whole == [Moment(6, 1), Moment(3, 1)]
    for step in (3, 6):
        recalled = snapshots.restore(Moment(step, 1), wanted)
        assert digest(recalled.state) == digest(make_state(step)) and recalled.data == {"examples": 8 * step}
        assert jax.tree.map(lambda x: x.sharding, recalled.state) == jax.tree.map(lambda x: x.sharding, wanted)


def test_two_slots_hold_the_newest_two(taken, folder):
    taken(1, 2, 3, 4, 5)
    assert sorted(part.header.moment.step for part in slots.snapshots(folder)) == [4, 5]
    assert len(list(folder.glob("*.data"))) == 2 and slots.newest([folder]) == 5


def test_each_box_is_held_once_although_devices_repeat_it(taken, folder):
    taken(1)
    size = sum(x.nbytes for x in jax.tree.leaves(make_state(1)))
    assert sum(piece.size for piece in slots.snapshots(folder)[0].header.pieces) == size


def test_a_state_donated_right_after_the_call_is_held_as_it_was(opened):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"x": jax.device_put(jnp.arange(1 << 16).reshape(256, 256), state_of(0).params["embed"].sharding)}
    snapshots = opened()
    for number in range(1, 6):
        state = step(state)
        snapshots.save(number, state, data={})
        expected, state = digest(state), step(state)
        snapshots.wait()
        assert digest(snapshots.restore(Moment(number, 1), abstract(state)).state) == expected


def test_the_step_after_a_snapshot_gets_the_buffers_that_it_was_donated(opened):
    state, snapshots = {"x": jnp.ones((512, 512))}, opened()
    snapshots.save(1, state, data={})
    before = state["x"].unsafe_buffer_pointer()
    after = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)["x"].unsafe_buffer_pointer()
    assert after == before


def test_what_was_restored_is_not_the_slots_memory(taken):
    snapshots = taken(1, 2)
    state = snapshots.restore(Moment(2, 1), abstract(state_of(0))).state
    before = digest(state)
    for step in (3, 4):
        snapshots.save(step, state_of(step), data={})
        snapshots.wait()
    assert digest(state) == before == digest(make_state(2))


def test_one_flipped_byte_is_found_and_its_file_and_array_are_named(taken, folder):
    snapshots, path = taken(1), newest_file(folder)
    piece = next(p for p in slots.snapshots(folder)[0].header.pieces if p.name == "params/blocks/q")
    flip(path, piece.offset + piece.size - 1)
    with pytest.raises(DamagedError) as error:
        snapshots.restore(Moment(1, 1), abstract(state_of(0)))
    assert str(path) in str(error.value) and "params/blocks/q[" in str(error.value)


@pytest.mark.parametrize("where", [0, 70, -1])
def test_a_flipped_byte_in_a_header_makes_it_no_snapshot(taken, folder, where):
    snapshots = taken(1, 2)
    flip(newest_file(folder, ".json"), where)
    assert snapshots.known(abstract(state_of(0))).whole == [Moment(1, 1)] and slots.newest([folder]) == 1


def test_a_snapshot_whose_bytes_are_cut_short_or_gone_is_none(taken, folder):
    snapshots, path = taken(1, 2), newest_file(folder)
    path.write_bytes(path.read_bytes()[:-100])
    assert snapshots.known(abstract(state_of(0))).whole == [Moment(1, 1)]
    path.unlink()
    assert snapshots.known(abstract(state_of(0))).whole == [Moment(1, 1)]


def test_another_runs_snapshots_are_not_looked_at_and_go(taken, opened, folder):
    taken(1, run="first")
    second = opened(run="second")
    assert second.known(abstract(state_of(0))).whole == []
    second.go_on_from(0, None)
    assert slots.snapshots(folder) == []


def test_a_state_of_another_shape_is_not_whole_and_says_so(taken):
    known = taken(1).known({"x": jnp.ones(3)})
    assert known.whole == [] and "another number of replicas" in known.lacking[Moment(1, 1)]


def test_a_budget_that_is_too_small_is_obeyed_and_said_once_with_its_numbers(opened, folder, capsys):
    state = {"x": jnp.ones(1 << 18)}
    snapshots = opened(memory_gb=0.002)
    for step in (1, 2):
        snapshots.save(step, state, data={})
    assert snapshots.wait() is None and list(folder.iterdir()) == []
    assert capsys.readouterr().err.count("2 x 0.001 GB = 0.002 GB, budget 0.002 GB") == 1


def test_a_budget_that_just_fits_is_used(opened, folder):
    snapshots = opened(memory_gb=2 * 4096 / 1e9)
    for step in (1, 2, 3):
        snapshots.save(step, {"x": jnp.ones(1024)}, data={})
        assert snapshots.wait() == step
    assert sum(path.stat().st_size for path in folder.glob("*.data")) == 2 * 4096


def test_hosts_and_buddies_count_against_the_budget():
    config, hosts = SnapshotConfig(), ["a", "a", "b"]
    assert too_large(config, hosts, [100, 100, 100], [10, 10, 20]) == []
    assert len(too_large(config, hosts, [100, 79, 100], [10, 10, 20])) == 1  # 2 x (20 + 20) on a
    assert too_large(replace(config, buddies=False), hosts, [40, 40, 40], [10, 10, 20]) == []


def test_a_folder_that_cannot_be_made_turns_snapshots_off_and_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    snapshots = Snapshots(tmp_path / "file" / "memory", SnapshotConfig(), run="run", generation=1)
    snapshots.save(1, {"x": jnp.ones(2)}, data={})
    assert snapshots.wait() is None and "there are no snapshots" in capsys.readouterr().err


def test_a_snapshot_is_left_out_while_the_one_before_is_not_finished(opened, monkeypatch, capsys):
    release, commit = threading.Event(), slots.Slots.commit
    monkeypatch.setattr(slots.Slots, "commit", lambda *args: (release.wait(30), commit(*args))[1])
    snapshots = opened()
    snapshots.save(1, {"x": jnp.ones(2)}, data={})
    snapshots.save(2, {"x": jnp.ones(2)}, data={})
    release.set()
    assert snapshots.wait() == 1
    assert "step 2 is not whole" in capsys.readouterr().err
    snapshots.save(3, {"x": jnp.ones(2)}, data={})
    assert snapshots.wait() == 3


def test_a_step_that_the_run_must_not_go_on_from_has_no_snapshot_and_that_is_said_once(opened, capsys):
    snapshots = opened()
    for step, trouble in ((1, ""), (2, "rows of metrics wait"), (3, "rows of metrics wait"), (4, "")):
        snapshots.save(step, state_of(step), data={}, trouble=trouble)
        assert snapshots.wait() == (1 if trouble else step)
    assert capsys.readouterr().err.count("rows of metrics wait") == 1


def test_what_was_not_agreed_to_be_whole_is_overwritten_first(opened, folder, monkeypatch):
    """Elsewhere another process may have failed: the newest that all have stays until all have a newer one."""
    snapshots = opened()
    for step in (1, 2):
        snapshots.save(step, {"x": jnp.ones(2)}, data={})
        snapshots.wait()
    with monkeypatch.context() as patch:
        patch.setattr("jaxtrain.checkpoint.peers.agree", lambda key, report, *rest: (report(), _raise())[1])
        snapshots.save(3, {"x": jnp.ones(2)}, data={})
        assert snapshots.wait() == 2
    snapshots.save(4, {"x": jnp.ones(2)}, data={})
    snapshots.wait()
    assert sorted(part.header.moment.step for part in slots.snapshots(folder)) == [2, 4]


def _raise():
    raise CheckpointError("process 1 did not report on a save or restore.")


def test_later_steps_of_an_earlier_generation_have_not_happened_once_another_went_on_before_them(taken, opened, folder):
    taken(10, 20)
    kept = folder.parent / "host that was away"
    shutil.copytree(folder, kept)
    second = opened(generation=2)
    second.go_on_from(10, Moment(10, 1))
    second.save(15, state_of(15), data={})
    second.wait()
    assert sorted(part.header.moment for part in slots.snapshots(folder)) == [Moment(10, 1), Moment(15, 2)]
    shutil.copytree(kept, folder / slots.COPIES / "away")
    known = second.known(abstract(state_of(0)))
    assert known.whole == [Moment(15, 2), Moment(10, 1)] and "went on from before" in known.lacking[Moment(20, 1)]
    assert slots.newest(slots.folders(folder)) == 15


def test_a_folder_that_outlives_its_supervisor_goes_on_counting_generations(taken, opened):
    taken(10, generation=5)
    second = opened(generation=1)
    second.go_on_from(10, Moment(10, 5))
    second.save(20, state_of(20), data={})
    second.wait()
    assert second.known(abstract(state_of(0))).whole == [Moment(20, 6), Moment(10, 5)]


def test_the_newest_state_of_all_tiers_is_taken_and_said(taken, opened, checkpoints, capsys):
    for step in (1, 5):
        checkpoints.save(step, state_of(step), config={}, data={"examples": step}, letters=letters())
    taken(4, 6)
    again = opened(generation=2)
    restored = tiers.restore(checkpoints, again, abstract(state_of(0)))
    assert (restored.step, restored.tier, restored.data) == (6, "snapshot", {"examples": 48})
    assert restored.why == "step 6 from memory of 1 process; the checkpoint is of step 5"
    assert digest(restored.state) == digest(make_state(6))


def test_damage_falls_from_tier_to_tier_and_is_named_at_each(taken, opened, checkpoints, folder, capsys):
    for step in (1, 5):
        checkpoints.save(step, state_of(step), config={}, data={}, letters=letters())
    checkpoints.wait()
    taken(4, 6)
    wanted = abstract(state_of(0))
    flip(newest_file(folder))
    restored = tiers.restore(checkpoints, opened(generation=2), wanted)
    assert [restored.tier, restored.step] == ["checkpoint", 5] and digest(restored.state) == digest(make_state(5))
    assert "skipped the snapshot of step 6" in capsys.readouterr().err
    manifest = checkpoints.directory / "5" / "manifest.json"
    flip(manifest, 40)
    restored = tiers.restore(checkpoints, opened(generation=3), wanted)
    assert (restored.tier, restored.step, digest(restored.state)) == ("snapshot", 4, digest(make_state(4)))
    assert "skipped the checkpoint of step 5" in capsys.readouterr().err
    shutil.rmtree(folder)
    restored = tiers.restore(checkpoints, opened(generation=4), wanted)
    assert (restored.tier, restored.step) == ("checkpoint", 1) and "no snapshot is in memory" in restored.why


def test_nothing_at_all_is_none_and_nothing_whole_is_an_error(taken, opened, checkpoints, folder, capsys):
    assert tiers.restore(checkpoints, opened(), abstract(state_of(0))) is None
    taken(4)
    flip(newest_file(folder))
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        tiers.restore(checkpoints, opened(), abstract(state_of(0)))


def test_a_running_process_goes_back_and_what_was_after_that_is_another_generations(taken, checkpoints, folder):
    for step in (2, 5):
        checkpoints.save(step, state_of(step), config={}, data={}, letters=letters())
    snapshots = taken(4, 6)
    restored = tiers.restore(checkpoints, snapshots, abstract(state_of(0)), up_to=4)
    assert (restored.step, restored.tier) == (4, "snapshot") and slots.newest([folder]) == 4
    snapshots.save(6, state_of(7), data={})
    assert snapshots.wait() == 6
    recalled = snapshots.restore(Moment(6, 2), abstract(state_of(0)))
    assert digest(recalled.state) == digest(make_state(7)) and len(list(folder.glob("*.data"))) == 2
    assert tiers.restore(checkpoints, snapshots, abstract(state_of(0)), up_to=1) is None and slots.newest([folder]) is None


def test_a_part_that_is_damaged_here_and_whole_in_a_buddys_copy_is_taken_from_there(taken, folder, capsys):
    snapshots = taken(1)
    shutil.copytree(folder, folder.parent / "copy")
    shutil.move(folder.parent / "copy", folder / slots.COPIES / "other")
    flip(newest_file(folder))
    recalled = snapshots.restore(Moment(1, 1), abstract(state_of(0)))
    assert digest(recalled.state) == digest(make_state(1)) and "another copy is taken" in capsys.readouterr().err


def test_where_snapshots_lie_follows_the_supervisor_and_the_config():
    memory = {"JAXTRAIN_SNAPSHOTS": "/dev/shm/job/host0"}
    assert place(SnapshotConfig(), "x", {}) is None and place(SnapshotConfig(every=0), "x", memory) is None
    assert str(place(SnapshotConfig(), "x", memory)) == "/dev/shm/job/host0/snapshots"
    assert str(place(SnapshotConfig(folder="/disk"), "x", memory)) == "/disk/x"


def test_a_config_out_of_range_is_refused():
    for fields in (dict(every=-1), dict(memory_gb=-1.0), dict(deadline_seconds=0)):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            SnapshotConfig(**fields)


def test_discard_gives_the_memory_back(taken, folder):
    taken(1).discard()
    assert not folder.exists()


def test_a_header_is_json_that_anything_can_read(taken, folder):
    taken(1)
    fields = json.loads(newest_file(folder, ".json").read_bytes().split(b"\n", 1)[1])
    assert fields["moment"] == [1, 1] and fields["data"] == {"examples": 8}
