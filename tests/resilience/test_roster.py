"""Which hosts a job has, from the variables that cluster managers set."""

import pytest

from jaxtrain.errors import RunError
from jaxtrain.resilience.roster import expanded, roster

SLURM = {"SLURM_JOB_ID": "41", "SLURM_STEP_NODELIST": "gpu-[01-02,07],login", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,3]x,y", ["n08x", "n09x", "n10x", "n3x", "y"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("run-host-0-[0-1].run:8476", ["run-host-0-0.run:8476", "run-host-0-1.run:8476"]),
    ],
)
def test_a_list_of_hosts_is_expanded_as_slurm_writes_it(text, names):
    assert expanded(text) == names


def test_slurm_tells_the_hosts_and_the_job_their_ports():
    found = roster(SLURM)
    assert found.names == ("gpu-01", "gpu-02", "gpu-07", "login") and found.name == "gpu-07"
    assert [int(address.rpartition(":")[2]) for address in found.addresses] == [65536 - 4096 + 41 + n for n in range(4)]
    assert found.reach == "gpu-07"


def test_kubernetes_gives_the_index_and_the_manifest_the_hosts():
    env = {"JAXTRAIN_HOSTS": "r-host-0-[0-2].r:8476", "JOB_COMPLETION_INDEX": "1"}
    assert roster(env).name == "r-host-0-1.r"


def test_hosts_of_one_machine_are_called_by_their_ports():
    env = {"JAXTRAIN_HOSTS": "localhost:1,localhost:2", "JAXTRAIN_HOST_INDEX": "1"}
    assert roster(env).name == "localhost:2" and roster(env).reach == "localhost"


@pytest.mark.parametrize("env", [{}, SLURM | {"SLURM_NTASKS": "1"}, {"JAXTRAIN_HOSTS": "a:1", "JAXTRAIN_HOST_INDEX": "0"}])
def test_one_host_has_no_roster(env):
    assert roster(env) is None


@pytest.mark.parametrize(
    "env",
    [
        {"JAXTRAIN_HOSTS": "a:1,b:1"},
        {"JAXTRAIN_HOSTS": "a:1,b:1", "JAXTRAIN_HOST_INDEX": "2"},
        {"JAXTRAIN_HOSTS": "a:1,b", "JAXTRAIN_HOST_INDEX": "0"},
        {"JAXTRAIN_HOSTS": "a:1,a:1", "JAXTRAIN_HOST_INDEX": "0"},
        {"JAXTRAIN_HOSTS": "", "JAXTRAIN_HOST_INDEX": "0"},
        {"JAXTRAIN_HOSTS": "a:0,b:1", "JAXTRAIN_HOST_INDEX": "0"},
        {"JAXTRAIN_HOSTS": "a:65536,b:1", "JAXTRAIN_HOST_INDEX": "0"},
        SLURM | {"SLURM_NTASKS": "8"},
    ],
)
def test_what_does_not_tell_which_host_this_is_is_refused(env):
    with pytest.raises(RunError):
        roster(env)


@pytest.mark.parametrize("ranges", ["a-b", "", "1-", "-1", "1-2-3", "1,", "1,x"])
def test_brackets_that_hold_no_numbers_are_refused_as_they_stand(ranges):
    with pytest.raises(RunError, match="A list of hosts cannot be read") as error:
        roster({"JAXTRAIN_HOSTS": f"a:1,node-[{ranges}]:7600", "JAXTRAIN_HOST_INDEX": "0"})
    assert f"[{ranges}] in 'node-[{ranges}]:7600'" in error.value.got
