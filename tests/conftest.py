import os
import subprocess
import sys
from pathlib import Path

import pytest

# Most of the time is compilation: machine code as it comes will do.
QUICK = "--xla_backend_optimization_level=0"
# Eight devices on a busy machine may wait for each other longer than the 40 seconds after which XLA ends the process.
EIGHT = (
    f"--xla_force_host_platform_device_count=8 {QUICK} "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
)


def pytest_configure(config):
    """Before JAX is imported. Slow tests, and those of GPUs and TPUs, keep the compiler as users have it."""
    if "not gpu" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"


@pytest.fixture
def on_eight_devices():
    """on_eight_devices(file, "not slow"): its tests so marked, in a process whose JAX has eight devices from its start."""

    def run(file: Path, marked: str) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        env |= {"XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} {EIGHT}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(file)]
        done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return run
