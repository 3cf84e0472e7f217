"""The loss curve is drawn from whatever rows a run folder has."""

import json

import numpy as np
from matplotlib.image import imread

from jaxtrain.observe.plot import plot_loss

ROWS = [{"step": step, "train/loss": 3.0 / step} for step in range(1, 50)] + [{"step": 49, "eval/loss": 1.0}]


def _inked(folder, rows) -> float:
    """The part of the picture that is not white."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return float(np.mean(imread(plot_loss(folder))[..., :3].min(axis=-1) < 0.9))


def test_a_run_without_rows_has_an_empty_picture_and_one_with_rows_a_curve(tmp_path):
    assert 0 < _inked(tmp_path, []) < _inked(tmp_path, ROWS)


def test_a_loss_that_is_no_number_is_left_out(tmp_path):
    whole = _inked(tmp_path, ROWS)
    assert _inked(tmp_path, [*ROWS, {"step": 50, "train/loss": "much"}, {"step": 51, "train/loss": None}]) == whole
