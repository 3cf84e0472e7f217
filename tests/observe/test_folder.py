"""A run folder belongs to one config and one live process, and never loses what it had."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from jaxtrain.errors import ConfigError, HeldError, RunError
from jaxtrain.observe.folder import RunFolder
from jaxtrain.train.optim import AdamW
from tests.disk import disk, fill  # noqa: F401
from tests.tiny import TINY


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(TINY, runs_dir=str(tmp_path))


def _open(config, **kwargs):
    RunFolder(config, {"python": "3"}, **kwargs).close()


def _saved(config):
    """As after a first checkpoint: from here on the folder is a run that can be continued."""
    (config.run_dir / "checkpoints" / "5").mkdir(parents=True)
    (config.run_dir / "checkpoints" / "5" / "manifest.json").write_text("{}")


def test_a_folder_says_what_ran_and_on_what(config):
    _open(config)
    kept = json.loads((config.run_dir / "config.json").read_text())
    assert kept["steps"] == 10
    assert kept["optim"]["type"] == "jaxtrain.train.optim.AdamW"
    assert json.loads((config.run_dir / "environment.json").read_text()) == {"python": "3"}


def test_another_config_is_refused_with_the_difference_and_overwrites_nothing(config):
    _open(config)
    _saved(config)
    before = (config.run_dir / "config.json").read_bytes()
    other = dataclasses.replace(config, optim=AdamW(peak_lr=1e-2))
    with pytest.raises(ConfigError, match=r"optim\.peak_lr: 0\.0003 -> 0\.01"):
        _open(other)
    assert (config.run_dir / "config.json").read_bytes() == before


def test_an_accepted_change_is_kept_beside_the_first_config(config, capsys):
    _open(config)
    _saved(config)
    _open(dataclasses.replace(config, steps=20), accept_changes=True)
    assert "steps: 10 -> 20" in capsys.readouterr().out
    assert json.loads((config.run_dir / "config.json").read_text())["steps"] == 10
    assert json.loads((config.run_dir / "config.1.json").read_text())["steps"] == 20
    _open(dataclasses.replace(config, steps=20))  # the newest config is the one that continues


def test_a_config_that_cannot_be_read_is_an_error_with_a_fix(config):
    _open(config)
    _saved(config)
    (config.run_dir / "config.json").write_text("")
    with pytest.raises(ConfigError, match="(?s)config.json is damaged.*remove it"):
        _open(config)


def test_a_folder_without_a_checkpoint_takes_the_corrected_config(config):
    _open(config)
    _open(dataclasses.replace(config, steps=20))
    assert json.loads((config.run_dir / "config.json").read_text())["steps"] == 20


def test_a_run_that_starts_over_with_another_config_loses_nothing_and_is_continued_by_its_own_command(config, capsys):
    _open(config)
    _saved(config)
    _open(dataclasses.replace(config, log_every=5))  # config.1.json
    (config.run_dir / "metrics.jsonl").write_text('{"step": 5}\n')
    shutil.rmtree(config.run_dir / "checkpoints")
    other = dataclasses.replace(config, steps=20)
    _open(other)
    assert "what was trained before is in before.1" in capsys.readouterr().out
    aside = {path.name: path.read_text() for path in (config.run_dir / "before.1").iterdir()}
    assert aside["metrics.jsonl"] == '{"step": 5}\n' and json.loads(aside["config.json"])["steps"] == 10
    assert "config.1.json" in aside and not (config.run_dir / "config.1.json").exists()
    _saved(config)
    _open(other)
    assert len(list(config.run_dir.glob("before.*"))) == 1


def test_a_checkpoint_without_its_manifest_still_guards_the_config(config):
    _open(config)
    _saved(config)
    (config.run_dir / "checkpoints" / "5" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="belongs to a run of another config"):
        _open(dataclasses.replace(config, steps=20))


def test_the_refusal_lists_only_what_stands_in_the_way(config):
    _open(config)
    _saved(config)
    with pytest.raises(ConfigError) as error:
        _open(dataclasses.replace(config, seed=3, log_every=7))
    assert "seed: 0 -> 3" in str(error.value)
    assert "log_every" not in str(error.value)


def test_another_mesh_continues_the_run(config):
    _open(config)
    _saved(config)
    _open(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, tensor=2)))


def test_a_folder_in_use_names_its_holder_and_is_free_after_a_kill(config):
    hold = (
        "import dataclasses, sys, time; from tests.tiny import TINY; from jaxtrain.observe.folder import RunFolder;"
        "folder = RunFolder(dataclasses.replace(TINY, runs_dir=sys.argv[1]), {}); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, config.runs_dir], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HeldError, match=f"process {holder.pid} on "):
            _open(config)
        os.kill(holder.pid, signal.SIGKILL)
    _open(config)


def test_a_folder_that_cannot_be_made_is_an_error_with_a_fix(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the run folder"):
        _open(dataclasses.replace(config, runs_dir=str(tmp_path / "file")))


@pytest.mark.parametrize("saved", [True, False])
def test_a_full_disk_keeps_no_run_that_exists_from_going_on_and_it_is_said_once(config, disk, capsys, saved):
    config = dataclasses.replace(config, runs_dir=str(disk))
    _open(config)
    if saved:
        _saved(config)
    fill(disk)
    RunFolder(config, {"python": "4"}).close()
    (said,) = capsys.readouterr().err.splitlines()
    assert "environment.json is not written (No space left on device); the run goes on" in said
    _open(dataclasses.replace(config, accumulate=2))  # as on fewer hosts
    assert json.loads((config.run_dir / "config.json").read_text())["accumulate"] == config.accumulate
    assert json.loads((config.run_dir / "environment.json").read_text()) == {"python": "3"}
    assert not [*config.run_dir.glob("*.tmp")]


def test_a_full_disk_refuses_a_fresh_run_and_one_whose_config_is_to_be_another(config, disk):
    config = dataclasses.replace(config, runs_dir=str(disk))
    other = dataclasses.replace(config, steps=20)
    _open(config)
    file = fill(disk)
    for refused in (other, dataclasses.replace(config, name="fresh")):
        with pytest.raises(RunError, match="(?s)cannot write the run folder.*No space left"):
            _open(refused)
    file.unlink()
    _saved(config)
    fill(disk)
    with pytest.raises(RunError, match="(?s)cannot write the run folder.*No space left"):
        _open(other, accept_changes=True)
