"""What hosts lack of a snapshot and how it comes to them; on how many hosts a config runs. No trainer, no jax."""

import dataclasses
import json
import queue
import threading
import zlib
from contextlib import contextmanager

from jaxtrain.resilience import buddies, slots, stock
from jaxtrain.resilience.fewer import Fits
from jaxtrain.resilience.host import Plan
from jaxtrain.resilience.node import Node
from jaxtrain.resilience.policy import Shelf
from jaxtrain.resilience.roster import Roster
from jaxtrain.resilience.say import flush
from jaxtrain.resilience.slots import Header, Kind, Moment, Piece, Slots
from jaxtrain.resilience.stock import Part, Stock, missing
from jaxtrain.resilience.tenure import Tenure
from meshes import MeshConfig
from tests.resilience.lines import SECRET, until
from tests.resilience.supervisors import free_ports
from tests.tiny import TINY


def parts(owner, *processes, step=20, generation=1, of=2):
    return [Part(owner, process, step, generation, of) for process in processes]


def test_a_spare_is_sent_what_the_lost_host_held_and_nobody_else_anything():
    stocks = {"a": parts("a", 0) + parts("b", 1), "c": []}
    assert missing(["a", "c"], 1, stocks) == [("a", *parts("b", 1), "c")]


def test_fewer_hosts_are_each_sent_all_that_they_lack():
    a, b, c = (parts(name, number, of=3)[0] for number, name in enumerate("abc"))
    stocks = {"a": [a, c], "b": [b, a]}
    assert missing(["a", "b"], 1, stocks) == [("b", b, "a"), ("a", c, "b")]


def test_what_many_lack_comes_from_all_who_have_it_each_as_many_bytes_as_can_be():
    big, *small = [part._replace(size=size) for part, size in zip(parts("a", 0, 1, 2, of=3), (20, 10, 10))]
    held = {"a": [big, *small], "b": [big, *small]}
    assert missing(["c"], 1, {**held, "c": []}) == [("a", big, "c"), ("b", small[0], "c"), ("b", small[1], "c")]
    orders = missing(["c", "d"], 1, {**held, "c": [], "d": []})
    assert [sum(part.size for source, part, _ in orders if source == host) for host in "ab"] == [40, 40]


def test_only_the_newest_that_is_whole_is_sent_and_a_later_generation_is_newer():
    newer, older = parts("b", 1, step=40), [*parts("a", 0, step=60), *parts("b", 1, step=60)]
    later = [*parts("a", 0, step=50, generation=2), *parts("b", 1, step=50, generation=2)]
    assert missing(["a", "c"], 1, {"a": [*newer, *older, *later]}) == [("a", later[1], "c")]
    assert missing(["a", "c"], 1, {"a": newer}) == []


def write(folder, process, step, data):
    folder.mkdir(parents=True, exist_ok=True)
    writer = Slots(folder, process)
    writer.begin(len(data), None)[:] = data
    piece = Piece("x", ((0, len(data)),), 0, len(data), f"{zlib.crc32(data):08x}")
    writer.commit(
        Header(
            run="r", moment=Moment(step, 1), since=0, keep=None, process=process, processes=2, data={},
            arrays={"x": Kind("uint8", (len(data),))}, pieces=[piece],
        )  # fmt: skip
    )


@contextmanager
def stocked(tmp_path, num, memory_gb=None):
    """(stocks, addresses) of hosts a, b, ... with folders of these names."""
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(num))
    stocks, nodes = [], []
    for index, name in enumerate("abc"[:num]):
        roster = Roster(index=index, addresses=addresses)
        tenure = Tenure(tmp_path, roster.name, addresses[index], 5.0, threading.Event())
        node = Node(roster, SECRET, tenure, threading.Event(), lambda: ("-", []))
        made = Stock(Shelf(tmp_path / name, memory_gb), roster, SECRET, node.hub.send)
        node.on_payload = made.received
        stocks.append(made)
        nodes.append((node, tenure))
    try:
        yield stocks, addresses
    finally:
        for made, (node, tenure) in zip(stocks, nodes):
            made.close()
            tenure.close()
            node.close()


def begin(host, buddy):
    host.begin(Plan(generation=1, service="", first=0, count=2, env={}, buddy=buddy), 1)


def test_each_new_snapshot_goes_to_the_buddy_and_from_there_to_who_needs_it(tmp_path):
    data = bytes(range(256)) * 200_000  # in several pieces
    with stocked(tmp_path, 3) as (stocks, addresses):
        begin(stocks[0], addresses[1])
        write(tmp_path / "a", 0, 20, data)
        assert not buddies.wait_for_copy(tmp_path / "a", Moment(20, 1), 0.0)
        assert buddies.wait_for_copy(tmp_path / "a", Moment(20, 1), 20.0)
        (copy,) = slots.snapshots(tmp_path / "b" / slots.COPIES / addresses[0])
        assert bytes(copy.all_bytes[: len(data)]) == data
        part = Part(addresses[0], 0, 20, 1, 2, len(data))
        assert stocks[1].inventory() == [part]
        assert stocks[1].send([part], addresses[2])
        assert stocks[2].inventory() == [part]
        assert not stocks[1].send([part._replace(step=40)], addresses[2])


def arriving(tmp_path, memory_gb=None):
    """(a host's stock, hand, answer): `hand(sender, 0, 1)` gives it those of one part's four pieces; what it answers."""
    answers = queue.SimpleQueue()
    roster, shelf = Roster(index=0, addresses=("there:1",)), Shelf(tmp_path / "there", memory_gb)
    made = Stock(shelf, roster, SECRET, lambda *answer: answers.put(answer))
    write(tmp_path / "here", 0, 20, b"data")
    *heads, data = buddies.parcel(tmp_path / "here", 0, Moment(20, 1))
    pieces, part = [b"".join(heads) + data[:1], *(data[i : i + 1] for i in (1, 2, 3))], Part("here", 0, 20, 1, 2, 4)

    def hand(sender, *numbers):
        for number in numbers:
            made.received(sender, {"part": list(part), "number": number, "count": 4}, memoryview(pieces[number]))

    return made, hand, lambda: answers.get(timeout=20)[1]["trouble"]


def test_a_piece_is_in_its_slot_as_soon_as_it_is_here_and_counts_once_all_are(tmp_path):
    host, hand, answer = arriving(tmp_path)
    place = tmp_path / "there" / slots.COPIES / "here"
    hand("b", 0, 1, 2)
    until(lambda: (place / "0-a.data").is_file() and (place / "0-a.data").read_bytes() == b"dat\0")
    assert slots.snapshots(place) == []
    hand("b", 3)
    assert answer() == "" and host.inventory() == [Part("here", 0, 20, 1, 2, 4)]
    host.close()


def test_of_two_hosts_that_send_the_same_part_one_writes_to_the_slot(tmp_path):
    host, hand, answer = arriving(tmp_path)
    hand("b", 0, 1)
    hand("c", 0, 1)
    hand("b", 2, 3)
    assert "another host sends it too" in answer() and host.inventory() == []
    hand("c", 2, 3)
    assert answer() == "" and host.inventory() == [Part("here", 0, 20, 1, 2, 4)]
    hand("c", 0, 1, 3)
    assert "pieces of it are missing" in answer()
    host.close()


def test_a_host_is_sent_nothing_of_what_would_exceed_its_budget_and_that_is_said(tmp_path, capsys):
    with stocked(tmp_path, 2, memory_gb=0.003) as (stocks, addresses):
        for process in (0, 1):
            write(tmp_path / "a", process, 20, bytes(2_000_000))
        both = stocks[0].inventory()
        assert not stocks[0].send(both, addresses[1])
        assert not list((tmp_path / "b").rglob("*.data")) and stocks[1].inventory() == []
        line = f"{addresses[1]} takes no parts of the snapshot of step 20, and the next tier serves: with them it would hold"
        flush()
        assert f"{line} 0.004 GB, budget 0.003 GB (snapshot.memory_gb)" in capsys.readouterr().err
        assert stocks[0].send(both[:1], addresses[1]) and stocks[1].inventory() == both[:1]


def test_what_two_hosts_offer_counts_together_until_it_is_here_or_a_generation_begins(tmp_path):
    host, hand, answer = arriving(tmp_path, memory_gb=10 / 1e9)
    other = Part("other", 1, 20, 1, 2, 8)
    offer = lambda sender, part: host.received(sender, {"offer": 1}, memoryview(json.dumps([part]).encode()))
    offer("b", Part("here", 0, 20, 1, 2, 4))
    assert answer() == ""
    offer("c", other)
    assert "budget" in answer()
    offer("b", Part("here", 0, 20, 1, 2, 4))  # again: it counts once
    assert answer() == ""
    begin(host, None)
    offer("c", other)
    assert answer() == ""
    begin(host, None)
    hand("b", 0, 1, 2, 3)
    assert answer() == ""
    offer("c", other)
    assert "budget" in answer()
    offer("c", other._replace(size=6))
    assert answer() == ""
    host.close()


def test_a_copy_that_fails_is_tried_again_over_the_same_line(tmp_path, monkeypatch, capsys):
    lines, fails, parcel = [], iter([True]), buddies.parcel
    sender = stock._Sender
    monkeypatch.setattr(stock, "_Sender", lambda *args: lines.append(sender(*args)) or lines[-1])
    monkeypatch.setattr(buddies, "parcel", lambda *args: _raise() if next(fails, False) else parcel(*args))
    with stocked(tmp_path, 2) as (stocks, addresses):
        begin(stocks[0], addresses[1])
        write(tmp_path / "a", 0, 20, b"data")
        assert buddies.wait_for_copy(tmp_path / "a", Moment(20, 1), 20.0)
    flush()
    assert len(lines) == 1 and "a snapshot is not copied: gone" in capsys.readouterr().err


def _raise():
    raise OSError("gone")


def test_fewer_hosts_take_more_microbatches_so_that_none_is_larger_on_a_device():
    config = dataclasses.replace(TINY, batch=24, mesh=MeshConfig(data=-1, fsdp=1))
    fits = Fits(config, devices_per_host=1, usual=4)
    assert fits(4) == [] and fits(3) == ["--accumulate", "2"] and fits(2) == ["--accumulate", "2"]
    assert fits(1) == ["--accumulate", "4"]
    assert Fits(TINY, 1, 4)(3) is None  # 8 examples do not divide over 3


def test_a_mesh_without_a_free_axis_runs_on_its_own_number_alone():
    fits = Fits(dataclasses.replace(TINY, mesh=MeshConfig(data=2, fsdp=2)), devices_per_host=2, usual=2)
    assert fits(2) == [] and fits(1) is None


def test_buddies_hold_no_part_of_the_same_copy_where_that_can_be():
    fits = Fits(dataclasses.replace(TINY, mesh=MeshConfig(data=2, fsdp=-1)), devices_per_host=1, usual=4)
    assert fits.buddies(4) == [2, 3, 0, 1]
    assert Fits(TINY, 1, 1).buddies(1) == [None]
