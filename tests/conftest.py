import gc
import os
import subprocess
import sys
import tempfile
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
    if config.option.markexpr not in ("gpu", "tpu_compile") and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _compile_once(config)


def pytest_collection_finish():
    """What is imported stays, and programs in JAX's caches too: to walk over them again and again costs a tenth."""
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def _compile_once(config):
    """The workers, and the processes that tests start, share compiled programs in a folder that ends with this run."""
    folder = tempfile.TemporaryDirectory(prefix="compiled-")
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


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
