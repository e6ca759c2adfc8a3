"""How a process ends before its run does, so that whoever started it can start it again.

Both ways end with exit code 75 (EX_TEMPFAIL of sysexits.h): the same command continues the run. Schedulers restart on
it; codes 1 and 2 (diverged, wrong input) would only come again.

  SIGTERM   the step in progress is finished and saved, at most config.train.stop_seconds after the signal
  watchdog  a step, evaluation or save that takes longer than config.train.hang_seconds, as a collective that waits for
            a dead host does, ends with the stacks of all threads on stderr and in hang.txt of the run's folder
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax

from linscale.config import Restart
from linscale.training.metrics import say


class Sigterm:
    """Whether SIGTERM has come. Until `saves` is set, as long as nothing could be saved, it raises Restart at once."""

    def __init__(self, seconds: float):
        self.saves = False
        self.ended = threading.Event()
        self._seconds = seconds
        self._came = False

    def __call__(self, signum, frame) -> None:
        self._came = True
        if not self.saves:
            raise Restart("SIGTERM came before the first step; the same command begins again.")
        say("SIGTERM: saving, then ending with exit code 75")

    def came(self, step: int) -> bool:
        """True at the step after which all hosts stop; with several, they agree on one."""
        if jax.process_count() == 1:
            return self._came
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            threading.Thread(target=self.countdown, daemon=True).start()
            return True
        return False

    def countdown(self) -> None:
        if not self.ended.wait(self._seconds):
            end(f"nothing was saved within {self._seconds:g} s of SIGTERM; the last checkpoint stands.")


@contextlib.contextmanager
def on_sigterm(seconds: float):
    """Yields a Sigterm. From the signal on, the block has so many seconds; then the process ends, whatever it does.

    With several hosts jax's own notifier takes the signal, and only the agreement on a step is ours. In a thread other
    than the main one signals cannot be taken, and nothing happens.
    """
    sigterm = Sigterm(seconds)
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        sigterm.saves = True
        try:
            yield sigterm
        finally:
            sigterm.ended.set()
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    # Python runs a handler only between two instructions of the main thread, which may be waiting for a device. The
    # wake-up descriptor is written at once, so the time is kept by a thread that reads it.
    def wait():
        while (came := os.read(reads, 1)) and came[0] != signal.SIGTERM:
            pass
        os.close(reads)
        if came:
            sigterm.countdown()

    threading.Thread(target=wait, daemon=True).start()
    handler, descriptor = (
        signal.signal(signal.SIGTERM, sigterm),
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False),
    )
    try:
        yield sigterm
    finally:
        sigterm.ended.set()
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(writes)  # ends the thread


@contextlib.contextmanager
def watchdog(seconds: float, folder: Path):
    """Yields tick(what), to be called with what comes next; the process ends if no call follows in time. 0: never."""
    state = {"what": "the start", "since": time.monotonic()}
    ended = threading.Event()

    def tick(what: str) -> None:
        state.update(what=what, since=time.monotonic())

    def watch():
        while not ended.wait(max(0.05, min(seconds / 20, 5.0))):
            if time.monotonic() - state["since"] > seconds:
                with contextlib.suppress(OSError), open(folder / "hang.txt", "w") as file:
                    file.write(f"{state['what']} took longer than {seconds:g} s\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
                faulthandler.dump_traceback(sys.__stderr__)
                end(f"{state['what']} hangs: nothing for {seconds:g} s (config.train.hang_seconds); stacks above.")

    if seconds:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield tick
    finally:
        ended.set()


def end(reason: str) -> None:
    """Ends the process from any thread, without waiting for anything."""
    os.write(2, f"linscale: {reason} The same command continues (exit code {Restart.code}).\n".encode())
    with contextlib.suppress(Exception):  # data workers that hang themselves cannot see that this process ends
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(Restart.code)
