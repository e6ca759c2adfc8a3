"""The JobSet manifest against its published schema, and its Job template against batch/v1."""

import json
import re
from pathlib import Path

import pytest
import yaml

from linscale import cli

jsonschema = pytest.importorskip("jsonschema")
models = pytest.importorskip("kubernetes.client.models", reason="the kubernetes package holds batch/v1")

SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
RECIPE = "configs/demo.py:tnl-14k"
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def manifest(tmp_path, *argv) -> dict:
    common = ["launch", "gke", f"--config={RECIPE}", "--config.output=/runs", "--image=i", f"--out={tmp_path}"]
    assert cli.main([*common, "--config.train.batch=512", *argv]) == 0
    (document,) = yaml.safe_load_all((tmp_path / "tnl-14k.yaml").read_text())
    return document


def check(value, kind: str, where: str) -> None:
    """Whether a value has the fields and types that the kubernetes package states for `kind`."""
    if inner := re.fullmatch(r"[Ll]ist\[(.*)\]", kind):
        assert isinstance(value, list), where
        for i, one in enumerate(value):
            check(one, inner.group(1), f"{where}[{i}]")
    elif inner := re.fullmatch(r"[Dd]ict[(\[]str, (.*)[)\]]", kind):
        assert isinstance(value, dict) and all(isinstance(key, str) for key in value), where
        for key, one in value.items():
            check(one, inner.group(1), f"{where}.{key}")
    elif kind in ("str", "int", "bool", "float"):
        assert type(value).__name__ == kind, f"{where} is {value!r}, not {kind}"
    elif kind not in ("object", "datetime"):
        model = getattr(models, kind)
        names = {json_name: python_name for python_name, json_name in model.attribute_map.items()}
        assert set(value) <= set(names), f"{where} has unknown fields {set(value) - set(names)}"
        model(**{names[field]: one for field, one in value.items()})  # raises for a required field that is missing
        for field, one in value.items():
            check(one, model.openapi_types[names[field]], f"{where}.{field}")


@pytest.mark.parametrize(
    "argv",
    [
        ["--topology=v5p:4x4x8"],
        ["--topology=v5e:16x16", "--slices=2", "--spot", "--queue=q", "--service-account=s", "--volume=claim:/runs"],
        ["--topology=tpu7x:2x2x1"],
        ["--topology=h100:16"],
    ],
)
def test_the_manifest_is_a_jobset(argv, tmp_path):
    document = manifest(tmp_path, *argv)
    jsonschema.validate(document, SCHEMA)
    check(document["metadata"], "V1ObjectMeta", "metadata")
    for job in document["spec"]["replicatedJobs"]:
        check(job["template"], "V1JobTemplateSpec", job["name"])
        longest = f"{document['metadata']['name']}-{job['name']}-{job['replicas'] - 1}-{job['template']['spec']['completions'] - 1}"
        assert LABEL.fullmatch(longest), "the name of a pod must be a DNS label"
    assert document["metadata"]["namespace"] == "default"


def test_the_checks_can_fail(tmp_path):
    document = manifest(tmp_path, "--topology=v5p:2x2x1")
    document["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    with pytest.raises((AssertionError, ValueError), match="backofLimit"):
        check(document["spec"]["replicatedJobs"][0]["template"], "V1JobTemplateSpec", "worker")
    document["spec"]["failurePolicy"]["restartStrategy"] = "Never"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_a_pod_for_each_host_with_its_chips(tmp_path):
    for topology, pods, resource, chips, label in (
        ("v5p:4x4x8", 32, "google.com/tpu", 4, "4x4x8"),
        ("v5e:2x2", 1, "google.com/tpu", 4, "2x2"),
        ("h200:32", 4, "nvidia.com/gpu", 8, None),
    ):
        job = manifest(tmp_path, f"--topology={topology}")["spec"]["replicatedJobs"][0]["template"]["spec"]
        pod = job["template"]["spec"]
        assert job["parallelism"] == job["completions"] == pods
        assert pod["containers"][0]["resources"]["limits"] == {resource: str(chips)}
        assert pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology") == label


def test_final_exit_codes_fail_the_set_and_others_restart_it(tmp_path):
    spec = manifest(tmp_path, "--topology=v5p:2x2x1", "--restarts=7")["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
