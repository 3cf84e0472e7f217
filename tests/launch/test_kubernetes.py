"""The JobSet manifest, read back as YAML. No cluster is needed, and none has seen it here."""

import shlex

import pytest
import yaml

from jaxtrain.errors import ConfigError
from jaxtrain.launch import command
from jaxtrain.launch.kubernetes import main

# The fields that jobset.x-k8s.io/v1alpha2 and batch/v1 have where the manifest uses them; "*": any name.
POD = {
    "restartPolicy": {},
    "terminationGracePeriodSeconds": {},
    "containers": {
        "name": {},
        "image": {},
        "command": {},
        "env": {"name": {}, "value": {}, "valueFrom": {"fieldRef": {"fieldPath": {}}}},
        "resources": {"limits": {"*": {}}},
        "volumeMounts": {"name": {}, "mountPath": {}},
    },
    "volumes": {"name": {}, "persistentVolumeClaim": {"claimName": {}}, "emptyDir": {"medium": {}}},
}
RULE = {"action": {}, "onExitCodes": {"operator": {}, "values": {}}, "onPodConditions": {"type": {}}}
JOB = {
    "completionMode": {},
    "completions": {},
    "parallelism": {},
    "backoffLimit": {},
    "podFailurePolicy": {"rules": RULE},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": {},
    "kind": {},
    "metadata": {"name": {}},
    "spec": {
        "network": {"enableDNSHostnames": {}, "subdomain": {}},
        "failurePolicy": {"maxRestarts": {}, "rules": {"name": {}, "action": {}, "onJobFailureReasons": {}}},
        "replicatedJobs": {"name": {}, "replicas": {}, "template": {"spec": JOB}},
    },
}
NEEDED = ("--nodes", "4", "--gpus-per-node", "2", "--image", "registry/jaxtrain:1", "--claim", "runs")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text("from tests.tiny import TINY as config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifest(capsys, *argv: str) -> dict:
    assert main(["config.py", "--dry-run", *NEEDED, *argv]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def job(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(manifest: dict) -> dict:
    return job(manifest)["template"]["spec"]


def environment(manifest: dict) -> dict:
    return {row["name"]: row.get("value") for row in pod(manifest)["containers"][0]["env"]}


def unknown(value, fields, path="") -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in unknown(item, fields, path)]
    if not isinstance(value, dict):
        return []
    rows = [(f"{path}.{name}", item, fields.get(name, fields.get("*"))) for name, item in value.items()]
    return [at for at, _, known in rows if known is None] + [n for at, item, f in rows if f is not None for n in unknown(item, f, at)]


def test_it_has_only_fields_that_the_api_knows(capsys):
    assert unknown(manifest(capsys), JOBSET) == []
    assert unknown({"kind": 1, "spec": {"replicas": 1}}, JOBSET) == [".spec.replicas"]


def test_there_is_a_pod_per_host_with_an_index_and_an_address(capsys):
    made = manifest(capsys, "--name", "My_Run.1")
    assert (made["kind"], made["metadata"]["name"]) == ("JobSet", "my-run-1")
    assert (job(made)["completionMode"], job(made)["completions"], job(made)["parallelism"]) == ("Indexed", 4, 4)
    assert made["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "my-run-1"}
    env = environment(made)
    assert env["JAXTRAIN_HOSTS"] == "my-run-1-host-0-[0-3].my-run-1:8476"
    index = pod(made)["containers"][0]["env"][-1]
    field = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert index == {"name": "JAXTRAIN_HOST_INDEX", "valueFrom": {"fieldRef": {"fieldPath": field}}}


def test_a_preempted_pod_counts_for_nothing_and_what_would_fail_again_is_not_tried_again(capsys):
    made = manifest(capsys)
    rules = {str(rule.get("onExitCodes", rule.get("onPodConditions"))): rule["action"] for rule in job(made)["podFailurePolicy"]["rules"]}
    assert rules == {
        "{'operator': 'In', 'values': [74, 75]}": "Ignore",
        "[{'type': 'DisruptionTarget'}]": "Ignore",
        "{'operator': 'In', 'values': [2, 65]}": "FailJob",
    }
    assert pod(made)["restartPolicy"] == "Never"  # the only one that a pod failure policy allows
    (rule,) = made["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_grace_is_one_number_for_the_cluster_and_the_trainer(capsys):
    made = manifest(capsys, "--grace-seconds", "45")
    assert pod(made)["terminationGracePeriodSeconds"] == 45
    assert environment(made)["JAXTRAIN_GRACE_SECONDS"] == "45"


def test_pods_have_gpus_shared_memory_and_a_disk_for_all(capsys):
    container = pod(manifest(capsys))["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert container["image"] == "registry/jaxtrain:1"
    mounts = {row["name"]: row["mountPath"] for row in container["volumeMounts"]}
    volumes = {row["name"]: row for row in pod(manifest(capsys))["volumes"]}
    assert mounts == {"runs": "/runs", "shm": "/dev/shm"}
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory"}
    assert "resources" not in pod(manifest(capsys, "--gpus-per-node", "0"))["containers"][0]


def test_the_command_writes_its_runs_onto_that_disk(capsys):
    assert pod(manifest(capsys, "--steps", "5"))["containers"][0]["command"] == [
        "jaxtrain", "launch", "config.py", "--steps", "5", "--runs-dir", "/runs",
    ]  # fmt: skip
    made = pod(manifest(capsys, "--runs-dir", "/mnt/all"))["containers"][0]
    assert made["command"][-2:] == ["--runs-dir", "/mnt/all"] and made["volumeMounts"][0]["mountPath"] == "/mnt/all"
    assert made["command"].count("--runs-dir") == 1
    made = pod(manifest(capsys, "--runs-dir", "../all/"))["containers"][0]
    assert made["command"][-2:] == ["--runs-dir", "/all"] and made["volumeMounts"][0]["mountPath"] == "/all"


def test_it_is_written_into_the_run_folder_and_the_command_that_starts_it_is_printed(capsys, place):
    assert command.main(["--kubernetes", "config.py", *NEEDED]) == 0
    path = place / "runs/tiny/jobset.yaml"
    assert yaml.safe_load(path.read_text())["kind"] == "JobSet"
    assert f"jaxtrain launch --kubernetes config.py {shlex.join(NEEDED)}" in path.read_text().splitlines()[1]
    assert "kubectl apply --server-side -f runs/tiny/jobset.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--nodes", "--image", "--claim"])
def test_what_the_program_cannot_know_is_asked_for(flag):
    needed = list(NEEDED)
    at = needed.index(flag)
    with pytest.raises(ConfigError, match=f"{flag} is missing"):
        main(["config.py", *needed[:at], *needed[at + 2 :]])


@pytest.mark.parametrize(
    ("name", "fix"),
    [("___", "run"), ("8b", "run-8b"), ("-8.B_", "run-8-b"), ("a" * 41, "with fewer characters"), ("8" * 37, "with fewer characters")],
)
def test_a_name_that_makes_no_address_is_refused_with_one_that_does(name, fix, capsys):
    with pytest.raises(ConfigError, match="makes no name for Kubernetes") as error:
        main(["config.py", *NEEDED, f"--name={name}"])
    assert error.value.fix.startswith(f"--name {fix}")
    if fix.startswith("run"):
        assert manifest(capsys, *error.value.fix.split())["metadata"]["name"] == fix


def test_a_runs_dir_that_is_the_root_of_a_container_is_refused():
    with pytest.raises(ConfigError, match="no folder of its own"):
        main(["config.py", *NEEDED, "--runs-dir", "."])
