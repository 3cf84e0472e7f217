"""The command line: light, lazy, and every mistake gets its message and exit code."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtrain.__main__ import VERBS, main
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.errors import CheckpointError, ConfigError, CorruptionError, DataError, HeldError, LayoutError, NumericsError, RunError, UserError
from meshes.errors import DivisionError

ROOT = Path(__file__).parents[1]
HELP_SECONDS = 1.0


def _run(*argv):
    return subprocess.run([sys.executable, "-m", "jaxtrain", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


def _imported(*argv):
    """The modules that a command line imports."""
    words = [sys.executable, "-X", "importtime", "-m", "jaxtrain", *argv]
    lines = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60).stderr.splitlines()
    found = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "jaxtrain.errors" in found
    return found


@pytest.mark.parametrize("argv", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_comes_at_once_and_imports_no_jax(argv):
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = _run(*argv)
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert "usage: jaxtrain" in done.stdout
    assert min(seconds) < HELP_SECONDS
    assert "jax" not in _imported(*argv)


def test_the_help_of_a_config_lists_its_fields_in_time():
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = _run("train", "configs/quickstart.py", "--help")
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 2 * HELP_SECONDS
    assert "jax" not in _imported("train", "configs/quickstart.py", "--help")
    for flag in ("--steps", "--mesh.fsdp", "--optim.peak-lr", "--model.num-layers", "--checkpoint.every"):
        assert flag in done.stdout


def _help(capsys, *argv):
    """What it says, with single blanks."""
    try:
        assert main([*argv, "--help"]) == 0
    except SystemExit as done:
        assert done.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("verb", [["train"], ["show"], ["launch", "--processes", "2"], ["launch", "--slurm"]], ids=" ".join)
def test_the_help_of_a_config_lists_every_choice_and_what_the_overrides_make_of_it(verb, capsys):
    said = _help(capsys, *verb, "configs/quickstart.py", "--optim", "Lion", "--eval.every=7")
    for row in (
        "--optim AdamW, Lion, Muon; now Lion",
        "--optim.schedule Cosine, WSD, Linear; now Cosine",
        "--rules DP, ZERO1, ZERO2, FSDP, HSDP, TP, TP_SP, FSDP_TP, DEFAULT; now DEFAULT",
        "--eval None; in the config file also EvalConfig; now EvalConfig",
        "--data Synthetic; in the config file also Text, Jsonl, Parquet, Megatron, Mixture; now Text",
        "--replicas Together, DiLoCo; now Together",
        "--health.not-finite Stop, Skip, RollBack; now Stop",
    ):
        assert row in said
    assert "--eval.every INT (default: 7)" in said and "--optim.momentum" not in said


def test_a_flags_value_is_not_taken_for_the_config(capsys):
    assert "jaxtrain train CONFIG --help lists the fields" in _help(capsys, "train", "--name", "foo")


@pytest.mark.parametrize(("verb", "meaning"), [("train", "continue a run folder with a config that differs"), ("launch", "trainers of this host")])  # fmt: skip
def test_help_says_what_a_flag_means(verb, meaning, capsys):
    assert meaning in _help(capsys, verb)


def test_help_answers_an_override_that_is_unknown(capsys):
    assert main(["train", "configs/quickstart.py", "--stepz", "3", "--help"]) == 2
    assert "did you mean '--steps'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["show", "configs/quickstart.py"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(argv):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "jaxtrain", *argv], cwd=ROOT, stdout=write, stderr=-1, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_that_leaves_a_run_ends_it_as_any_other_command(tmp_path):
    (tmp_path / "config.py").write_text("from tests.tiny import TINY as config")
    command = [sys.executable, "-m", "jaxtrain", "train", "config.py", "--steps", "1000000", "--log-every", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=-1, stderr=-1, text=True) as run:
        try:
            read = [run.stdout.readline() for _ in range(4)]
            run.stdout.close()
            code = run.wait(timeout=60)
            said = run.stderr.read()
        finally:
            run.kill()
    assert "step       3/1000000" in read[3]
    assert (code, said) == (141, "")


def test_output_that_a_full_disk_does_not_take_is_an_error(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "jaxtrain"], cwd=ROOT, env=env, stdout=full, stderr=-1, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "RunError: the output was not written.\n  got   No space left on device\n")


@pytest.mark.parametrize("command", ["--help", "show configs/quickstart.py"])
def test_output_that_was_closed_before_the_start_is_no_error(command):
    line = f"{sys.executable} -m jaxtrain {command} >&-"
    done = subprocess.run(line, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UserError, 2),
        (ConfigError, 2),
        (LayoutError, 2),
        (DivisionError, 2),
        (DataError, 1),
        (CheckpointError, 1),
        (DamagedError, 1),
        (RunError, 1),
        (HeldError, 69),
        (NumericsError, 65),
        (CorruptionError, 76),
    ],
)
def test_what_the_user_did_wrong_is_not_tried_again_and_what_the_machine_did_is(kind, code, monkeypatch):
    def fails(argv):
        raise kind("so it is.")

    monkeypatch.setattr("jaxtrain.show.main", fails)
    assert main(["show"]) == code


def test_an_unknown_command_names_the_closest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_a_user_error_is_a_message_without_a_traceback(capsys):
    assert main(["train", "configs/quickstart.py", "--stepz", "5"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ConfigError: unknown override --stepz.")
    assert "did you mean '--steps'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["train", "show", "sample", "launch", "data prepare", "data order"])
def test_a_command_without_its_config_says_what_it_needs(verb, capsys):
    assert main(verb.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ConfigError: jaxtrain {verb} needs a CONFIG")
    assert "configs/quickstart.py" in err


def test_a_flag_of_the_command_itself_with_a_wrong_value_is_a_message(capsys):
    assert main(["train", "configs/quickstart.py", "--fake-devices", "many"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ConfigError: `jaxtrain train --fake-devices many` cannot be run.")
    assert "jaxtrain train --help" in err and "─" not in err


@pytest.mark.parametrize("flags", [["--prompt", "a b", "--prompt", "c"], ["--prompt=a b", "--tokens", "3", "--prompt=c"]])
def test_a_repeated_flag_of_several_values_is_answered_with_the_form_that_keeps_all(flags, capsys):
    assert main(["sample", "configs/quickstart.py", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ConfigError: --prompt is given 2 times.")
    assert "fix   --prompt 'a b' c\n" in err


def test_show_refuses_an_unknown_xla_flag(capsys):
    assert main(["show", "configs/quickstart.py", "--xla.gpu", "foo"]) == 2
    assert "xla.gpu of the config has 'foo', which this XLA does not know" in capsys.readouterr().err


def test_show_prints_values_sources_and_what_follows(capsys):
    assert main(["show", "configs/quickstart.py", "--optim.peak-lr", "1e-3"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.strip()}
    assert rows["optim.peak_lr"] == "override"
    assert rows["model.dim"] == "config"
    assert rows["optim.clip"] == "default"
    assert "FLOPs per step" in out
    assert "parameters" in out


def test_show_lays_the_config_out_on_fake_devices(capsys):
    argv = ["show", "configs/quickstart.py", "--fake-devices", "8"]
    assert main([*argv, "--mesh.data", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == "mesh data 2 x fsdp 4".split()
    assert main([*argv, "--mesh.fsdp", "3"]) == 2
    assert "LayoutError: the mesh cannot fill 8 devices." in capsys.readouterr().err
    assert main(["show", "configs/quickstart.py", "--mesh.fsdp", "3"]) == 0


@pytest.mark.parametrize("verb", ["show", "train", "launch"])
def test_no_fake_devices_are_no_devices(verb, capsys):
    assert main([verb, "configs/quickstart.py", "--fake-devices", "0"]) == 2
    assert "--fake-devices 0 is no number of devices" in capsys.readouterr().err


def test_show_names_what_was_chosen(capsys):
    assert main(["show", "configs/quickstart.py", "--optim", "Lion", "--data", "Synthetic", "--rules", "FSDP"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["model", "models.llama.Config", "config"],
        ["optim", "Lion", "override"],
        ["data", "Synthetic", "override"],
        ["rules", "FSDP", "override"],
        ["eval.data", "Text", "config"],
        ["replicas", "Together", "default"],
    ):
        assert row in rows
    assert main(["show", "configs/quickstart.py", "--rules.acts.K", "None"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 160


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads_without_jax_and_in_under_a_second(path):
    code = "import sys, time; t = time.process_time(); from jaxtrain.config import load; load(sys.argv[1]);"
    code += "print(time.process_time() - t, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, jax_is_there = done.stdout.split()
    assert float(seconds) < 1.0
    assert jax_is_there == "False"
