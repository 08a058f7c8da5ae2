"""Plans for Kubernetes: a JobSet manifest through ``kubectl``, or a workload through ``xpk``."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from launch.accelerators import Accelerator
from launch.plan import Command, File, Plan
from launch.policy import AGAIN, PASSING

_VARIABLE = "JAXLAB_DISTRIBUTED"


def manifest(
    name: str,
    chips: Accelerator,
    command: Sequence[str],
    *,
    image: str,
    restarts: int,
    environment: Mapping[str, str],
    secrets: tuple[str, ...] = (),
    secret_name: str = "jaxlab",
    volumes: Mapping[str, str] | None = None,
    spot: bool = False,
    grace: int = 300,
) -> dict[str, Any]:
    """The JobSet: one job a slice, one pod a host, all started again together.

    Exit codes that a repetition would meet again fail the set at once. Secrets are named and come
    from the Kubernetes secret ``secret_name``. volumes: where each persistent volume claim is
    mounted. grace: seconds between SIGTERM and the end.
    """
    variables = [{"name": k, "value": v} for k, v in {_VARIABLE: "auto", **environment}.items()]
    variables += [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": secret_name, "key": key}}}
        for key in secrets
    ]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": chips.names.gke,
        "cloud.google.com/gke-tpu-topology": chips.shape,
        **({"cloud.google.com/gke-spot": "true"} if spot else {}),
    }
    container = {
        "name": "jaxlab",
        "image": image,
        "command": list(command),
        "env": variables,
        "resources": {"limits": {"google.com/tpu": chips.chips_of_a_host}},
    }
    if volumes:
        container["volumeMounts"] = [
            {"name": claim, "mountPath": path} for claim, path in volumes.items()
        ]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "containers": [container],
    }
    if volumes:
        pod["volumes"] = [
            {"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in volumes
        ]
    # As launch.policy.judge: what is not known to pass stops, and 0 is no failure.
    stops = {"containerName": "jaxlab", "operator": "NotIn", "values": list(PASSING)}
    job = {
        "parallelism": chips.hosts,
        "completions": chips.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": stops}]},
        "template": {"spec": pod},
    }
    rule = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            # A slice is a pool of nodes, and two jobs in one would wait for each other.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": restarts, "rules": [rule]},
            "replicatedJobs": [
                {"name": "slice", "replicas": chips.where.slices, "template": {"spec": job}}
            ],
        },
    }


def apply(name: str, chips: Accelerator, command: Sequence[str], **options: Any) -> Plan:
    """Write the manifest and give it to the cluster that kubectl knows."""
    wanted = manifest(name, chips, command, **options)
    content = yaml.safe_dump(wanted, sort_keys=False, default_flow_style=None, width=110)
    path = f".launch/{name}.yaml"
    steps = (
        File("what Kubernetes is to run", path, content),
        Command("replace an earlier run of that name", _kubectl("delete", "jobset", name), True),
        Command("start it", _kubectl("apply", "-f", path)),
    )
    needs = ()
    if secrets := options.get("secrets"):
        secret = options.get("secret_name", "jaxlab")
        values = " ".join(f'--from-literal={name}="${name}"' for name in secrets)
        needs = (f"the secret {secret}: kubectl create secret generic {secret} {values}",)
    return Plan(f"run {shlex.join(command)} on {chips.where} under Kubernetes", steps, needs)


def _kubectl(*words: str) -> tuple[str, ...]:
    ignored = ("--ignore-not-found",) if words[0] == "delete" else ()
    return ("kubectl", *words, *ignored)


def through_xpk(
    name: str,
    chips: Accelerator,
    command: Sequence[str],
    *,
    cluster: str,
    image: str,
    restarts: int,
    environment: Mapping[str, str],
) -> Plan:
    """The same as a workload of xpk, which writes a manifest of its own."""
    variables = {_VARIABLE: "auto", **environment}
    words = [
        *("xpk", "workload", "create", f"--workload={name}", f"--cluster={cluster}"),
        f"--tpu-type={chips.type}",
        f"--num-slices={chips.where.slices}",
        f"--docker-image={image}",
        f"--max-restarts={restarts}",
        # Signals restart by themselves.
        f"--restart-on-exit-codes={','.join(map(str, AGAIN))}",
        *(f"--env={key}={value}" for key, value in variables.items()),
        f"--command={shlex.join(command)}",
    ]
    step = Command("start it", tuple(words))
    return Plan(f"run {shlex.join(command)} on {chips.where} through xpk", (step,))
