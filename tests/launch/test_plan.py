"""linscale plan: what it refuses before any compile, the partitioned program of GPUs, and (-m tpu_compile) TPU programs."""

import json
import os
import subprocess
import sys

import pytest

from linscale import cli

DEMO = "--config=configs/demo.py:{}-14k"
SMALL = ["--config.train.batch=8", "--config.model.width=64", "--config.model.heads=4", "--config.train.sequence=512"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--topology=v9:4x4"], "is of an unknown chip; known are v4, v5e, v5p, v6e, tpu7x, h100, h200"),
        (["--topology=v5p:4x4"], "does not have the form v5p:NxNxN, as in v5p:4x4x8"),
        (["--topology=v5e:32x32"], "has 1024 chips; a slice of v5e has at most 256"),
        (["--topology=v5e:4x4", "--config.mesh.data=3"], "config.mesh is data 3 x fsdp 1 x sequence 1 x tensor 1, which is 3 devices"),
        (["--topology=v5e:4x4"], "config.train.batch is 8, but mesh.data 16"),
        (["--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.tensor=-1"], "config.model.heads is 2, which mesh.tensor 4 does not divide"),
        (["--topology=v5e:2x2", "--tries=0"], "--tries is 0"),
        (["--topology=v5e:2x2", "--no-such"], "'--no-such' is not an option of linscale plan"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_before_any_compile(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delenv("LINSCALE_TRACEBACK", raising=False)
    monkeypatch.setattr("linscale.launch.plan.make", None)
    assert cli.main(["plan", DEMO.format("tnl"), *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]


def plan(tmp_path, arch: str, *argv: str) -> dict:
    """The JSON of a plan, made in a process of its own, as jax has begun in this one."""
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "linscale", "plan", DEMO.format(arch), f"--json={file}", *SMALL, *argv]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    assert f"{arch}-14k on" in out.stdout
    return json.loads(file.read_text())


def test_gpus_are_partitioned_and_their_memory_is_computed(tmp_path):
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.sequence=2", "--config.mesh.tensor=2"]
    asked = plan(tmp_path, "tnl", "--topology=h100:16", *mesh)["asked"]
    assert asked["fits"] and not asked["compiled"] and asked["device_kind"] == "NVIDIA H100"
    from linscale.scaling.flops import count_parameters, flops_per_token
    from linscale.training.recipes import load_run

    config = load_run(DEMO.format("tnl").removeprefix("--config="), [o[len("--config.") :].split("=") for o in SMALL])
    whole = 4 * count_parameters(config.model).total
    assert whole / 4 <= asked["parameters"] < 1.1 * whole / 4  # a few small ones are not cut
    assert 2 * asked["parameters"] <= asked["optimizer"] < 2.01 * asked["parameters"] + 2000
    assert asked["model_flops"] == pytest.approx(flops_per_token(config.model, 512) * 8 * 512)
    assert asked["model_flops"] < asked["hardware_flops"] < 3 * asked["model_flops"]
    # bfloat16 weights of a layer come together over fsdp at least twice a step, and gradients go back
    assert asked["sent_by_kind"]["fsdp all-gather"] > 0
    assert sum(asked["sent"].values()) == pytest.approx(sum(asked["sent_by_kind"].values()))
    assert asked["bound"]["seconds"] == max(asked["bound"][part] for part in ("compute", "memory", "links"))


@pytest.mark.tpu_compile
@pytest.mark.parametrize("arch", ("tnl", "hgrn2", "cosformer2", "llama"))
def test_what_the_sequence_axis_sends_of_linear_models_does_not_grow_with_the_sequence(arch, tmp_path):
    mesh = ["--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.sequence=4"]
    sent = [
        plan(tmp_path, arch, *mesh, f"--config.train.sequence={tokens}")["asked"]["sent"]["sequence"]
        for tokens in (1024, 4096)
    ]
    if arch == "llama":
        assert sent[1] > 2 * sent[0]
    else:
        assert sent[1] == sent[0]


OFFLOADED = """
import sys
from linscale.launch import ahead, hardware
ahead.prepare()
from linscale.training import recipes
devices = ahead.devices(hardware.parse("v5e:2x2"))
sizes = {"layers": 1, "width": 256, "heads": 4, "ffn": 512, "attention": "chunked"}
options = [(f"model.{field}", str(value)) for field, value in sizes.items()]
options += [("mesh.data", "1"), ("mesh.fsdp", "4"), ("train.batch", "4"), ("train.sequence", "128")]
program = ahead.program(recipes.load_run("configs/demo.py:tnl-14k", [*options, ("optimizer.offload", sys.argv[1])]), devices)
stats = program.lowered.compile().memory_analysis()
print(ahead.sizes(program).parameters, stats.argument_size_in_bytes, stats.host_argument_size_in_bytes, stats.host_output_size_in_bytes)
"""


@pytest.mark.tpu_compile
def test_offloaded_moments_lie_in_the_memory_of_the_host():
    """By the compiler's own figures, in bytes on a device and beside it; arrays are padded to whole tiles."""
    found = {}
    for offload in ("true", "false"):
        command = [sys.executable, "-c", OFFLOADED, offload]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
        found[offload] = [int(number) for number in out.splitlines()[-1].split()]
    parameters, held, on_host, back = found["true"]
    assert found["false"][2:] == [0, 0] and on_host == back
    assert 2 * parameters <= on_host < 2.2 * parameters
    assert found["false"][1] - held == pytest.approx(on_host, rel=0.1)


@pytest.mark.tpu_compile
def test_a_setting_that_fits_is_found(tmp_path):
    """A model whose activations do not fit on four v5e chips as asked."""
    size = [
        "--config.model.layers=24",
        "--config.model.width=2048",
        "--config.model.heads=16",
        "--config.model.ffn=5504",
    ]
    long = ["--config.train.sequence=8192", "--config.train.batch=16"]
    found = plan(tmp_path, "tnl", "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4", *size, *long)
    assert not found["fits"] and found["found"]["fits"] and found["found"]["compiled"] and found["changes"]
    assert found["found"]["peak"] <= found["found"]["available"] < found["asked"]["peak"]
