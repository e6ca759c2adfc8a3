"""The fault "peer" of campaign.py: one of the two processes of a run is killed, the other must end, both start again.

As disturb.py, whose notes in case.told it makes; also "killed" (0, which is the coordinator, or 1) and "alone": the
largest relative differences from the same run in one process.
"""

import os
import random
import signal
import socket
import subprocess
import time

import disturb
import numpy as np

from linscale.training import hosts

PROCESSES = 2
# Both sum the gradients in another order than one process does. At the demo's rate, 4e-3, TNL lets that rounding
# grow to 5e-4 of the loss in 200 steps, at 1e-3 TNL and cosFormer2 to 6e-5; at this one it does not grow.
OVERRIDES = {"optimizer.learning_rate": 2.5e-4}
ALONE = {"loss": 1e-6, "heldout_loss": 1e-6, "heldout_bpb": 1e-6, "grad_norm": 1e-4}  # allowed, relative
GRACE = 30.0  # seconds on top of the time that linscale states, on a busy machine


def environments() -> list[dict[str, str]]:
    """Of each process of one attempt, as a user sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(PROCESSES)}
    return [common | {"JAX_PROCESS_ID": str(index)} for index in range(PROCESSES)]


def peer(case, seconds: float) -> int:
    """SIGKILL of one of two processes at a random step or before the first; the survivor ends with 75 in the time that hosts.py states.

    A fifth of the kills fall before the processes have come together, where the survivor waits longest.
    """
    dice = random.Random(case.seed)
    before_joining = case.number % 5 == 3
    for _ in range(8):
        processes, victim = case.start_all(0), dice.randrange(PROCESSES)
        if before_joining:
            time.sleep(dice.uniform(0, 0.5))
        else:
            wanted = max(0, dice.randrange(-30, 195))  # a step; time would fall mostly on starting and compiling
            disturb.wait(processes[0], lambda wanted=wanted: "compiling" in case.said(0) and _at(case, wanted))
            time.sleep(dice.uniform(0, 0.05 if wanted else 0.1 * seconds))
        if all(process.poll() is None for process in processes):
            _kill(case, processes, victim, hosts.JOIN if before_joining else hosts.HEARTBEAT)
            return 1
        for process in processes:
            process.wait(timeout=disturb.PATIENCE)
        disturb.begin_again(case)
    raise RuntimeError("the kill always came too late")


def _at(case, step: int) -> bool:
    return step == 0 or disturb.lines(case.run) >= step


def _kill(case, processes, victim: int, allowed: float) -> None:
    began, survivor = time.monotonic(), processes[1 - victim]
    os.kill(processes[victim].pid, signal.SIGKILL)
    processes[victim].wait()
    try:
        code = survivor.wait(timeout=allowed + GRACE)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        survivor.kill()
        survivor.wait()
    disturb.note(case, 0, code, began)
    case.told["killed"] = victim
    if code != disturb.RESTART and not (code == 0 and case.told["continues after"] == [-1]):
        case.bad.append(f"the survivor of process {victim} ended with {code} after {case.told['seconds']} s")


def compare_alone(case, lines: list[dict], state: dict[str, bytes], alone: dict) -> None:
    """With the same run in one process: losses to 1e-6; how far the parameters are apart is noted."""
    if [set(line) for line in lines] != [set(line) for line in alone["lines"]]:
        case.bad.append("other lines than the run in one process")
        return
    apart = dict.fromkeys(ALONE, 0.0)
    for line, other in zip(lines, alone["lines"]):
        for name, value in other.items():
            if name in apart:
                apart[name] = max(apart[name], abs(line[name] - value) / abs(value))
            elif line[name] != value:
                case.bad.append(f"{name} of step {line['step']} differs from the run in one process")
    squares = np.zeros(2)
    for name in (name for name in alone["state"] if name.startswith(".params")):
        ours, other = (np.frombuffer(one[name], np.float32).astype(np.float64) for one in (state, alone["state"]))
        squares += np.sum((ours - other) ** 2), np.sum(other**2)
    case.told["alone"] = apart | {"parameters": float(np.sqrt(squares[0] / squares[1]))}
    case.bad += [
        f"{name} is {apart[name]:.1e} from the run in one process" for name, most in ALONE.items() if apart[name] > most
    ]
