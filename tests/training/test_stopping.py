"""SIGTERM and the watchdog, in processes of their own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from linscale.config import Restart
from linscale.training import loop


@pytest.fixture
def command(recipe, options, tmp_path):
    def build(output, **changes):
        overrides = [f"--config.{field}={value}" for field, value in changes.items()]
        where = [f"--config.output={tmp_path / output}"]
        return [sys.executable, "-m", "linscale", "train", f"--config={recipe}:tnl", *options, *where, *overrides]

    return build


def test_sigterm_saves_at_once_and_the_same_command_continues(command, make, exact, tmp_path):
    """No regular checkpoint but the last: what the signal saved is all there is to continue from."""
    shape = {"train.steps": 600, "train.checkpoint_every": 600, "data.workers": 2, "train.skip_limit": 600}
    process = subprocess.Popen(command("ended", **shape), stderr=subprocess.PIPE, text=True, start_new_session=True)
    path = tmp_path / "ended" / "tnl" / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 10):
        time.sleep(0.01)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do: the data workers get it too
    _, err = process.communicate(timeout=60)
    assert process.returncode == Restart.code and time.monotonic() - began < 25, err
    (saved,) = [int(folder.name) for folder in (tmp_path / "ended" / "tnl" / "checkpoints").iterdir()]
    assert f"after step {saved}, which is saved" in err and "Traceback" not in err
    again = subprocess.run(command("ended", **shape), capture_output=True, text=True)
    assert again.returncode == 0 and f"continues after step {saved}" in again.stderr
    loop.train(make("tnl", **shape | {"data.workers": 0, "output": tmp_path / "whole"}))
    assert exact(tmp_path / "ended" / "tnl") == exact(tmp_path / "whole" / "tnl")


RUN = """
import signal, sys, time
from pathlib import Path
import jax
from linscale.config import Restart
from linscale.training import stopping
ENDLESS = lambda: jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 7, 0)  # a device that never answers
jax.devices()
with stopping.on_sigterm({within}) as sigterm, stopping.watchdog({hang}, Path(sys.argv[1])) as tick:
    sigterm.saves = {saves}
    tick("step 7")
    print("ready", flush=True)
    {work}
"""


@pytest.mark.parametrize(
    "hang, saves, work, term, said",
    [
        (0.6, True, "time.sleep(60)", False, "step 7 hangs"),
        (0, True, "time.sleep(60)\n    time.sleep(60)", True, "nothing was saved within 0.5 s"),
        (0, False, "time.sleep(60)", True, "before the first step"),
        (0, True, "jax.block_until_ready(jax.jit(ENDLESS)())", True, "within 0.5 s"),
    ],
)
def test_a_process_that_hangs_ends_in_time_with_the_restartable_code(tmp_path, hang, saves, work, term, said):
    code = RUN.format(hang=hang, saves=saves, work=work, within=0.5 if saves else 20)  # 0.5 s pass on a busy machine
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        if term:
            process.terminate()
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert said in err and (process.returncode == Restart.code) == saves, err  # the exception is for the command line
    assert time.monotonic() - began < 8
    if hang:
        assert "Thread" in err and "step 7 took longer" in (tmp_path / "hang.txt").read_text()
