"""A JobSet manifest for GKE (or any Kubernetes with the JobSet controller): one pod for each host of a slice.

A pod that ends with a final exit code of linscale fails the set; every other loss (a spot node taken away, a host that
hangs) restarts all pods together, up to --restarts times, and they continue from the last checkpoint.
"""

import argparse

from linscale.config import ConfigError
from linscale.launch import hardware
from linscale.launch import job as jobs

RECIPE_FOLDER = "/etc/linscale"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="the slice, as v5p:4x4x8 or h100:16")
    parser.add_argument("--image", required=True, help="container image that has linscale")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices, joined by the data centre network")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--queue", default="", help="Kueue's local queue")
    parser.add_argument("--service-account", default="")
    parser.add_argument("--spot", action="store_true", help="run on spot nodes, which may be taken away")
    parser.add_argument(
        "--volume",
        metavar="CLAIM:/PATH",
        default="",
        help="persistent volume claim of the runs and data, and its place",
    )


def render(job: jobs.Job, options) -> dict[str, str]:
    """File name -> text."""
    import yaml

    documents = [_jobset(job, options)]
    if not job.shipped:
        documents.insert(0, _recipe(job, options))
    return {f"{job.name}.yaml": yaml.safe_dump_all(documents, sort_keys=False, width=120)}


def submission(job: jobs.Job, options) -> list[str]:
    """What --submit runs in the folder of the rendered files."""
    return ["kubectl", "apply", "-f", f"{job.name}.yaml"]


def _recipe(job: jobs.Job, options) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-recipe", "namespace": options.namespace},
        "data": {"recipe.py": job.recipe_text},
    }


def _jobset(job: jobs.Job, options) -> dict:
    topology = hardware.parse(options.topology)
    jobs.host_name("--namespace", options.namespace)
    if options.slices < 1:
        raise ConfigError(f"--slices is {options.slices}; it must be at least 1.")
    if topology.hosts * options.slices > 1 and not job.config.output.startswith("/"):
        raise ConfigError(
            f"config.output is {job.config.output!r}; on {topology.hosts * options.slices} hosts it must be an absolute "
            "path in a volume that all of them see, as --volume=claim:/runs --config.output=/runs."
        )
    jobs.check_mesh(job, topology.devices * options.slices)
    labels = {"app.kubernetes.io/name": "linscale", "app.kubernetes.io/instance": job.name}
    metadata = {"name": job.name, "namespace": options.namespace, "labels": dict(labels), "annotations": {}}
    if topology.chip.maker == "tpu":  # a slice is a node pool of its own
        metadata["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    if options.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "restartStrategy": "Recreate",
                "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": "worker", "replicas": options.slices, "template": _template(job, options, topology, labels)}
            ],
        },
    }


def _template(job: jobs.Job, options, topology: hardware.Topology, labels: dict) -> dict:
    failed = [code for code in jobs.FINAL if code]
    return {
        "spec": {
            "parallelism": topology.hosts,
            "completions": topology.hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "train", "operator": "In", "values": failed},
                    }
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": _pod(job, options, topology)},
        }
    }


def _pod(job: jobs.Job, options, topology: hardware.Topology) -> dict:
    tpu = topology.chip.maker == "tpu"
    per_host = min(topology.chips, topology.chip.chips_per_host)
    resource = {"google.com/tpu" if tpu else "nvidia.com/gpu": str(per_host)}
    selector = (
        {
            "cloud.google.com/gke-tpu-accelerator": topology.chip.gke,
            "cloud.google.com/gke-tpu-topology": topology.name.partition(":")[2],
        }
        if tpu
        else {"cloud.google.com/gke-accelerator": topology.chip.gke}
    )
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    recipe = None if job.shipped else f"{RECIPE_FOLDER}/recipe.py"
    container = {
        "name": "train",
        "image": options.image,
        # A list, which no shell reads; Kubernetes itself would put a variable's value for $(NAME).
        "command": [word.replace("$(", "$$(") for word in ("linscale", *job.train(recipe))],
        "resources": {"requests": dict(resource), "limits": dict(resource)},
        "volumeMounts": [],
        "env": [] if tpu or topology.hosts == 1 else _coordinator(job, topology),
    }
    pod = {
        "restartPolicy": "Never",  # podFailurePolicy asks for it; the set restarts all pods together
        "terminationGracePeriodSeconds": jobs.GRACE,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [],
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if recipe:
        pod["volumes"].append({"name": "recipe", "configMap": {"name": f"{job.name}-recipe"}})
        container["volumeMounts"].append({"name": "recipe", "mountPath": RECIPE_FOLDER})
    if options.volume:
        claim, _, path = options.volume.partition(":")
        if not (claim and path.startswith("/")):
            raise ConfigError(f"--volume is {options.volume!r}; it must be CLAIM:/PATH.")
        pod["volumes"].append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
        container["volumeMounts"].append({"name": "runs", "mountPath": path})
    return pod


def _coordinator(job: jobs.Job, topology: hardware.Topology) -> list[dict]:
    """What jax.distributed needs where there is no TPU runtime to ask: the first pod's address, and who one is."""
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{job.name}-worker-0-0.{job.name}:8476"},
        {"name": "JAX_NUM_PROCESSES", "value": str(topology.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": index},
    ]
