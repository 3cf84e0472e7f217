"""Runs that go back: without the examples of the bad steps, to the same bits as a run that never saw those."""

import math
import shutil
from dataclasses import dataclass

import pytest

from jaxtrain.checkpoint import files
from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.errors import CheckpointError, NumericsError
from jaxtrain.observe.sinks import Jsonl
from jaxtrain.resilience.health import Health, Rewind, RollBack, RollBackSpikes
from jaxtrain.resilience.rollback import Start, roll_back
from meshes import MeshConfig
from tests.resilience.runs import after_steps, cache, configured, data_of, poison, poison_examples, record, result, run  # noqa: F401
from tests.resilience.values import STEPS

BACK = Health(not_finite=RollBack(limit=3))


@dataclass(frozen=True, kw_only=True)
class Breaks(Jsonl):
    """A sink that ends the process's run once, when it is to write this step."""

    step: int

    def open(self, run_dir, first_step, steps):
        writer, write = super().open(run_dir, first_step, steps), None
        write = writer.write

        def breaking(row):
            if row["step"] == self.step:
                raise KeyboardInterrupt
            write(row)

        writer.write = breaking
        return writer


def test_a_run_that_went_back_ends_as_one_that_had_the_examples_put_aside_from_the_start(tmp_path, monkeypatch, capsys):
    poison_examples(monkeypatch, (7, 3), (13, 0))
    config = configured(tmp_path, "disturbed", BACK)
    assert run(config, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "train/loss is nan at step 7: back to step 5; 8 examples of step 7 are put aside" in said
    assert "train/loss is nan at step 13: back to step 10" in said
    first, second = record(config)
    assert (first["steps"], first["restored"], second["steps"], second["restored"]) == ([7, 7], 5, [13, 13], 10)
    assert [put["id"] for put in first["examples"]] == data_of().ids(6)
    assert [(put["step"], put["row"]) for put in second["examples"]] == [(13, row) for row in range(8)]
    other = configured(tmp_path, "warned", BACK)
    other.run_dir.mkdir()
    shutil.copy(config.run_dir / "quarantine.jsonl", other.run_dir)
    assert run(other, monkeypatch) == 0
    assert "back to step" not in capsys.readouterr().out
    assert result(config) == result(other)


def test_what_is_put_aside_survives_a_restart(tmp_path, monkeypatch):
    poison_examples(monkeypatch, (7, 3))
    whole = configured(tmp_path, "whole", BACK)
    assert run(whole, monkeypatch) == 0
    broken = configured(tmp_path, "broken", BACK, sinks=(Breaks(step=9),))
    with pytest.raises(KeyboardInterrupt):
        run(broken, monkeypatch)
    assert len(record(broken)) == 1
    again = configured(tmp_path, "broken", BACK)
    assert run(again, monkeypatch) == 0
    assert result(again) == result(whole) and record(again) == record(whole)


@pytest.mark.slow
def test_what_is_put_aside_does_not_depend_on_the_mesh(tmp_path, monkeypatch):
    poison_examples(monkeypatch, (7, 3), (13, 0))
    records = []
    for name, sizes in (("data", {"data": 2, "fsdp": 1}), ("tensor", {"fsdp": 2, "tensor": 2}), ("one", {})):
        config = configured(tmp_path, name, BACK, mesh=MeshConfig(**sizes))
        assert run(config, monkeypatch, devices=math.prod(sizes.values())) == 0
        records.append(record(config))
    assert len(records[0]) == 2 and records[0] == records[1] == records[2]


def test_a_step_that_stays_bad_takes_the_step_before_along_and_the_limit_ends_it(tmp_path, monkeypatch):
    poison(monkeypatch, lambda step, _: step == 8)
    config = configured(tmp_path, health=BACK)
    with pytest.raises(NumericsError, match="at step 8, and 3 rollbacks did not help") as caught:
        run(config, monkeypatch)
    assert [event["steps"] for event in record(config)] == [[8, 8], [7, 8], [6, 8]]
    assert "the last good state is step" in str(caught.value)


def test_a_margin_reaches_behind_checkpoints_which_then_go(tmp_path, monkeypatch):
    poison_examples(monkeypatch, (12, 3))
    config = configured(tmp_path, health=Health(not_finite=RollBack(margin=4)))
    seen = []
    forget = files.delete
    monkeypatch.setattr(files, "delete", lambda folder: (seen.append(folder.name), forget(folder)))
    assert run(config, monkeypatch) == 0
    (event,) = record(config)
    assert (event["steps"], event["restored"], len(event["examples"])) == ([8, 12], 5, 40)
    assert seen == ["10"]


def test_a_run_does_not_start_over_because_its_older_checkpoints_have_gone(tmp_path, monkeypatch):
    poison_examples(monkeypatch, (14, 3))
    keep = CheckpointConfig(every=4, keep_last=1)  # step 4's goes when the one of step 12 is to be saved
    config = configured(tmp_path, health=Health(not_finite=RollBack(margin=7)), checkpoint=keep)
    with pytest.raises(CheckpointError, match="no state of step 6 or before is left"):
        run(config, monkeypatch)
    assert (config.run_dir / "checkpoints/12/manifest.json").exists()


def test_a_run_goes_back_to_before_a_spike_began_although_it_was_saved_within(tmp_path, monkeypatch):
    after_steps(monkeypatch, (9, 10, 11), lambda state, metrics: (state, metrics | {"train/loss": metrics["train/loss"] + 5}))
    spikes = RollBackSpikes(window=8, warmup=0, margin=1)
    config = configured(tmp_path, health=Health(spikes=spikes))
    assert run(config, monkeypatch) == 0
    (event,) = record(config)
    assert (event["steps"], event["restored"], len(event["examples"])) == ([8, 11], 5, 32)
    assert [row["step"] for row in result(config)[0]] == list(range(1, STEPS + 1))


def test_a_spike_goes_back_to_before_it_began():
    """The loop raises what the judge says; here what follows from it."""
    data = data_of()
    verdict = Rewind("a spike", 303, 305, RollBackSpikes(margin=3))
    event, start = roll_back(verdict, (), data, lambda step: Start("state", step - step % 100))
    assert (event.steps, start.step, event.position) == ((300, 305), 200, 299 * 8)
    assert [put.id for put in event.examples] == [name for step in range(299, 305) for name in data.ids(step)]


def test_the_first_step_can_be_bad():
    event, start = roll_back(Rewind("bad", 1, 1, RollBack(margin=9)), (), data_of(), lambda step: Start("state", step))
    assert (event.steps, start.step, event.position) == ((1, 1), 0, 0)
