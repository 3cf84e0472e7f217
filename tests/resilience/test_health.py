"""The judge of each step: policies, the spike detector against NumPy in float64, and that resuming changes no verdict."""

import numpy as np
import pytest

from jaxtrain.errors import ConfigError
from jaxtrain.resilience.health import (
    Halted, Health, Judge, Rewind, RollBack, RollBackSpikes, Skip, Skipped, Stop, spike_limit,
)  # fmt: skip

NAN = float("nan")
SPIKES = RollBackSpikes(window=32, warmup=100)


def verdicts(judge, losses, first=1, norm=1.0):
    return [judge.verdict(first + i, {"train/loss": x, "train/grad_norm": norm}) for i, x in enumerate(losses)]


def curve(steps, seed):
    """A loss that falls as a power law, with noise whose tails are heavier than normal (Student's t of 4)."""
    noise = np.random.default_rng(seed).standard_t(4, steps)
    return (1.8 + 9.0 * np.arange(1, steps + 1) ** -0.35 + 0.05 * noise).tolist()


@pytest.mark.parametrize("metrics", [(NAN, 1.0), (float("inf"), 1.0), (2.0, NAN), (2.0, float("inf"))])
def test_a_loss_or_gradient_norm_that_is_not_finite_is_bad_by_every_policy(metrics):
    loss, norm = metrics
    for policy, kind in ((Stop(), Halted), (Skip(), Skipped), (RollBack(), Rewind)):
        (verdict,) = verdicts(Judge(Health(not_finite=policy)), [loss], first=7, norm=norm)
        assert type(verdict) is kind and "at step 7" in verdict.why


def test_rolling_back_names_the_bad_step_alone():
    (verdict,) = verdicts(Judge(Health(not_finite=RollBack())), [NAN], first=7)
    assert (verdict.first, verdict.last) == (7, 7)


def test_skipping_ends_where_more_than_the_limit_are_bad_in_a_row_and_a_good_step_counts_anew():
    judge = Judge(Health(not_finite=Skip(limit=2)))
    kinds = [type(v) for v in verdicts(judge, [NAN, NAN, 2.0, NAN, NAN, NAN])]
    assert kinds == [Skipped, Skipped, type(None), Skipped, Skipped, Halted]


def test_the_spike_limit_is_that_of_numpy_in_float64():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        losses = np.float32(draw.normal(3.0, draw.uniform(0.001, 0.5), int(draw.integers(8, 200))))
        wide = losses.astype(np.float64)
        middle = np.median(wide)
        expected = middle + max(12.0 * np.median(np.abs(wide - middle)), 0.1)
        assert spike_limit(wide.tolist(), RollBackSpikes()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_noisy_but_healthy_curve_raises_no_alarm(seed):
    assert verdicts(Judge(Health(spikes=RollBackSpikes(warmup=100))), curve(20_000, seed)) == [None] * 20_000


def test_a_constant_loss_that_rises_a_little_raises_no_alarm():
    assert not any(verdicts(Judge(Health(spikes=SPIKES)), [2.0] * 300 + [2.05] * 300))


@pytest.mark.parametrize("height", [1.2, 3.0, 100.0])
def test_a_spike_is_found_when_it_has_lasted_and_its_steps_are_named(height):
    losses = curve(400, seed=5)
    losses[300:] = [x + height for x in losses[300:]]
    found = verdicts(Judge(Health(spikes=SPIKES)), losses)
    assert not any(found[:302])
    assert (found[302].first, found[302].last) == (301, 303) and "at step 303" in found[302].why


def test_one_odd_batch_is_no_spike_and_hides_none():
    losses = curve(400, seed=6)
    losses[200] += 50
    losses[300:] = [x + 2 for x in losses[300:]]
    found = verdicts(Judge(Health(spikes=SPIKES)), losses)
    assert not any(found[:302]) and found[302]


def test_no_spike_is_seen_in_the_warm_up_or_before_the_window_is_full():
    assert not any(verdicts(Judge(Health(spikes=SPIKES)), [2.0] * 60 + [9.0] * 40))
    assert not any(verdicts(Judge(Health(spikes=SPIKES)), [2.0] * 20 + [9.0] * 11, first=1000))


def test_a_judge_that_resumes_from_its_memory_judges_as_one_that_was_never_stopped():
    health = Health(not_finite=Skip(limit=2), spikes=SPIKES)
    losses = curve(300, seed=7)
    losses[250:] = [x + 3 for x in losses[250:]]
    losses[120:122] = [NAN, NAN]
    whole, judge, pieces = verdicts(Judge(health), losses), Judge(health), []
    for step, loss in enumerate(losses, 1):
        judge = Judge(health, judge.memory())
        pieces += verdicts(judge, [loss], first=step)
    assert list(map(str, pieces)) == list(map(str, whole))


def test_without_policies_there_is_nothing_to_remember():
    judge = Judge(Health())
    verdicts(judge, curve(50, seed=0))
    assert judge.memory() == {}


def test_a_policy_that_means_nothing_is_refused():
    for kind, values in ((Skip, {"limit": 0}), (RollBack, {"margin": -1}), (RollBackSpikes, {"window": 2}), (Health, {"hash_every": -1})):
        with pytest.raises(ConfigError, match="at least"):
            kind(**values)
