"""Compile time of the sharded train step does not grow with depth: 32 layers against 8.

Processor time, as the machine may be busy with something else. pytest -m slow tests/launch/test_depth.py
"""

import subprocess
import sys

import pytest

SCRIPT = """
import dataclasses, sys, time
from linscale.launch import ahead, hardware
ahead.prepare()
from linscale.training import recipes
devices = ahead.devices(hardware.parse("h100:8"))
size = [("width", "128"), ("heads", "2"), ("ffn", "384"), ("remat", "full"), ("layers", sys.argv[2])]
options = [(f"model.{field}", value) for field, value in size] + [("mesh.data", "2"), ("mesh.fsdp", "2"), ("mesh.tensor", "2")]
config = recipes.load_run(f"configs/demo.py:{sys.argv[1]}-14k", options)
ahead.program(config, devices).lowered.compile()  # what the first compile of a process does once
config = dataclasses.replace(config, train=dataclasses.replace(config.train, sequence=128))
lowered = ahead.program(config, devices).lowered
began = time.process_time()
lowered.compile()
print(time.process_time() - began)
"""


def seconds(arch: str, layers: int) -> float:
    command = [sys.executable, "-c", SCRIPT, arch, str(layers)]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout.splitlines()[-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ("llama", "tnl", "hgrn2", "cosformer2"))
def test_32_layers_compile_in_at_most_1_3_times_the_time_of_8(arch):
    ratios = [seconds(arch, 32) / seconds(arch, 8) for _ in range(3)]
    assert min(ratios) < 1.3, ratios
