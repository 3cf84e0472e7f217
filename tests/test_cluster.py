"""Who a process is, by the environment that its starter gave it."""

import pytest

from jaxtrain.cluster import Member, few, member
from jaxtrain.errors import RunError

OURS = {"JAXTRAIN_COORDINATOR": "host-a:9000", "JAXTRAIN_NUM_PROCESSES": "4", "JAXTRAIN_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911",
}
# jax's rule for the port, jax/_src/clusters/slurm_cluster.py and ompi_cluster.py
FIRST_PORT = 65535 - 2**12 + 1


@pytest.fixture
def found(monkeypatch):
    """found(env) -> member() of a process that has this environment."""

    def in_environment(env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return member()

    return in_environment


@pytest.mark.parametrize(
    "env", [{}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}]
)
def test_a_process_that_nobody_gave_peers_is_alone(env):
    assert member(env) is None


def test_one_task_under_slurm_is_alone(found):
    assert found(SLURM | {"SLURM_NTASKS": "1"}) is None


def test_our_own_variables_say_who_this_is_whatever_else_is_there(found):
    assert found(OURS) == Member(coordinator="host-a:9000", count=4, index=2)
    assert found(SLURM | OURS) == Member(coordinator="host-a:9000", count=4, index=2)


def test_one_process_by_our_own_variables_is_alone_whatever_else_is_there():
    assert member(SLURM | {"JAXTRAIN_NUM_PROCESSES": "1"}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"JAXTRAIN_PROCESS_ID": "4"},
        {"JAXTRAIN_PROCESS_ID": "-1"},
        {"JAXTRAIN_PROCESS_ID": ""},
        {"JAXTRAIN_NUM_PROCESSES": "many"},
        {"JAXTRAIN_COORDINATOR": "host-a"},
        {"JAXTRAIN_COORDINATOR": ":9000"},
        {"JAXTRAIN_COORDINATOR": "host-a:0"},
        {"JAXTRAIN_COORDINATOR": "host-a:65536"},
        {"JAXTRAIN_SERVICE": "host-a:70000"},
    ],
)
def test_our_own_variables_that_make_no_sense_are_refused(change):
    with pytest.raises(RunError, match="JAXTRAIN_"):
        member(OURS | change)


@pytest.mark.parametrize("absent", OURS)
def test_our_own_variables_come_all_three_or_not_at_all(absent):
    with pytest.raises(RunError, match="all three"):
        member({name: value for name, value in OURS.items() if name != absent})


def test_slurm_with_one_task_per_node_takes_all_gpus_of_the_node(found):
    assert found(SLURM) == Member(coordinator=f"node07:{FIRST_PORT + 4100 % 2**12}", count=2, index=1, gpus=None)


def test_slurm_with_several_tasks_per_node_takes_the_gpu_of_the_local_rank(found):
    assert found(SLURM | {"SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}).gpus == [3]


def test_slurm_that_bound_gpus_to_tasks_leaves_each_task_what_it_sees(found):
    assert found(SLURM | {"SLURM_NTASKS": "16", "SLURM_LOCALID": "3", "SLURM_GPUS_PER_TASK": "1"}).gpus is None


def test_open_mpi_with_several_processes_per_host(found):
    port = FIRST_PORT + 1314521088 // 2**12 % 2**12
    assert found(OPEN_MPI) == Member(coordinator=f"10.96.0.1:{port}", count=4, index=3, gpus=[1])


def test_open_mpi_with_one_process_per_host_takes_all_its_gpus(found):
    assert found(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}).gpus is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # jax's own, about the kubernetes package
def test_an_indexed_kubernetes_job_without_jaxs_package_does_not_train_alone(found):
    with pytest.raises(RunError, match="Kubernetes started this process") as error:
        found({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"})
    assert "jax[k8s]" in error.value.fix and "JAXTRAIN_COORDINATOR" in error.value.fix


def test_open_mpi_that_jax_cannot_read_does_not_train_alone(found):
    with pytest.raises(RunError, match="Open MPI started this process"):
        found({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"})


def test_long_lists_are_cut_and_counted():
    assert few([1, 2]) == "1, 2"
    assert few(range(11)) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
