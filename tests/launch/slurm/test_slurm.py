"""The rendered sbatch script on a real SLURM, started here (cluster.py): two tasks train one run to its last checkpoint.

apt-get install slurmctld slurmd slurm-client munge
pytest -m slow tests/launch/slurm
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest

from linscale import cli

ROOT = Path(__file__).parents[3]
RUN = ["--config=configs/demo.py:tnl-14k", "--config.train.steps=20", "--config.train.checkpoint_every=10"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing()))]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        yield environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}


def submit(slurm: dict, folder: Path, *argv: str) -> str:
    """Renders and submits a script for two tasks in `folder`; the job's number."""
    options = [f"--folder={folder}", f"--python={sys.executable}", "--tasks-per-node=2", f"--out={folder}"]
    assert cli.main(["launch", "slurm", *RUN, f"--config.output={folder}/runs", *options, *argv]) == 0
    out = subprocess.run(
        ["sbatch", "--parsable", "tnl-14k.sbatch"], cwd=folder, env=slurm, capture_output=True, text=True, check=True
    )
    return out.stdout.strip()


def state(slurm: dict, job: str) -> dict[str, str]:
    """What scontrol says of a job, field -> value."""
    out = subprocess.run(["scontrol", "-o", "show", "job", job], env=slurm, capture_output=True, text=True, check=True)
    return dict(word.split("=", 1) for word in out.stdout.split() if "=" in word)


def wait(slurm: dict, folder: Path, job: str, condition, seconds: float = 240) -> dict[str, str]:
    until = time.monotonic() + seconds
    while not condition(seen := state(slurm, job)):
        assert time.monotonic() < until, f"{seen}\n{log(folder, job)}"
        time.sleep(1)
    return seen


def log(folder: Path, job: str) -> str:
    file = folder / f"slurm-tnl-14k-{job}.log"
    return file.read_text() if file.exists() else "no log"


def ended(seen: dict[str, str]) -> bool:
    return seen["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


def test_two_tasks_train_to_a_checkpoint(slurm, tmp_path):
    job = submit(slurm, tmp_path)
    seen = wait(slurm, tmp_path, job, ended)
    text = log(tmp_path, job)
    assert seen["JobState"] == "COMPLETED" and seen["ExitCode"] == "0:0", text
    run = tmp_path / "runs" / "tnl-14k"
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"10", "20"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert 20 in losses and losses[20] < losses[min(losses)]
    assert (run / "DONE.json").exists()

    again = submit(slurm, tmp_path)  # two processes, so each must have known that the other had finished
    assert wait(slurm, tmp_path, again, ended)["JobState"] == "COMPLETED"
    assert "nothing to do" in log(tmp_path, again)
