"""What the same command finds in its run folder: checkpoints whose manifests are gone, side files that are damaged."""

import shutil
from dataclasses import dataclass

import pytest

from jaxtrain.errors import CheckpointError, RunError
from jaxtrain.resilience import verified
from jaxtrain.resilience.tiers import run_name
from jaxtrain.resilience.verified import Verified
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


def test_a_checkpoint_under_another_number_and_damaged_side_files_are_said_and_change_no_result(tmp_path, monkeypatch, capsys):
    config = configured(tmp_path)
    assert run(config, monkeypatch) == 0
    before, folder = result(config), config.run_dir / "checkpoints"
    for number in (STEPS, STEPS + 50):
        shutil.rmtree(folder / str(number), ignore_errors=True)
        shutil.copytree(folder / "10", folder / str(number))
    rows = config.run_dir / "metrics.jsonl"
    rows.write_bytes(b"{}\n" + rows.read_bytes())
    capsys.readouterr()
    assert run(config, monkeypatch) == 0
    said = capsys.readouterr()
    assert "resumed at step 15" in said.out and result(config) == before
    assert all(f"skipped the checkpoint of step {number}" in said.err for number in (STEPS, STEPS + 50))
    assert "metrics.jsonl: line 1 cannot be read" in said.err


@pytest.mark.parametrize("damaged", [b"", b"\xff" * 32, b"0" * 31])
def test_a_damaged_name_of_a_run_folder_is_made_anew_and_said(tmp_path, damaged, capsys):
    config = configured(tmp_path)
    config.run_dir.mkdir(parents=True)
    name = run_name(config)
    assert run_name(config) == name and not capsys.readouterr().err
    (config.run_dir / "identity").write_bytes(damaged)
    again = run_name(config)
    assert again != name and run_name(config) == again and capsys.readouterr().err.count("identity is damaged") == 1


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{}", b"\xff", b'{"differs": 60}', b'{"agreed": "5"}', b'{"agreed": 5, "differs": null}'])
def test_a_damaged_record_of_agreement_is_named(tmp_path, damaged):
    (tmp_path / verified.FILE).write_bytes(damaged)
    with pytest.raises(RunError, match="verified.json is damaged"):
        Verified(tmp_path, 1, lead=True)


@pytest.mark.parametrize("last, processes", [(b"", [3]), (b"null\n", []), (b"{}\n", []), (b"\xff\n", []), (b'{"st', [3])])
def test_a_damaged_last_difference_accuses_nobody(tmp_path, last, processes):
    record = Verified(tmp_path, 1, lead=True)
    record.differ(5, [Suspect(process=3)], "majority")
    with open(tmp_path / verified.EVENTS, "ab") as file:
        file.write(last)
    assert verified.accused(tmp_path) == processes


@dataclass
class Suspect:
    process: int
