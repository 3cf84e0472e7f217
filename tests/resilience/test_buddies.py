"""Who keeps whose copy, and that what is sent arrives whole or not at all."""

import shutil
import threading
import time

import jax.numpy as jnp
import pytest
from tests.resilience.test_slots import write

from jaxtrain.checkpoint import digest
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.resilience import buddies, slots
from jaxtrain.resilience.policy import SnapshotConfig
from jaxtrain.resilience.slots import Moment
from jaxtrain.resilience.snapshots import Snapshots

MESHES = {  # axes, hosts, whether every buddy can be outside of the group
    "data 4 on 4": (dict(data=4), 4, True),
    "data 2 x fsdp 4 on 4": (dict(data=2, fsdp=4), 4, True),
    "data 4 x fsdp 4 on 8": (dict(data=4, fsdp=4), 8, True),
    "fsdp 8 on 4": (dict(fsdp=8), 4, False),
    "data 2 x tensor 8 on 2": (dict(data=2, tensor=8), 2, True),
    "fsdp 2 x data 2, hosts across": (dict(fsdp=2, data=2), 2, False),
    "fsdp 3 x stage 2 on 6": (dict(stage=2, fsdp=3), 6, True),
    "replica 2 x stage 2 x fsdp 4 on 16": (dict(replica=2, stage=2, fsdp=4), 16, True),
}


@pytest.mark.parametrize("name", MESHES)
def test_every_host_keeps_one_copy_outside_of_its_group_where_there_is_an_outside(name):
    mesh, hosts, apart = MESHES[name]
    shared = buddies.groups(mesh, hosts)
    chosen = [buddies.buddy(host, shared) for host in range(hosts)]
    assert sorted(b.host for b in chosen) == list(range(hosts)), "each keeps one"
    assert all(b.host != host for host, b in enumerate(chosen))
    assert [b.apart for b in chosen] == [b.host not in shared[h] for h, b in enumerate(chosen)] == [apart] * hosts
    assert apart or "shares an fsdp or tensor group" in str(chosen[0])


def test_groups_are_those_of_the_mesh():
    assert buddies.groups(dict(data=2, fsdp=4), 4) == [{0, 1}, {0, 1}, {2, 3}, {2, 3}]
    assert buddies.groups(dict(fsdp=2, data=2), 2) == [{0, 1}, {0, 1}]  # device 0 and 2 share what 1 and 3 do not
    assert buddies.groups(dict(data=4), 2) == [{0}, {1}]


def test_one_host_has_no_buddy():
    assert buddies.buddy(0, buddies.groups(dict(fsdp=8), 1)) is None


def sent(folder, process, moment):
    return b"".join(buddies.parcel(folder, process, moment))


def received(folder, host, data, size=7):
    """Cut anywhere: no buffer's end is a piece's."""
    arrival = buddies.Arrival(folder, host)
    for at in range(0, len(data), size):
        arrival.take(data[at : at + size])
    return arrival.finish()


def test_a_part_arrives_as_it_was_sent(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for step in (1, 2):
        write(here, step)
    assert buddies.ready(here, [0]) == Moment(2, 1) and buddies.ready(here, [0, 1]) is None
    assert received(there, "here", sent(here, 0, Moment(2, 1))) == Moment(2, 1)
    (part,) = slots.snapshots(there / slots.COPIES / "here")
    assert bytes(part.read(part.header.pieces[0])) == bytes([2]) * 4
    assert slots.newest(slots.folders(there)) == 2 and slots.newest([there]) is None


def test_a_part_that_is_gone_is_no_parcel(tmp_path):
    write(tmp_path, 1)
    assert buddies.parcel(tmp_path, 0, Moment(2, 1)) is None and buddies.parcel(tmp_path, 1, Moment(1, 1)) is None


@pytest.mark.parametrize("size", [7, 1 << 20])
@pytest.mark.parametrize("in_header", [lambda d: d[:5], lambda d: b"", lambda d: d[:20] + b"x" + d[21:]])
def test_a_header_that_is_not_as_it_was_sent_is_refused_and_both_copies_before_stay(tmp_path, in_header, size):
    assert left_by(tmp_path, in_header, size) == [1, 2]


@pytest.mark.parametrize("size", [7, 1 << 20])
@pytest.mark.parametrize("in_bytes", [lambda d: d[:-1], lambda d: d[:-1] + b"x", lambda d: d + b"x"])
def test_bytes_that_are_not_as_they_were_sent_are_refused_and_the_newest_copy_before_stays(tmp_path, in_bytes, size):
    assert left_by(tmp_path, in_bytes, size) == [2]


def left_by(tmp_path, change, size):
    here, there = tmp_path / "here", tmp_path / "there"
    for step in (1, 2, 3):
        write(here, step)
        if step < 3:
            received(there, "here", sent(here, 0, Moment(step, 1)))
    with pytest.raises(DamagedError):
        received(there, "here", change(sent(here, 0, Moment(3, 1))), size)
    return sorted(part.header.moment.step for part in slots.snapshots(there / slots.COPIES / "here"))


def test_what_the_trainer_overwrites_while_it_is_sent_is_refused(tmp_path):
    write(tmp_path, 1)
    parts = buddies.parcel(tmp_path, 0, Moment(1, 1))
    (tmp_path / "0-a.data").write_bytes(b"torn")
    with pytest.raises(DamagedError):
        received(tmp_path / "there", "here", b"".join(parts))


def test_a_copy_waits_for_no_one_where_none_is_kept(tmp_path):
    assert buddies.wait_for_copy(tmp_path, Moment(1, 1), 60)


def test_a_later_generation_waits_for_its_own_copy_although_its_step_is_earlier(tmp_path):
    buddies.start(tmp_path)
    buddies.confirm(tmp_path, Moment(20, 1))
    assert buddies.wait_for_copy(tmp_path, Moment(15, 1), 0) and not buddies.wait_for_copy(tmp_path, Moment(15, 2), 0)


def test_a_snapshot_counts_as_whole_when_its_buddy_has_it_and_is_restored_from_there(tmp_path):
    here, there, state = tmp_path / "here", tmp_path / "there", {"x": jnp.arange(8.0)}
    buddies.start(here)
    snapshots = Snapshots(here, SnapshotConfig(memory_gb=1), run="run", generation=1)
    snapshots.save(5, state, data={})
    end = time.monotonic() + 30
    while (moment := buddies.ready(here, [0])) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert moment == Moment(5, 1) and snapshots._newest is None
    received(there, "here", sent(here, 0, moment))
    threading.Timer(0.1, lambda: buddies.confirm(here, moment)).start()
    assert snapshots.wait() == 5
    shutil.rmtree(here)
    survivor = Snapshots(there, SnapshotConfig(memory_gb=1), run="run", generation=2)
    assert survivor.known(state).whole == [moment]
    recalled = survivor.restore(moment, state)
    assert digest(recalled.state) == digest(state) and recalled.origin == "buddy copies of 1 process"


def test_a_buddy_that_lags_is_said_and_does_not_hold_the_run(tmp_path, capsys):
    buddies.start(tmp_path)
    snapshots = Snapshots(tmp_path, SnapshotConfig(memory_gb=1, deadline_seconds=1), run="run", generation=1)
    snapshots.save(5, {"x": jnp.ones(2)}, data={})
    assert snapshots.wait() == 5 and "would not survive its host" in capsys.readouterr().err
