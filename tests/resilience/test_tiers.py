"""What the same command finds in its run folder: checkpoints whose manifests are gone."""

import shutil

import pytest

from jaxtrain.errors import CheckpointError
from tests.resilience.runs import cache, configured, result, run  # noqa: F401
from tests.resilience.values import STEPS


def test_a_run_whose_checkpoints_have_lost_their_manifests_is_never_started_over(tmp_path, monkeypatch, capsys):
    config = configured(tmp_path)
    assert run(config, monkeypatch) == 0
    before, folder = result(config), config.run_dir / "checkpoints"
    (folder / str(STEPS) / "manifest.json").unlink()
    assert run(config, monkeypatch) == 0
    said = capsys.readouterr()
    assert f"skipped the checkpoint of step {STEPS}" in said.err and "resumed at step 15" in said.out
    assert result(config) == before and (folder / f"{STEPS}.damaged.1").is_dir()
    for manifest in folder.glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints in .* is whole"):
        run(config, monkeypatch)
    shutil.rmtree(folder)
    assert run(config, monkeypatch) == 0 and result(config) == before
