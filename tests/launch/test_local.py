"""The command line of `jaxtrain launch`; what it starts is tested in tests/resilience and tests/process."""

import os

import pytest

from jaxtrain.errors import ConfigError, DataError
from jaxtrain.launch import local
from jaxtrain.launch.local import Options, main, parse
from jaxtrain.resilience import faults
from jaxtrain.resilience.host import memory_folder
from jaxtrain.resilience.policy import Shelf


def test_own_flags_stand_on_either_side_of_the_config_and_the_rest_is_the_trainers():
    fault = faults.parse("kill:step=3")
    own = [["--processes", "4"], ["--devices-per-process=2"], ["--fault", "kill:step=3"], ["--spares", "1"]]
    for before in range(len(own) + 1):
        first, second = sum(own[:before], []), sum(own[before:], [])
        assert parse([*first, "c.py", "--steps", "3", *second, "--accept-changes"]) == (
            Options(processes=4, devices_per_process=2, spares=1, fault=(fault,)),
            ["c.py", "--steps", "3", "--accept-changes"],
        )
    assert parse(["c.py"]) == (Options(), ["c.py"])


@pytest.mark.parametrize(
    "argv, what, fix",
    [
        (["--procesess", "2", "c.py"], "has no flag --procesess", "did you mean '--processes'"),
        (["--processes", "two", "c.py"], "--processes needs a number", ""),
        (["--processes=0", "c.py"], "--processes needs a number", ""),
        (["--processes"], "--processes needs a number", ""),
        (["--fault", "kil:step=3", "c.py"], "no fault 'kil'", "did you mean 'kill'"),
        (["configs/quickstart.py", "--procesess", "2"], "unknown override --procesess", "did you mean '--processes'"),
        (["configs/quickstart.py", "--processes", "two"], "--processes needs a number", ""),
        (["--processes", "2"], "needs a CONFIG", "a file such as configs/quickstart.py"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(argv, what, fix):
    with pytest.raises(ConfigError, match=what) as error:
        main(argv)
    assert error.value.fix.startswith(fix)


def test_files_that_this_machine_does_not_have_are_missed_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "Host", None)
    with pytest.raises(DataError, match=f"no file matches '{tmp_path}/none/\\*.txt'"):
        main(["configs/quickstart.py", "--runs-dir", str(tmp_path), "--data.files", f"{tmp_path}/none/*.txt"])


def test_two_numbers_of_devices_are_refused(monkeypatch):
    monkeypatch.setattr(local, "Host", None)
    with pytest.raises(ConfigError, match="(?s)both say how many.*got   --devices-per-process 1, --fake-devices 2"):
        main(["configs/quickstart.py", "--processes", "2", "--devices-per-process", "1", "--fake-devices", "2"])


@pytest.mark.parametrize(
    ("own", "asked", "devices"),
    [((1, 0), None, 0), ((2, 0), None, 1), ((2, 3), None, 3), ((2, 0), 4, 4), ((1, 0), 4, 4)],
)
def test_each_process_has_the_devices_that_either_flag_says(own, asked, devices, monkeypatch):
    monkeypatch.setattr(local, "local_gpus", lambda: 0)
    options = Options(processes=own[0], devices_per_process=own[1])
    assert local._fake_devices(options, asked) == devices


def test_several_processes_on_a_host_with_gpus_are_refused_unless_their_cpu_devices_are_counted(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(local, "Host", None)
    with pytest.raises(ConfigError, match="(?s)GPUs idle.*got   2 GPUs.*one process drives all GPUs of a host"):
        main(["configs/quickstart.py", "--processes", "2"])
    assert local._fake_devices(Options(processes=2, devices_per_process=1), None) == 1
    assert local._fake_devices(Options(processes=2), 3) == 3
    assert local._fake_devices(Options(processes=1), None) == 0
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local._fake_devices(Options(processes=2), None) == 1


@pytest.mark.parametrize("argv", [["-h"], ["--help"]])
def test_help_shows_the_flags(argv, capsys):
    assert main(argv) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--devices-per-process int (default: 0) fake CPU devices of each process" in said and "kill SIGKILL" in said


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """supervised(*overrides) -> what a job's supervisor on host b of a and b is given; it starts nothing."""
    hosts = {"JAXTRAIN_HOSTS": "a:1,b:1", "JAXTRAIN_HOST_INDEX": "1", "JAXTRAIN_JOB_SECRET": "x" * 32}
    given = []
    for name, value in hosts.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local, "memory_folder", lambda run_dir, host: tmp_path / memory_folder(run_dir, host).name)
    monkeypatch.setattr(local, "Host", lambda *args, **fields: args[2])
    monkeypatch.setattr(local, "supervise", lambda *args: given.append(args) or 0)

    def start(*overrides):
        assert main(["--devices-per-process", "1", "configs/quickstart.py", "--runs-dir", str(tmp_path), *overrides]) == 0
        return given.pop()

    return start


def test_a_jobs_supervisor_knows_what_snapshots_may_take_of_its_host(supervised, tmp_path):
    folder = local.memory_folder(tmp_path / "mine", "b") / "snapshots"
    assert supervised("--name", "mine", "--snapshot.memory-gb", "3")[-1] == Shelf(folder, 3.0)
    assert supervised("--name", "mine")[-1] == Shelf(folder, None)
    assert supervised("--name", "mine", "--snapshot.every", "0")[-1] is None


def test_what_a_dead_run_left_in_memory_goes_when_another_starts_and_what_this_one_left_stays(supervised, tmp_path):
    folders = [local.memory_folder(tmp_path / name, host) for name, host in (("mine", "a"), ("mine", "b"), ("dead", "b"))]
    for folder in folders:
        folder.mkdir()
        os.utime(folder, (0, 0))
    assert supervised("--name", "mine")[0] == folders[1]
    assert [folder.exists() for folder in folders] == [True, True, False]
