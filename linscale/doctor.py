"""`linscale doctor`: what this machine has, for a look before the first run and for a bug report."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

import linscale

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "ml-collections",
    "tensorflow-datasets",
    "numpy",
)


def main(argv: list[str]) -> int:
    argparse.ArgumentParser("linscale doctor", description=__doc__.split(": ", 1)[1]).parse_args(argv)
    import jax

    row("linscale", f"{linscale.__version__} in {Path(linscale.__file__).parent}")
    row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        row(package, _version(package))
    row("processors", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}")
    row("memory", _memory())
    cache = Path(os.environ.get("LINSCALE_CACHE") or "~/.cache/linscale").expanduser()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    row("cache", f"{cache}, {shutil.disk_usage(nearest).free / 1e9:.1f} GB free")
    row("working folder", f"{Path.cwd()}, {shutil.disk_usage('.').free / 1e9:.1f} GB free")
    for device in jax.devices():
        row("device", f"{device.device_kind} ({device.platform} {device.id})")
    for name in ("scan", "chunked", "pallas_tpu", "pallas_gpu"):
        row(f"attention {name}", _attention(name))
    return 0


def row(what: str, text: str) -> None:
    print(f"{what:22} {text}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _memory() -> str:
    if not Path("/proc/meminfo").exists():
        return f"unknown on {sys.platform}"
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(rows[name].split()[0]) * 1024 / 1e9 for name in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GB, {free:.1f} GB available"


def _attention(name: str) -> str:
    """Runs the implementation once on 16 tokens."""
    import jax
    import jax.numpy as jnp

    from linscale.kernels import linear_attention

    q = jnp.ones((1, 16, 1, 16))
    try:
        jax.block_until_ready(linear_attention(q, q, q, implementation=name))
    except Exception as error:  # whatever it is, the reader wants to see it here
        return "no: " + " ".join(str(error).split())[:160]
    return "runs"
