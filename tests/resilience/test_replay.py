"""Steps computed again: equal where nothing happened; where something did, the array and the step are named."""

import json

import jax
import pytest

from jaxtrain import runtime
from jaxtrain.resilience.health import Health, RollBack
from jaxtrain.resilience.replay import report
from tests.resilience.runs import cache, configured, flip_at, poison_examples, run  # noqa: F401


@pytest.fixture
def replayed(monkeypatch):
    def replay(config, step):
        monkeypatch.setattr(runtime, "devices", lambda: jax.devices()[:2])
        rows, differs = report(config, step, lead=True)
        return "\n".join(rows), differs

    return replay


@pytest.mark.slow
def test_a_run_is_computed_again_to_the_same_bits_also_behind_a_rollback(tmp_path, monkeypatch, replayed):
    poison_examples(monkeypatch, (7, 3))
    config = configured(tmp_path, health=Health(not_finite=RollBack()))
    assert run(config, monkeypatch) == 0
    said, differs = replayed(config, 10)
    assert not differs and "steps 6 to 10 computed again from the checkpoint of step 5, twice" in said
    assert said.count(" equal") == 3
    said, differs = replayed(config, 4)
    assert not differs and "from the seed" in said and "not there to compare with" in said
    (config.run_dir / "checkpoints/10/manifest.json").write_text("{}")
    said, differs = replayed(config, 12)
    assert not differs and "from the checkpoint of step 5" in said  # the damaged one is left out


def test_a_bit_that_flipped_on_all_copies_is_found_and_the_step_of_its_first_effect_named(tmp_path, monkeypatch, replayed):
    config = configured(tmp_path)
    flip_at(monkeypatch, 7, jax.devices()[:2], leaf="embed_VD", bit=22)
    assert run(config, monkeypatch) == 0
    said, differs = replayed(config, 10)
    assert differs and "the two replays                 equal" in said
    (checkpoint,) = [line for line in said.splitlines() if "the checkpoint of step 10" in line and "DIFFER" in line]
    assert "params/embed_VD" in checkpoint
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert f"DIFFER: step 8: {rows[7]['train/loss']}" in said
