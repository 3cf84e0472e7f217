"""`jaxtrain launch --kubernetes`: writes a run as a JobSet into its folder and prints how to apply it. It applies nothing.

The fields are those of jobset.x-k8s.io/v1alpha2 (https://jobset.sigs.k8s.io) and batch/v1.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from jaxtrain.command import Call, parse
from jaxtrain.config import RunConfig
from jaxtrain.errors import ConfigError
from jaxtrain.exits import AGAIN, FINAL
from jaxtrain.launch import job

HOSTS = "host"  # the JobSet's one replicated job; a pod's name is NAME-host-0-INDEX.NAME
PORT = 8476  # of each supervisor; each pod has an address of its own
RESTARTS = 100  # of pods that crashed; 16,000 GPUs break every three hours, 56 times a week
NAME_LENGTH = 40  # of the 63 of a DNS label; the job's name, two indices and a random suffix need the rest
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclass(frozen=True, kw_only=True)
class Kubernetes(job.Job):
    """Flags of `jaxtrain launch --kubernetes`."""

    image: str | None = None  # a container image with jaxtrain and the config in its working directory; must be given
    claim: str | None = None  # a PersistentVolumeClaim, ReadWriteMany, that will hold the run folders; must be given


def main(argv: list[str]) -> int:
    """jaxtrain launch --kubernetes CONFIG --nodes N --image IMAGE --claim CLAIM [--gpus-per-node N] [overrides]"""
    call = parse("jaxtrain launch --kubernetes", Kubernetes, argv, doc=main.__doc__)
    config = job.checked(call)
    made = job.header(f"{config.name} on {call.options.nodes} hosts.", ["--kubernetes", *argv])
    text = made + yaml.safe_dump(jobset(call, config), sort_keys=False, width=120)
    if call.options.dry_run:
        print(text, end="")
        return 0
    path = config.run_dir / "jobset.yaml"
    job.write(path, text, 0o644)
    print(f"manifest  {path}\nstart     kubectl apply --server-side -f {shlex.quote(str(path))}")
    print(f"output    kubectl logs --follow --selector {_INDEX_LABEL},jobset.sigs.k8s.io/jobset-name={_name(config)}")
    return 0


_INDEX_LABEL = "batch.kubernetes.io/job-completion-index=0"


def jobset(call: Call, config: RunConfig) -> dict[str, Any]:
    """The manifest as plain data. Raises ConfigError."""
    hopeless = {"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": _name(config)},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": _name(config)},  # a headless service of this name
            "failurePolicy": {"maxRestarts": RESTARTS, "rules": [hopeless]},
            "replicatedJobs": [{"name": HOSTS, "replicas": 1, "template": {"spec": _hosts(call, config)}}],
        },
    }


def _hosts(call: Call, config: RunConfig) -> dict[str, Any]:
    """The Job: a pod per host. A pod that was preempted is made again and counts for nothing."""
    rules = [
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [int(code) for code in AGAIN]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [int(code) for code in FINAL]}},
    ]
    return {
        "completionMode": "Indexed",
        "completions": call.options.nodes,
        "parallelism": call.options.nodes,
        "backoffLimit": RESTARTS,  # a host that crashed is made again by itself, and joins the others
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": _pod(call, config)},
    }


def _pod(call: Call, config: RunConfig) -> dict[str, Any]:
    options, runs = call.options, _mount(config)
    limits = {"resources": {"limits": {"nvidia.com/gpu": options.gpus_per_node}}} if options.gpus_per_node else {}
    elsewhere = ["--runs-dir", runs] if runs != config.runs_dir else []
    trainer = {
        "name": "trainer",
        "image": _given(options, "image", "a container image that holds jaxtrain and the config"),
        "command": [*job.host_command(call, ["jaxtrain"]), *elsewhere],
        "env": _environment(call, config),
        **limits,
        "volumeMounts": [{"name": "runs", "mountPath": runs}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    claim = _given(options, "claim", "a PersistentVolumeClaim that all hosts can write, for the run folders")
    return {
        "restartPolicy": "Never",  # a pod failure policy allows no other
        "terminationGracePeriodSeconds": options.grace_seconds,
        "containers": [trainer],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # containers have 64 MB there by default; NCCL wants more
        ],
    }


def _environment(call: Call, config: RunConfig) -> list[dict[str, Any]]:
    name = _name(config)
    values = {
        "JAXTRAIN_HOSTS": f"{name}-{HOSTS}-0-[0-{call.options.nodes - 1}].{name}:{PORT}",
        "JAXTRAIN_GRACE_SECONDS": str(call.options.grace_seconds),
        "JAXTRAIN_CACHE_DIR": f"{_mount(config)}/.cache",  # a pod's own disk does not outlive it
        "PYTHONUNBUFFERED": "1",
    }
    index = {"name": "JAXTRAIN_HOST_INDEX", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}}
    return [*({"name": key, "value": value} for key, value in values.items()), index]


def _mount(config: RunConfig) -> str:
    """Where the claim is mounted: runs_dir, which must be absolute there. Raises ConfigError for the root."""
    path = posixpath.normpath(posixpath.join("/", config.runs_dir))
    if path == "/":
        rule = "the claim is mounted there, and a container's root is its image"
        raise ConfigError(f"runs_dir = {config.runs_dir!r} is no folder of its own.", rule=rule, fix="--runs-dir runs")
    return path


def _name(config: RunConfig) -> str:
    """The run's name as the label that RFC 1035 has for a service. Raises ConfigError where it makes none."""
    name = re.sub("[^a-z0-9]+", "-", config.name.lower()).strip("-")
    if not name[:1].isalpha() or len(name) > NAME_LENGTH:
        other = f"run-{name}".strip("-")
        raise ConfigError(
            f"name = {config.name!r} makes no name for Kubernetes.",
            got=f"{name!r}, {len(name)} characters",
            rule=f"1 to {NAME_LENGTH} of a-z, 0-9 and -, a letter first: pods, a service and their addresses are named after it",
            fix=f"--name {other if len(other) <= NAME_LENGTH else 'with fewer characters, a letter first'}",
        )
    return name


def _given(options: Kubernetes, field: str, what: str) -> str:
    value = getattr(options, field)
    if not value:
        raise ConfigError(f"--{field} is missing.", rule=what, fix=f"--{field} NAME")
    return value
