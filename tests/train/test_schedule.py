"""Schedules equal their closed forms at the points that matter."""

import dataclasses
import math

import numpy as np
import pytest

from jaxtrain.train.schedule import WSD, Cosine, Linear
from tests.resilience.runs import configured, run
from tests.resilience.values import CONFIG

STEPS = 1000
EXACT = 1e-6  # relative; one fp32 rounding or two


@pytest.mark.parametrize("schedule", [Cosine(warmup=10), Linear(warmup=10), WSD(warmup=10)])
def test_the_rate_rises_linearly_to_the_peak_and_no_update_is_wasted(schedule):
    factors = [float(schedule.factor(step, STEPS)) for step in range(10)]
    expected = [(step + 1) / 10 for step in range(10)]
    np.testing.assert_allclose(factors, expected, rtol=EXACT)


@pytest.mark.parametrize("schedule", [Cosine(final=0.25), Linear(final=0.25), WSD(final=0.25)])
def test_the_last_update_has_the_final_rate(schedule):
    assert float(schedule.factor(STEPS - 1, STEPS)) == pytest.approx(0.25, rel=EXACT)


def test_cosine_is_a_cosine_between_warmup_and_the_end():
    for step in (100, 333, 640, 999):
        done = (step - 100) / (STEPS - 1 - 100)
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
        assert float(Cosine(warmup=100, final=0.1).factor(step, STEPS)) == pytest.approx(expected, rel=1e-5)


def test_wsd_is_flat_until_its_decay_begins():
    factors = [float(WSD(warmup=10, decay=0.2).factor(step, STEPS)) for step in (10, 500, 800)]
    assert factors == [1.0, 1.0, 1.0]
    assert float(WSD(warmup=10, decay=0.2).factor(900, STEPS)) == pytest.approx(1 - 100 / 199, rel=1e-5)


def test_a_run_of_one_step_has_a_rate():
    assert float(Cosine(warmup=0).factor(0, 1)) > 0


@pytest.mark.parametrize("warmup", [1, 2])
def test_a_warm_up_that_outlasts_the_run_is_said(tmp_path, monkeypatch, capsys, warmup):
    optim = dataclasses.replace(CONFIG.optim, schedule=Linear(warmup=warmup))
    assert run(configured(tmp_path, steps=2, optim=optim), monkeypatch) == 0
    assert ("the rate rises to the end and never decays" in capsys.readouterr().out) == (warmup == 2)
