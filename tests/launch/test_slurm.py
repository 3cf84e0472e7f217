"""The batch script: what it asks Slurm for, when it queues itself again, and what a user is told. Slurm is not needed."""

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.errors import ConfigError, LayoutError, RunError
from jaxtrain.launch import command
from jaxtrain.launch.slurm import main

ROOT = Path(__file__).parents[2]
CONFIG = "from tests.tiny import TINY as config"
DEADLINE_S = 30


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with the config, in which the command is given, and a folder for programs that is first on the PATH."""
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def program(place: Path, name: str, body: str) -> None:
    path = place / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def printed(capsys, *argv: str) -> str:
    assert main(["config.py", "--dry-run", *argv]) == 0
    return capsys.readouterr().out


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_the_script_asks_for_whole_nodes_one_task_each_a_warning_and_another_turn(capsys, place):
    script = printed(capsys, "--nodes", "4", "--gpus-per-node", "2", "--time", "2-00:00:00", "--grace-seconds", "90")
    asked = directives(script)
    assert {"nodes=4", "ntasks-per-node=1", "gpus-per-node=2", "exclusive", "mem=0", "time=2-00:00:00"} <= {*asked}
    assert {"requeue", "open-mode=append", "signal=TERM@90", "dependency=singleton", "job-name=tiny"} <= {*asked}
    assert {f"chdir={place}", f"output={place}/runs/tiny/slurm-%j.out"} <= {*asked}
    assert "export JAXTRAIN_GRACE_SECONDS=90" in script
    assert not (place / "runs").exists()


def test_what_was_not_asked_for_is_not_in_the_script(capsys):
    asked = directives(printed(capsys, "--nodes", "1", "--gpus-per-node", "0"))
    assert not [line for line in asked if line.startswith(("gpus", "time", "partition"))]


def test_options_of_sbatch_are_passed_on_last_so_that_they_win(capsys):
    argv = ("--nodes", "1", "--gpus-per-node", "0", "--sbatch", "partition=gpu", "account=me", "no-requeue")
    assert directives(printed(capsys, *argv))[-3:] == ["partition=gpu", "account=me", "no-requeue"]


def test_each_host_runs_the_same_words_and_they_survive_the_shell(capsys, place):
    argv = ("--nodes", "1", "--gpus-per-node", "0", "--fake-devices", "2", "--accept-changes", "--name", "it's a 'run'")
    script = printed(capsys, *argv)
    program(place, "srun", f"printf '%s\\n' \"$@\" > {place}/said")
    subprocess.run(["bash", "-c", script], check=True, timeout=DEADLINE_S)
    words = (place / "said").read_text().splitlines()
    trainer = [sys.executable, "-m", "jaxtrain", "launch", "config.py", "--fake-devices", "2", "--accept-changes"]
    assert words[words.index(sys.executable) :] == [*trainer, "--name", "it's a 'run'"]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=repr)
def test_a_word_of_several_lines_leaves_the_header_a_comment(capsys, place, end):
    sample = "from jaxtrain.observe.ending import Sample\nconfig = dataclasses.replace(config, endings=(Sample(prompts=('',)),))"
    (place / "config.py").write_text(f"import dataclasses\n{CONFIG}\n{sample}\n")
    word = f"def f():{end}touch {place}/ran{end}"
    script = printed(capsys, "--nodes", "1", "--gpus-per-node", "0", "--endings.0.prompts", word)
    lines = script.split("\n")
    assert all(line.startswith("#") for line in lines[: lines.index("#SBATCH --nodes=1")])
    program(place, "srun", f"printf '%s' \"${{@: -1}}\" > {place}/said")
    subprocess.run(["bash", "-c", script], check=True, timeout=DEADLINE_S)
    assert (place / "said").read_bytes().decode() == word and not (place / "ran").exists()


@pytest.mark.parametrize(
    ("code", "saves", "again"),
    [(0, True, False), (2, True, False), (65, True, False), (74, False, True), (75, False, True), (1, False, False), (1, True, True), (137, True, True)],
)
def test_the_job_is_queued_again_after_preemption_and_after_a_failure_that_made_progress(capsys, place, code, saves, again):
    script = printed(capsys, "--nodes", "1", "--gpus-per-node", "0")
    checkpoints = place / "runs/tiny/checkpoints"
    (checkpoints / "50").mkdir(parents=True)
    (checkpoints / "125.saving").mkdir()
    program(place, "srun", f"{f'mkdir {checkpoints}/100' if saves else ':'}; exit {code}")
    program(place, "scontrol", f'echo "$@" > {place}/scontrol')
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == code and done.stderr == ""
    assert (place / "scontrol").exists() == again == ("queued again" in done.stdout)
    assert not again or (place / "scontrol").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("life", "code"), [("ended 0", 0), ("ended 65", 65), ("17 3", 137)])
def test_the_jobs_code_is_that_of_its_lead_and_not_of_a_host_that_was_lost(capsys, place, life, code):
    script = printed(capsys, "--nodes", "2", "--gpus-per-node", "0", "--fake-devices", "1")
    terms = place / "runs/tiny/terms"
    terms.mkdir(parents=True)
    for name, text in (("1", ""), ("1.life", "ended 75")):  # of the job before
        (terms / name).write_text(text)
    program(place, "srun", f"echo > {terms}/2; printf '{life:<32}' > {terms}/2.life; exit 137")
    program(place, "scontrol", ":")
    done = subprocess.run(["bash", "-c", script], env=os.environ | {"SLURM_JOB_ID": "7"}, timeout=DEADLINE_S)
    assert done.returncode == code


def test_it_is_written_into_the_run_folder_to_be_read_and_run_and_submitted(capsys, place):
    program(place, "sbatch", f'echo "$@" > {place}/sbatch; echo "41;cluster"')
    argv = ["config.py", "--nodes", "1", "--gpus-per-node", "0", "--steps", "5"]
    assert command.main(["--slurm", *argv]) == 0
    path = place / "runs/tiny/slurm.sh"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert f"made anew by: jaxtrain launch --slurm {shlex.join(argv)}\n" in path.read_text()
    assert (place / "sbatch").read_text() == "--parsable runs/tiny/slurm.sh\n"
    said = capsys.readouterr().out
    assert "scancel 41" in said and f"{place}/runs/tiny/slurm-41.out" in said and "sbatch runs/tiny/slurm.sh" in said


def test_what_sbatch_says_against_it_is_passed_on(place):
    program(place, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(RunError, match="sbatch refused the job") as error:
        main(["config.py", "--nodes", "1", "--gpus-per-node", "0"])
    assert "invalid partition specified: gpu" in error.value.got and "runs/tiny/slurm.sh" in error.value.fix


def test_where_there_is_no_slurm_the_script_is_there_all_the_same(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place / "bin"))
    with pytest.raises(RunError, match="sbatch is not here") as error:
        main(["config.py", "--nodes", "1", "--gpus-per-node", "0"])
    assert "login node" in error.value.fix and (place / "runs/tiny/slurm.sh").exists()


@pytest.mark.parametrize(
    ("argv", "kind", "what"),
    [
        ([], ConfigError, "--nodes is missing"),
        (["--nodes", "0"], ConfigError, "--nodes 0 is too small"),
        (["--nodes", "two"], ConfigError, "cannot be run"),
        (["--node", "2"], ConfigError, "unknown override --node"),
        (["--nodes", "2", "--gpus-per-node", "-1"], ConfigError, "--gpus-per-node -1 is too small"),
        (["--nodes", "1", "--grace-seconds", "0"], ConfigError, "--grace-seconds 0 is too small"),
        (["--nodes", "1", "--gpus-per-node", "8", "--mesh.fsdp", "3"], LayoutError, "cannot fill 8 devices"),
        (["--nodes", "3", "--gpus-per-node", "0"], LayoutError, "does not divide"),
        (["--nodes", "1", "--gpus-per-node", "0", "--sbatch=--partition=gpu"], ConfigError, "--sbatch does not take this"),
    ],
)
def test_what_could_not_run_is_refused_before_it_waits_in_a_queue(argv, kind, what):
    with pytest.raises(kind, match=what):
        main(["config.py", "--dry-run", *argv])


def test_the_help_of_launch_names_the_clusters_and_each_has_its_own(capsys):
    command.main(["--help"])
    assert "jaxtrain launch --slurm --help" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--slurm", "--help"])
    assert "--gpus-per-node" in capsys.readouterr().out
