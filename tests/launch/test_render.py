"""The rendered scripts are run, with stand-ins for the programs of the schedulers that write down what they are given."""

import json
import os
import stat
import subprocess
import sys

import pytest
import yaml

from linscale import cli
from linscale.config import ConfigError
from linscale.launch import job as jobs

RECIPE = "configs/demo.py:tnl-14k"
HOSTILE = (
    "a b; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    'it\'s "quoted" \\ & | > pwned',
    "line\nbreak\n#SBATCH --uid=0",
    "*?[a]~ %s {braces} !x",
    "'; touch pwned; '",
)
SPY = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["SPY"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
codes = os.environ.get("CODES", "0").split(",")
used = sum(1 for line in open(os.environ["SPY"]) if json.loads(line)[0] == os.path.basename(sys.argv[0]))
if os.path.basename(sys.argv[0]) == "squeue":
    print("RUNNING")
sys.exit(int(codes[min(used, len(codes)) - 1]) if os.path.basename(sys.argv[0]) in ("srun", "linscale") else 0)
"""


def render(*argv: str, out) -> None:
    assert cli.main(["launch", *argv, f"--out={out}"]) == 0


@pytest.fixture
def spied(tmp_path, monkeypatch):
    """Runs a rendered script with stand-ins; returns (exit code, the calls they got)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "scontrol", "squeue", "linscale", "pip", "gcloud", "sleep"):
        (programs / name).write_text(SPY)
        (programs / name).chmod(stat.S_IRWXU)
    (programs / "python3").write_text('#!/bin/sh\nmkdir -p "$3/bin" && : > "$3/bin/activate"\n')
    (programs / "python3").chmod(stat.S_IRWXU)

    def run(script, codes="0", **environment):
        spy = tmp_path / "calls"
        spy.unlink(missing_ok=True)
        env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SPY": str(spy), "CODES": codes}
        env |= {"HOME": str(tmp_path / "home"), "SLURM_JOB_ID": "7"} | environment
        code = subprocess.run(["bash", str(script)], cwd=script.parent, env=env, timeout=60).returncode
        calls = [json.loads(line) for line in spy.read_text().splitlines()] if spy.exists() else []
        return code, calls

    return run


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_reach_the_run_as_they_were_given(value, tmp_path, spied):
    folder = tmp_path / value.replace("/", "_")
    folder.mkdir()
    option = f"--config.data.separator={value}"  # the one text that may hold anything
    render("slurm", f"--config={RECIPE}", option, f"--folder={folder}", out=tmp_path / "slurm")
    code, calls = spied(tmp_path / "slurm" / "tnl-14k.sbatch")
    assert code == 0 and calls[0][0] == "srun" and calls[0][-1] == option
    script = (tmp_path / "slurm" / "tnl-14k.sbatch").read_text()
    assert not any("uid" in line for line in script.splitlines() if line.startswith("#SBATCH"))

    render("tpu", "--topology=v5e:2x2", "--zone=z", f"--config={RECIPE}", option, out=tmp_path / "tpu")
    code, calls = spied(tmp_path / "tpu" / "worker.sh")
    assert code == 0 and calls[-1] == ["linscale", "train", f"--config={RECIPE}", option]

    render("gke", "--topology=v5e:2x2", f"--image={value}", f"--config={RECIPE}", option, out=tmp_path / "gke")
    (manifest,) = yaml.safe_load_all((tmp_path / "gke" / "tnl-14k.yaml").read_text())
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == value
    assert container["command"][-1].replace("$$(", "$(") == option
    assert not list(tmp_path.rglob("pwned"))


def test_kubernetes_does_not_expand_variables_in_values(tmp_path):
    render(
        "gke", "--topology=v5e:2x2", "--image=i", f"--config={RECIPE}", "--config.data.data_dir=$(HOME)", out=tmp_path
    )
    assert "--config.data.data_dir=$$(HOME)" in (tmp_path / "tnl-14k.yaml").read_text()


def test_a_recipe_that_is_not_shipped_travels_with_the_job(tmp_path, spied):
    text = '"""\'EOF\' $(touch pwned) `x`"""\nfrom linscale.config import base\nRUNGS = ("a",)\n\n\ndef get_config(rung):\n    return base()\n'
    recipe = tmp_path / "it's mine.py"
    recipe.write_text(text)
    render("tpu", "--topology=v5e:2x2", "--zone=z", f"--config={recipe}:a", out=tmp_path / "tpu")
    code, calls = spied(tmp_path / "tpu" / "worker.sh")
    assert code == 0 and calls[-1] == ["linscale", "train", "--config=linscale_recipe.py:a"]
    assert (tmp_path / "tpu" / "linscale_recipe.py").read_text() == text
    render("gke", "--topology=v5e:2x2", "--image=i", f"--config={recipe}:a", out=tmp_path / "gke")
    config_map, manifest = yaml.safe_load_all((tmp_path / "gke" / "run.yaml").read_text())
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert config_map["data"]["recipe.py"] == text
    assert pod["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"]
    assert pod["containers"][0]["command"][-1] == "--config=/etc/linscale/recipe.py:a"


@pytest.mark.parametrize("code", jobs.FINAL)
def test_final_exit_codes_end_the_job(code, tmp_path, spied):
    render("slurm", f"--config={RECIPE}", out=tmp_path)
    ended, calls = spied(tmp_path / "tnl-14k.sbatch", codes=str(code))
    assert ended == code and [call[0] for call in calls] == ["srun"]
    render("tpu", "--topology=v5e:2x2", "--zone=z", f"--config={RECIPE}", out=tmp_path)
    ended, calls = spied(tmp_path / "worker.sh", codes=str(code))
    assert ended == code and [call[0] for call in calls].count("linscale") == 1


@pytest.mark.parametrize("code", (75, 137, 143, 255))
def test_other_endings_are_started_again(code, tmp_path, spied):
    render("slurm", f"--config={RECIPE}", "--restarts=2", out=tmp_path)
    ended, calls = spied(tmp_path / "tnl-14k.sbatch", codes=str(code), SLURM_RESTART_COUNT="1")
    assert ended == code and calls[-1] == ["scontrol", "requeue", "7"]
    ended, calls = spied(tmp_path / "tnl-14k.sbatch", codes=str(code), SLURM_RESTART_COUNT="2")
    assert ended == code and [call[0] for call in calls] == ["srun"]
    render("tpu", "--topology=v5e:2x2", "--zone=z", f"--config={RECIPE}", "--restarts=3", out=tmp_path)
    ended, calls = spied(tmp_path / "worker.sh", codes=f"{code},{code},0")
    assert ended == 0 and [call[0] for call in calls].count("linscale") == 3


def test_a_cancelled_job_is_not_queued_again(tmp_path, spied):
    render("slurm", f"--config={RECIPE}", out=tmp_path)
    script = tmp_path / "tnl-14k.sbatch"
    script.write_text(script.read_text().replace("$(squeue", "$(echo CANCELLED; true"))
    _, calls = spied(script, codes="143")
    assert [call[0] for call in calls] == ["srun"]


def test_tpu_names_of_slices(tmp_path, capsys):
    for topology, kind in (("v5p:4x4x8", "v5p-256"), ("v5e:16x16", "v5litepod-256"), ("v4:2x2x4", "v4-32")):
        argv = ["tpu", f"--topology={topology}", "--zone=z", f"--config={RECIPE}", "--config.output=/mnt/r"]
        render(*argv, "--config.train.batch=256", out=tmp_path)
        assert f"--accelerator-type={kind} " in (tmp_path / "launch.sh").read_text()


def test_workers_of_a_slice_are_told_to_find_each_other(tmp_path):
    for topology, told in (("v5e:4x4", True), ("v5e:2x2", False)):
        argv = ["tpu", f"--topology={topology}", "--zone=z", f"--config={RECIPE}", "--config.output=/mnt/r"]
        render(*argv, "--config.train.batch=16", out=tmp_path)
        assert ("export LINSCALE_DISTRIBUTED=auto\n" in (tmp_path / "worker.sh").read_text()) is told


def test_nothing_is_submitted_by_default(tmp_path, capsys):
    render("slurm", f"--config={RECIPE}", out=tmp_path / "a b")
    assert f"cd '{tmp_path}/a b' && sbatch tnl-14k.sbatch" in capsys.readouterr().out
    assert cli.main(["launch", "slurm", f"--config={RECIPE}"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["tpu", "--topology=v9:2x2", "--zone=z"], "known are v4, v5e, v5p, v6e, tpu7x, h100, h200"),
        (["tpu", "--topology=v5p:4x4", "--zone=z"], "does not have the form v5p:NxNxN, as in v5p:4x4x8"),
        (["tpu", "--topology=tpu7x:2x2x2", "--zone=z"], "is not offered as a TPU VM"),
        (["tpu", "--topology=v5e:4x4", "--zone=z"], "must be an absolute path"),
        (["tpu", "--topology=v5e:2x2", "--zone=z;rm"], "--zone is 'z;rm'; it must be"),
        (["gke", "--topology=v5e:4x4", "--image=i"], "must be an absolute path in a volume"),
        (["gke", "--topology=v5e:2x2", "--image=i", "--volume=claim"], "it must be CLAIM:/PATH"),
        (["gke", "--topology=v5e:2x2", "--image=i", "--namespace=A_b"], "--namespace is 'A_b'"),
        (["tpu", "--topology=v5e:2x2", "--zone=z", "--config.mesh.fsdp=3"], "but 3 does not divide the 4 devices"),
        (
            ["gke", "--topology=v5e:2x2", "--image=i", "--slices=4", "--config.output=/r"],
            "batch is 8, but mesh.data 16",
        ),
        (["slurm", "--nodes=2", "--gpus-per-node=8", "--config.mesh.data=8"], "which is 8 devices, but there are 16"),
        (["slurm", "--partition=a b"], "--partition is 'a b'"),
        (["slurm", "--time=tomorrow"], "it must be like 24:00:00"),
        (["slurm", "--nodes=0"], "--nodes is 0; it must be at least 1"),
        (["slurm", "--name=Upper_Case"], "--name is 'Upper_Case'"),
        (["slurm", "--restarts=-1"], "--restarts is -1"),
        (["slurm", "--submit"], "--submit needs --out=DIR"),
        (["slurm", "--config.train.batch=zero"], "config.train.batch is 'zero'"),
        (["slurm", "--unknown=1"], "'--unknown=1' is not an option of linscale launch slurm"),
    ],
)
def test_mistakes_are_one_sentence(argv, said, capsys, monkeypatch):
    monkeypatch.delenv("LINSCALE_TRACEBACK", raising=False)
    assert cli.main(["launch", argv[0], f"--config={RECIPE}", *argv[1:]]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_submitting_where_the_scheduler_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        cli.main(
            ["launch", "gke", "--topology=v5e:2x2", "--image=i", f"--config={RECIPE}", f"--out={tmp_path}", "--submit"]
        )
        == 2
    )
    assert "'kubectl' is not installed here" in capsys.readouterr().err


def test_words_for_places_without_quoting():
    assert jobs.word("--x", "us-east5-a") == "us-east5-a"
    for bad in (*HOSTILE, "", " ", "a\n"):
        with pytest.raises(ConfigError, match="--x is"):
            jobs.word("--x", bad)
