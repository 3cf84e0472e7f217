"""Examples put aside: what stands in for them, and the record of them in the run folder."""

from dataclasses import replace

import numpy as np
import pytest

from jaxtrain.data import quarantine
from jaxtrain.data.command import main
from jaxtrain.data.dataset import open_dataset
from jaxtrain.data.order import Shuffled, Without
from jaxtrain.data.quarantine import Event
from jaxtrain.data.source import Mixture, Synthetic
from jaxtrain.errors import DataError, RunError
from jaxtrain.protocols import BATCH_FIELDS

BATCH = 8
ALL = np.arange(BATCH)
SOURCE = Synthetic(num_documents=100, document=33)  # 103 examples of 32 tokens


@pytest.fixture
def data():
    return opened(SOURCE)


def opened(source):
    return open_dataset(source, seq_len=32, batch=BATCH, seed=0, vocab_size=256, cache_dir=".")


def event(data, *steps, rows=range(BATCH)):
    """These rows of these steps, counted from 1, put aside by a run that trains on `data`."""
    examples = tuple(data.examples(step - 1)[row] for step in steps for row in rows)
    where = dict(steps=(min(steps), max(steps)), position=(min(steps) - 1) * BATCH, data=data.fingerprint)
    return Event(why="a test", restored=0, examples=examples, **where)


def keys(data, step):
    return [(put.source, put.example) for put in data.examples(step)]


def test_the_examples_of_a_bad_step_give_way_and_all_other_steps_of_the_epoch_stay(data):
    bad = event(data, 4)
    now = data.without((bad,))
    assert not set(keys(now, 3)) & set(keys(data, 3))
    epoch = data.num_examples // BATCH
    for step in (step for step in range(epoch) if step != 3):
        assert keys(now, step) == keys(data, step)


def test_what_was_put_aside_does_not_come_again_in_any_later_epoch_but_was_there_before(data):
    late = event(data, 40)
    now, gone = data.without((late,)), {(put.source, put.example) for put in late.examples}
    for step in range(200):
        assert step < 39 and keys(now, step) == keys(data, step) or step >= 39 and not gone & set(keys(now, step))
    assert any(gone & set(keys(data, step)) for step in range(39))


@pytest.mark.parametrize("seed", range(5))
def test_a_stand_in_is_no_other_example_of_its_step(seed):
    """24 examples of which 12 are put aside, 8 a step: a free draw would meet another of its step nearly always."""
    order = Shuffled([24], [1.0], seed)
    aside = {(0, e): 0 for e in np.random.default_rng(seed).permutation(24)[:12].tolist()}
    now = Without(order, [24], BATCH, aside)
    for step in range(50):
        index = np.arange(step * BATCH, (step + 1) * BATCH)
        found = now.locate(index)[1].tolist()
        before = order.locate(index)[1].tolist()
        kept = [e for e in before if (0, e) not in aside]
        assert not {(0, e) for e in found} & set(aside)
        if len({*before}) == BATCH:
            assert len({*found}) == BATCH and [e for e in found if e in kept] == kept


def test_where_a_source_is_too_small_to_avoid_it_a_stand_in_comes_twice_but_never_what_was_put_aside():
    now = Without(Shuffled([5], [1.0], 0), [5], BATCH, {(0, 1): 0, (0, 3): 0})
    assert set(now.locate(np.arange(80))[1].tolist()) == {0, 2, 4}


def test_a_source_of_which_all_is_put_aside_is_an_error():
    now = Without(Shuffled([3], [1.0], 0), [3], BATCH, {(0, e): 0 for e in range(3)})
    with pytest.raises(DataError, match="every example of source 0 has been put aside"):
        now.locate(np.arange(1))


def test_rows_do_not_depend_on_which_process_reads_them(data):
    now = data.without((event(data, 4), event(data, 6, rows=(1, 5))))
    for step in (3, 5, 20):
        whole = now.rows(step, ALL)
        for rows in (np.array([2]), np.array([5, 1]), np.array([0, 1, 2, 3]), np.array([7, 6, 5, 4])):
            part = opened(SOURCE).without((event(data, 4), event(data, 6, rows=(1, 5)))).rows(step, rows)
            assert all(np.array_equal(part[name], whole[name][rows]) for name in BATCH_FIELDS)


def test_a_mixture_keeps_its_proportions(data):
    mixed = opened(Mixture(sources=(SOURCE, replace(SOURCE, seed=1)), weights=(3, 1)))
    now = mixed.without((event(mixed, 4),))
    assert [p for p, _ in keys(now, 3)] == [p for p, _ in keys(mixed, 3)]
    assert now.position(9) == mixed.position(9)


def test_a_second_event_may_put_stand_ins_aside(data):
    one = event(data, 4)
    two = event(data.without((one,)), 4)
    now = data.without((one, two))
    assert not set(keys(now, 3)) & (set(keys(data, 3)) | set(keys(data.without((one,)), 3)))


def test_a_record_of_other_data_is_not_applied(data):
    stale = replace(event(data, 4), data="another")
    assert data.without((stale,)).ids(3) == data.ids(3)


def test_a_record_is_read_as_it_was_written_and_counts_for_any_batch_size(data, tmp_path):
    record = (event(data, 4), event(data, 6, 7, rows=(0,)))
    quarantine.write(tmp_path, record)
    assert quarantine.read(tmp_path) == record and quarantine.digest(quarantine.read(tmp_path)) == quarantine.digest(record)
    assert quarantine.digest(record[:1]) != quarantine.digest(record)
    row = (tmp_path / quarantine.FILE).read_text().splitlines()[0]
    assert data.ids(3)[0] in row and '"step": 4' in row and '"why": "a test"' in row
    other = open_dataset(SOURCE, seq_len=32, batch=4, seed=0, vocab_size=256, cache_dir=".").without(record)
    assert keys(other, 6) + keys(other, 7) == keys(data.without(record), 3)


def test_a_damaged_record_is_an_error_that_names_the_line(data, tmp_path):
    quarantine.write(tmp_path, (event(data, 4), event(data, 5)))
    text = (tmp_path / quarantine.FILE).read_text()
    (tmp_path / quarantine.FILE).write_text(text[:-40])
    with pytest.raises(RunError, match="line 2 is damaged"):
        quarantine.read(tmp_path)
    assert quarantine.read(tmp_path / "elsewhere") == ()


def test_the_order_shows_what_stands_in_for_what(tmp_path, capsys):
    path = tmp_path / "c.py"
    path.write_text("from dataclasses import replace\nfrom tests.tiny import TINY\n")
    path.write_text(path.read_text() + f"config = replace(TINY, runs_dir={str(tmp_path)!r})\n")
    from tests.tiny import TINY

    data = open_dataset(TINY.data, seq_len=32, batch=8, seed=0, vocab_size=64, cache_dir=".")
    main(["order", str(path), "--step", "4"])
    before = capsys.readouterr().out.splitlines()
    (tmp_path / "tiny").mkdir()
    quarantine.write(tmp_path / "tiny", (event(data, 4, rows=(2,)),))
    main(["order", str(path), "--step", "4"])
    after = capsys.readouterr().out.splitlines()
    assert [row for row in range(8) if before[row] != after[row]] == [2]
    assert after[2].endswith(f" in place of {before[2].removeprefix('2 ')}")
