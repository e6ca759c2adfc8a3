"""The faults of campaign.py. Each function starts attempt 0 of a case, disturbs it, and returns the next attempt's number.

They note in case.told: phase (where the fault fell, by what it left behind, not by what was aimed at), code (exit code
at the fault), seconds (from the fault to the exit), and "continues after": the steps one of which the next process must
name as the one it goes on from; -1: it says that the run is finished.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

# A fifth of the kills at any moment, the others where most is at stake.
TARGETS = ("any moment", "a save", "an evaluation", "data start-up", "a restart")
RESTART, CANNOT, DISK = 75, 2, 24 * 2**20
HANG = 20.0  # config.train.hang_seconds of the runs that are made to hang
PATIENCE = 300.0  # seconds to wait for a phase on a busy machine


@contextlib.contextmanager
def place(case):
    """Where the case's run lies: for a full disk a tmpfs of its own, else its folder."""
    if case.kind != "disk":
        yield
        return
    case.output = f"{case.folder}/disk"
    os.mkdir(case.output)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", case.output], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", case.output], check=True)


def whole_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that are complete on disk, sorted: orbax writes the mark last, a small state's
    folder gets its name last."""
    return sorted(
        int(path.parent.name)
        for path in run.glob("checkpoints/[0-9]*/*")
        if path.parent.name.isdigit() and path.name in ("commit_success.txt", "state.safetensors")
    )


def continued_after(said: str) -> int | None:
    """The step that a process says it goes on from; 0: the beginning; -1: the run was finished; None: it did not come so far."""
    if found := re.search(r"continues after step (\d+)", said):
        return int(found[1])
    if "finished before" in said:
        return -1
    return 0 if "compiling" in said else None


def wait(process, reached) -> bool:
    """True once reached(); False if the process ended before."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if reached():
            return True
        time.sleep(0.001)
    return False


def last_line(run: Path) -> str:
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").read_bytes()[-400:].decode(errors="replace").rstrip("\n").rpartition("\n")[2]
    return ""


def lines(run: Path) -> int:
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def phase(case, attempt: int, evaluations: set[int]) -> str:
    """Where the process of this attempt was when it ended, from what it left behind."""
    run, said, last = case.run, case.said(attempt), last_line(case.run)
    if (run / "DONE.json").exists():
        return "after the last step"
    if any(run.glob("checkpoints/*[0-9].*-tmp*")) or _unfinished(run):
        return "a save"
    corpora = list(Path(case.cache).glob("*/manifest.json"))
    if not corpora and Path(case.cache).exists():
        return "data start-up"
    if "compiling" not in said:
        return "start-up"
    if not last or ((continued := continued_after(said)) and f'"step": {continued},' in last):
        return "compilation or restoring"
    step = re.match(r'\{"step": (\d+),', last)
    if step and int(step[1]) in evaluations and "heldout" not in last:
        return "an evaluation"
    return "training"


def _unfinished(run: Path) -> bool:
    whole = set(whole_steps(run))
    return any(path.name.isdigit() and int(path.name) not in whole for path in run.glob("checkpoints/*"))


def _evaluations() -> set[int]:
    from campaign import STEPS

    from linscale.training.loop import eval_steps

    return eval_steps(STEPS, 8)


def note(case, attempt: int, code: int, began: float) -> None:
    """After the process has ended. A step that was whole may have been replaced by a newer one meanwhile."""
    steps = whole_steps(case.run)
    case.told |= {
        "phase": phase(case, attempt, _evaluations()),
        "code": code,
        "seconds": round(time.monotonic() - began, 2),
        "continues after": [-1 if (case.run / "DONE.json").exists() else steps[-1] if steps else 0],
        "lines": lines(case.run),
    }


def _kill(process) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def begin_again(case) -> None:
    import shutil

    shutil.rmtree(case.run, ignore_errors=True)


def sigkill(case, seconds: float) -> int:
    """SIGKILL of the process alone, as the system does when memory is short; its workers see their parent die."""
    dice, attempt = random.Random(case.seed), 0
    if case.target == "data start-up":
        case.cache = f"{case.folder}/corpora"
    if case.target == "a restart":  # killed once before, so that the second kill falls on a restoring process
        sigkill_once(case, 0, dice, "a step", seconds)
        attempt = 1
    for _ in range(8):
        if sigkill_once(case, attempt, dice, case.target, seconds):
            return attempt + 1
        if case.target == "a restart":
            raise RuntimeError("a restart ended before its kill")
        begin_again(case)
    raise RuntimeError(f"{case.target} was never reached")


def sigkill_once(case, attempt: int, dice: random.Random, target: str, seconds: float) -> bool:
    """False if the process had ended before."""
    evaluations, run = sorted(_evaluations()), case.run
    process = case.start(attempt)
    if target == "any moment":
        time.sleep(dice.uniform(0, seconds))
    elif target == "a restart":
        time.sleep(dice.uniform(0, 0.8 * seconds))
    elif target == "a step":
        wanted = dice.randrange(25, 180)
        wait(process, lambda: lines(run) >= wanted)
    elif target == "a save":
        wanted = dice.randrange(20, 201, 20)
        wait(process, lambda: any(run.glob(f"checkpoints/{wanted}*")))
        time.sleep(dice.uniform(0, 0.01))
    elif target == "an evaluation":
        wanted = dice.choice(evaluations[:-1])
        wait(process, lambda: f'"step": {wanted},' in last_line(run))
        time.sleep(dice.uniform(0, 0.01))
    elif target == "data start-up":
        wait(process, lambda: Path(case.cache).exists() and any(Path(case.cache).iterdir()))
        time.sleep(dice.uniform(0, 0.02))
    if process.poll() is not None:
        return False
    began = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    note(case, attempt, process.wait(), began)
    return True


def sigterm(case, seconds: float) -> int:
    """To the process or, as schedulers do, to its whole group. Exit code 75, and what it names as saved is saved."""
    dice = random.Random(case.seed)
    for _ in range(8):
        process, wanted = case.start(0), dice.randrange(-40, 190)
        if wanted < 0:
            wait(process, lambda: "config.data.source" in case.said(0))  # from here on the signal is taken
            time.sleep(dice.uniform(0, 0.3) * seconds)
        else:
            wait(process, lambda wanted=wanted: lines(case.run) > wanted)
        if process.poll() is None:
            began = time.monotonic()
            (os.killpg if dice.random() < 0.5 else os.kill)(process.pid, signal.SIGTERM)
            code = process.wait(timeout=120)
            if code != 0:  # 0: it came within the last step
                note(case, 0, code, began)
                _sigterm_said(case, code)
                return 1
        begin_again(case)
    raise RuntimeError("the signal always came too late")


def _sigterm_said(case, code: int) -> None:
    if code != RESTART:
        case.bad.append(f"exit code {code} after SIGTERM")
    named = re.search(r"after step (\d+), which is saved", case.said(0))
    case.told["phase"] = "after the first step" if named else "before the first step"
    if named and case.told["continues after"] != [int(named[1])]:
        case.bad.append(f"named step {named[1]}, but {case.told['continues after']} is saved")
    if case.told["seconds"] > 25:
        case.bad.append(f"took {case.told['seconds']} s to end")


def damage(case, seconds: float) -> int:
    """A killed run, then one file of its newest checkpoint cut short or with one bit flipped; most often the largest."""
    dice = random.Random(case.seed)
    process, wanted = case.start(0), dice.randrange(45, 190)
    wait(process, lambda: lines(case.run) >= wanted and len(whole_steps(case.run)) > 1)
    began = time.monotonic()
    _kill(process)
    note(case, 0, process.returncode, began)
    newest, before = whole_steps(case.run)[::-1][:2]
    files = sorted(path for path in (case.run / "checkpoints" / str(newest)).rglob("*") if path.is_file())
    file = max(files, key=lambda path: path.stat().st_size) if dice.random() < 0.6 else dice.choice(files)
    content = bytearray(file.read_bytes())
    at, how = dice.randrange(len(content)) if content else 0, dice.choice(("truncated", "bit flipped"))
    if how == "truncated":
        content = content[:at]
    elif content:
        content[at] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    # Some bits of the storage format carry nothing; then the newest may be restored, as its arrays are checked.
    case.told |= {"phase": how, "file": str(file.relative_to(case.run)), "at": at, "continues after": [before, newest]}
    return 1


def disk(case, seconds: float) -> int:
    """The disk of the run fills up at a random step, but for some bytes. It stops cleanly or goes on; then there is room."""
    dice = random.Random(case.seed)
    case.tensorboard = dice.random() < 0.5
    process, wanted = case.start(0), dice.randrange(1, 190)
    wait(process, lambda wanted=wanted: lines(case.run) >= wanted)
    before, ballast = whole_steps(case.run), Path(case.output) / "ballast"
    leave, began = dice.choice((0, 4096, 100_000, 300_000)), time.monotonic()
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(65536)) == 65536:
            pass
    with open(ballast, "r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - leave))
    code = process.wait(timeout=PATIENCE)
    note(case, 0, code, began)
    case.told |= {"phase": "goes on" if code == 0 else "stops", "left": leave, "step": wanted}
    if code not in (0, CANNOT) or (code and "no space is left" not in case.said(0)):
        case.bad.append(f"exit code {code} on a full disk: {case.said(0)[-200:]!r}")
    if before and (not whole_steps(case.run) or whole_steps(case.run)[-1] < before[-1]):
        case.bad.append(f"checkpoint {before[-1]} was lost on a full disk")
    if code == 0:
        case.told["continues after"] = [-1]
    ballast.unlink()
    return 1


def worker(case, seconds: float) -> int:
    """SIGKILL of one of two data workers, as the system does when memory is short."""
    return _to_a_worker(case, signal.SIGKILL)


def hang(case, seconds: float) -> int:
    """SIGSTOP of one of two data workers: the run waits for it, as for a dead host, until the watchdog ends it."""
    attempt = _to_a_worker(case, signal.SIGSTOP)
    if "Thread" not in case.said(0) or not (case.run / "hang.txt").exists():
        case.bad.append("no stacks were dumped")
    if not HANG <= case.told["seconds"] < 2 * HANG:
        case.bad.append(f"ended after {case.told['seconds']} s, with config.train.hang_seconds {HANG}")
    return attempt


def _to_a_worker(case, sent: signal.Signals) -> int:
    dice = random.Random(case.seed)
    for _ in range(8):
        process, wanted = case.start(0), dice.randrange(1, 150)
        wait(process, lambda wanted=wanted: lines(case.run) >= wanted)
        found = _workers(process.pid)
        if process.poll() is None and found:
            began = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(found), sent)
            code = process.wait(timeout=PATIENCE)
            if code != 0:  # 0: all batches had been read
                note(case, 0, code, began)
                case.told["phase"] = "training"
                if code != RESTART:
                    case.bad.append(f"exit code {code} after a worker's {sent.name}")
                left = [pid for pid in found if Path(f"/proc/{pid}").exists() and _state(pid) != "Z"]
                time.sleep(1.0 if left else 0)
                if left := [pid for pid in left if Path(f"/proc/{pid}").exists() and _state(pid) != "Z"]:
                    case.bad.append(f"{len(left)} workers outlived their run")
                    for pid in left:
                        os.kill(pid, signal.SIGKILL)
                return 1
        begin_again(case)
    raise RuntimeError("the signal always came too late")


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def _workers(pid: int) -> list[int]:
    """Processes below this one that run grain's workers, not multiprocessing's own resource tracker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return sorted(found)
