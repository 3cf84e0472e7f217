"""Updates that are not applied: inside the compiled step, bit for bit, and at no cost where the policy is another."""

import dataclasses

import jax
import numpy as np
import pytest

import meshes
from jaxtrain.checkpoint import digest
from jaxtrain.errors import NumericsError
from jaxtrain.observe.sinks import read_rows
from jaxtrain.resilience.health import Health, RollBack, Skip
from jaxtrain.train import step as steps
from jaxtrain.train.replicas import DiLoCo
from jaxtrain.train.state import Blueprint
from tests.resilience.runs import cache, configured, data_of, mesh_of, poison_examples, result, run  # noqa: F401
from tests.resilience.values import CONFIG, STEPS

SKIP = Health(not_finite=Skip(limit=2))


def _text(config):
    return steps.lowered(Blueprint(config, mesh_of(config, 2))).as_text()


def test_without_skipping_the_program_is_the_one_that_knows_of_no_policy(monkeypatch):
    texts = {kind: _text(dataclasses.replace(CONFIG, health=h)) for kind, h in (("stop", Health()), ("skip", SKIP))}
    monkeypatch.setattr(steps, "Skip", type("NoPolicy", (), {}))
    unknown = _text(dataclasses.replace(CONFIG, health=SKIP))
    assert texts["stop"] == unknown == _text(dataclasses.replace(CONFIG, health=Health(not_finite=RollBack(), hash_every=1)))
    assert texts["skip"] != unknown


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="together"),
        pytest.param(
            {"replicas": DiLoCo(every=3), "mesh": meshes.MeshConfig(replica=2, fsdp=1)}, id="diloco", marks=pytest.mark.slow
        ),
    ],
)
def test_a_bad_update_leaves_parameters_and_optimizer_bit_identical_and_the_next_is_applied(changes):
    config = dataclasses.replace(CONFIG, health=SKIP, **changes)
    mesh = mesh_of(config, 2)
    blueprint, data = Blueprint(config, mesh), data_of()
    step, state = steps.train_step(blueprint), blueprint.init()
    flags = jax.device_put(np.zeros(2, np.int32), meshes.per_device(mesh))

    def update(state, index, spoilt=False):
        batch = data.rows(index, np.arange(8))
        if spoilt:
            batch["weights"][3, 5] = np.inf
        return step(state, meshes.globalize(batch, mesh, config.rules, 8), flags)

    def hashes(state):
        return [digest({"params": state.params, "opt": state.opt, "outer": state.outer})]

    state, metrics = update(state, 0)
    assert int(metrics["train/skipped"]) == 0
    before = hashes(state)
    state, metrics = update(state, 1, spoilt=True)
    assert int(metrics["train/skipped"]) == 1 and not np.isfinite(metrics["train/loss"])
    assert hashes(state) == before and int(state.step) == 2
    state, metrics = update(state, 2)
    assert int(metrics["train/skipped"]) == 0 and hashes(state) != before and np.isfinite(metrics["train/loss"])


def test_a_run_goes_on_past_a_bad_step_and_its_row_says_so(tmp_path, monkeypatch, capsys):
    poison_examples(monkeypatch, (7, 3))
    config = configured(tmp_path, health=SKIP, log_every=5)
    assert run(config, monkeypatch) == 0
    rows = {row["step"]: row for row in read_rows(config.run_dir / "metrics.jsonl")}
    assert sorted(rows) == [5, 7, 10, 15, STEPS]
    assert [row["train/skipped"] for row in rows.values()] == [0, 1, 0, 0, 0]
    assert "train/loss" not in rows[7] and "train/learning_rate" in rows[7]
    assert "train/loss is nan at step 7: its update is skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_bad_step_a_run_that_would_skip_computes_what_one_that_would_stop_does(tmp_path, monkeypatch):
    results = []
    for name, health in (("a", Health()), ("b", SKIP)):
        config = configured(tmp_path, name, health)
        assert run(config, monkeypatch) == 0
        rows, last = result(config)
        results.append(([{k: v for k, v in row.items() if k != "train/skipped"} for row in rows], last))
    assert results[0] == results[1]


def test_more_bad_steps_in_a_row_than_the_limit_stop_the_run(tmp_path, monkeypatch):
    poison_examples(monkeypatch, (7, 3), (8, 0), (9, 1))
    with pytest.raises(NumericsError, match="at step 9, and so were the 2 before it") as caught:
        run(configured(tmp_path, health=SKIP), monkeypatch)
    assert "the last good checkpoint is step 5" in str(caught.value)
