"""SIGKILL at a random step, then the same command again: the metrics must equal an undisturbed run's bit for bit.

With gradients accumulated over micro-batches, and with data workers.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linscale.config import Restart
from linscale.training import loop

STEPS = 300
CHANGES = {"train.steps": STEPS, "train.checkpoint_every": 37, "train.accumulation": 2}
CHANGES["train.skip_limit"] = STEPS  # by luck of rounding ten spikes in a row would end the run


@pytest.fixture
def command(recipe, options):
    def build(output, workers):
        changes = CHANGES | {"output": output, "data.workers": workers}
        overrides = [f"--config.{field}={value}" for field, value in changes.items()]
        return [sys.executable, "-m", "linscale", "train", f"--config={recipe}:tnl", *options, *overrides]

    return build


def lines(output) -> int:
    path = output / "tnl" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(command, output, more: int) -> bool:
    """Starts the command, kills it once it has written so many lines more; False if it ended before."""
    before = lines(output)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not before < lines(output) >= before + more:
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return True


def check(command, make, exact, tmp_path, kills: int, workers: tuple[int, ...], seed: int):
    loop.train(make("tnl", **CHANGES, output=tmp_path / "whole"))
    whole = exact(tmp_path / "whole" / "tnl")
    assert len(whole) == STEPS // 2 + 4
    for n in workers:
        output, moment = tmp_path / f"killed{n}", random.Random(seed + n)
        killed = sum(kill_after(command(output, n), output, moment.randrange(1, STEPS // 3)) for _ in range(kills))
        subprocess.run(command(output, n), check=True, capture_output=True)
        assert killed and exact(output / "tnl") == whole


def workers_of(pid: int) -> list[int]:
    """Processes started by this one, but multiprocessing's own resource tracker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_killed_data_worker_ends_the_run_with_the_restartable_code(command, tmp_path):
    output, took = tmp_path / "starved", 0
    process = subprocess.Popen(command(output, 2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and lines(output) < 30:
            time.sleep(0.002)
        took = len(found := workers_of(process.pid))
        os.kill(random.choice(found), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert took == 2 and process.returncode == Restart.code, err
    assert "A data worker died" in err and "Traceback" not in err
    assert not (output / "tnl" / "DONE.json").exists()


def test_one_kill(command, make, exact, tmp_path):
    check(command, make, exact, tmp_path, kills=1, workers=(2,), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills(command, make, exact, tmp_path, seed):
    check(command, make, exact, tmp_path, kills=6, workers=(0, 2), seed=seed)
