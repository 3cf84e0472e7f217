"""The overhead benchmark counts whole periods of what it measures, and refuses a run that has none."""

import sys

import pytest

from benchmarks import overhead
from jaxtrain.errors import ConfigError


@pytest.mark.parametrize(("steps", "counted"), [(65, 20), (84, 20), (85, 40), (104, 40), (200, 140)])
def test_what_is_counted_begins_and_ends_at_the_same_distance_from_a_snapshot(steps, counted):
    assert overhead.counted(steps) == counted and counted % overhead.EVERY == 0
    assert overhead.FIRST + counted < steps  # the last one saves


@pytest.mark.parametrize("steps", [1, 30, 41, 64])
def test_a_run_too_short_to_count_anything_is_refused_with_what_works(steps, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--steps", str(steps)])
    with pytest.raises(ConfigError, match="nothing to count") as error:
        overhead.main()
    assert error.value.fix == "--steps 65"
