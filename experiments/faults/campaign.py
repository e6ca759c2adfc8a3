"""The fault campaign: runs that are killed, starved and damaged at random must end as the undisturbed run, bit for bit.

    python experiments/faults/campaign.py [--seed 0] [--only KIND,...] [--count N] [--jobs 2] [--out DIR]

Each case is one demo-size run (configs/demo.py, 14k, accumulation 2, a checkpoint every 20 of 200 steps, every step in
metrics.jsonl) of one of the four architectures, in processes started as a user starts them. It suffers one fault (see
disturb.py, and peers.py for runs of two processes); then the same command is given until it exits with 0. A case is
good if

  - every line of metrics.jsonl without its timing fields, DONE.json, and all bits of the final parameters, optimizer
    moments and guard equal those of the undisturbed run of its architecture in as many processes;
  - of two processes, losses equal those of the undisturbed run in one process to 1e-6;
  - the run went on from the newest checkpoint that was whole at the fault (the one before it, where that was damaged),
    and the lines up to it were not harmed;
  - no process ended with a traceback.

Prints a table, writes campaign.json, and exits with 1 if a case is bad. Full disks are small tmpfs mounts, so they need
root on Linux. The seed fixes what is done to whom; at which instruction a kill falls is up to the machine.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import disturb  # noqa: E402
import peers  # noqa: E402

from linscale.training.metrics import TIMING  # noqa: E402

ARCHITECTURES = ("llama", "tnl", "hgrn2", "cosformer2")
STEPS, EVERY = 200, 20
COUNTS = {"sigkill": 100, "sigterm": 20, "damage": 20, "disk": 10, "worker": 10, "peer": 10, "hang": 5}
ATTEMPTS = 4  # of the same command after the fault


@dataclass
class Case:
    """One run and the one fault it suffers."""

    kind: str
    number: int
    arch: str
    seed: int
    folder: str
    target: str = ""  # sigkill: the phase aimed at
    workers: int = 0
    tensorboard: bool = False
    cache: str = ""
    output: str = ""
    processes: int = 1
    told: dict = field(default_factory=dict)  # by disturb.py: phase hit, exit code, seconds...
    bad: list = field(default_factory=list)  # sentences; empty: the case is good

    @property
    def run(self) -> Path:
        return Path(self.output or self.folder) / "run"

    def command(self) -> list[str]:
        fields = {
            "name": "run",
            "output": self.output or self.folder,
            "data.cache": self.cache,
            "data.max_tokens": 1_000_000,
            "data.workers": self.workers,
            "train.steps": STEPS,
            "train.accumulation": 2,
            "train.log_every": 1,
            "train.checkpoint_every": EVERY,
            "train.checkpoint_keep": 3,
            "train.hang_seconds": disturb.HANG if self.kind == "hang" else 600,
            "log.tensorboard": str(self.tensorboard).lower(),
        } | (peers.OVERRIDES if self.kind == "peer" else {})
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        return [sys.executable, "-m", "linscale", "train", f"--config=configs/demo.py:{self.arch}-14k", *overrides]

    def start(self, attempt: int, index: int = 0, more: dict[str, str] | None = None) -> subprocess.Popen:
        """In a session of its own; what it says goes to a file of the case's folder. more: for its environment."""
        with open(self.log(attempt, index), "w") as log:
            return subprocess.Popen(
                self.command(), cwd=ROOT, env=os.environ | (more or {}),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start_all(self, attempt: int) -> list[subprocess.Popen]:
        """Every process of the run: one, or two where `processes` says so."""
        if self.processes == 1:
            return [self.start(attempt)]
        return [self.start(attempt, index, more) for index, more in enumerate(peers.environments())]

    def log(self, attempt: int, index: int = 0) -> Path:
        return Path(self.folder) / f"attempt{attempt}{f'-{index}' if index else ''}.txt"

    def said(self, attempt: int) -> str:
        return self.log(attempt).read_text()


def exact(run: Path) -> list[dict]:
    """metrics.jsonl without timing fields."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def done(run: Path) -> dict:
    return {name: value for name, value in json.loads((run / "DONE.json").read_text()).items() if name != "seconds"}


_reading = threading.Lock()


@functools.cache
def _abstract(arch: str):
    from linscale import sharding
    from linscale.training import checkpoint, recipes

    config = recipes.load_run(f"{ROOT}/configs/demo.py:{arch}-14k", [("train.steps", str(STEPS))])
    return checkpoint.abstract_state(config, sharding.make_mesh(config.mesh))


def final_state(arch: str, run: Path) -> dict[str, bytes]:
    """Path of every array of the last checkpoint -> its bytes."""
    import jax
    import numpy as np

    from linscale.training import checkpoint

    with _reading:
        tree, _ = checkpoint.read(run / "checkpoints" / str(STEPS), _abstract(arch))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def reference(arch: str, folder: Path, cache: str, kind: str = "none", processes: int = 1) -> dict:
    """The undisturbed run, done twice: the first fills the compilation cache, the second is timed and must equal it.

    For peers once, as the two processes share cores with much else: its cases, all started anew, must equal it.
    """
    found = []
    for turn in range(1 if kind == "peer" else 2):
        name = f"undisturbed-{arch}-{kind}-{processes}-{turn}"
        case = Case(kind, turn, arch, 0, str(folder / name), cache=cache, processes=processes)
        Path(case.folder).mkdir(parents=True)
        began = time.monotonic()
        if any(codes := [process.wait() for process in case.start_all(0)]):
            raise SystemExit(f"the undisturbed run of {arch} ended with {codes}: {case.log(0)}")
        found.append(
            {"lines": exact(case.run), "done": done(case.run), "state": final_state(arch, case.run)}
            | {"seconds": time.monotonic() - began}
        )
    first, last = ({k: v for k, v in one.items() if k != "seconds"} for one in (found[0], found[-1]))
    if first != last:
        raise SystemExit(f"two undisturbed runs of {arch} differ; there is nothing to compare with")
    return found[-1]


def references(arch: str, kinds: set[str], folder: Path, cache: str) -> dict[str, dict]:
    """For each kind what its runs must equal. Peers have one of two processes, which holds the one of one process."""
    found = {}
    if kinds - {"peer"}:
        found |= dict.fromkeys(kinds - {"peer"}, reference(arch, folder, cache))
    if "peer" in kinds:
        alone = reference(arch, folder, cache, "peer")
        found["peer"] = reference(arch, folder, cache, "peer", peers.PROCESSES) | {"alone": alone}
    return found


def carry_out(case: Case, undisturbed: dict) -> Case:
    """The fault, the restarts, the comparison. Fills case.told and case.bad."""
    try:
        Path(case.folder).mkdir(parents=True)
        with disturb.place(case):
            fault = peers.peer if case.kind == "peer" else getattr(disturb, case.kind)
            first = fault(case, undisturbed["seconds"])  # the number of the next attempt
            _unharmed(case, undisturbed)
            _finish(case, first)
            _compare(case, undisturbed)
    except Exception as error:  # a case that cannot be judged is bad, and the others go on
        case.bad.append(f"{type(error).__name__}: {error}")
    for log in sorted(Path(case.folder).glob("attempt*.txt")):
        if "Traceback" in log.read_text():
            case.bad.append(f"{log.stem} ended with a traceback")
    if not case.bad:
        shutil.rmtree(case.folder)
    return case


def _unharmed(case: Case, undisturbed: dict) -> None:
    """After the fault and before any restart: every line on disk is right, and none is missing up to the checkpoint."""
    lines = []
    if (path := case.run / "metrics.jsonl").exists():
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last one may be half-written
                lines.append(json.loads(text))
    lines = [{name: value for name, value in line.items() if name not in TIMING} for line in lines]
    reached = max(case.told["continues after"])
    if lines != undisturbed["lines"][: len(lines)] or (reached > 0 and (not lines or lines[-1]["step"] < reached)):
        case.bad.append(f"lines of metrics.jsonl up to step {reached} were harmed")


def _finish(case: Case, first: int) -> None:
    """The same command until it is done. The first one must go on where case.told says it must."""
    codes = case.told.setdefault("codes after", [])
    for attempt in range(first, first + ATTEMPTS):
        codes.append(max(process.wait(timeout=600) for process in case.start_all(attempt)))
        if attempt == first and (expected := case.told.get("continues after")) is not None:
            at = case.told["went on after"] = disturb.continued_after(case.said(attempt))
            if at not in expected:
                case.bad.append(f"went on after step {at}, not {expected}")
        if codes[-1] == 0:
            return
    case.bad.append(f"exit codes {codes} after the fault")


def _compare(case: Case, undisturbed: dict) -> None:
    if not (case.run / "DONE.json").exists():
        case.bad.append("no DONE.json")
        return
    if (lines := exact(case.run)) != undisturbed["lines"]:
        place = next((i for i, (a, b) in enumerate(zip(lines, undisturbed["lines"])) if a != b), "the end")
        case.bad.append(f"metrics differ from line {place} on")
    if done(case.run) != undisturbed["done"]:
        case.bad.append("DONE.json differs")
    state = final_state(case.arch, case.run)
    differ = [name for name in undisturbed["state"] if state.get(name) != undisturbed["state"][name]]
    if differ or len(state) != len(undisturbed["state"]):
        case.bad.append(f"{len(differ)} arrays of the final state differ, {differ[:1]} the first")
    if alone := undisturbed.get("alone"):
        peers.compare_alone(case, lines, state, alone)


def plan(seed: int, counts: dict[str, int], out: Path, cache: str) -> list[Case]:
    cases = []
    for kind, count in counts.items():
        dice = random.Random(f"{seed} {kind}")
        for number in range(count):
            case = Case(
                kind, number, ARCHITECTURES[number % 4], dice.randrange(2**31), str(out / f"{kind}-{number:03}"),
                target=disturb.TARGETS[number // 4 % len(disturb.TARGETS)] if kind == "sigkill" else "",
                workers=2 if kind in ("worker", "hang") else dice.choice((0, 0, 1, 2)), tensorboard=dice.random() < 0.3,
                cache=cache, processes=peers.PROCESSES if kind == "peer" else 1,
            )  # fmt: skip
            cases.append(case)
    random.Random(seed).shuffle(cases)  # so that an early end has seen some of each
    return cases


def table(cases: list[Case]) -> str:
    """Markdown: kind and phase, cases, good ones, exit codes at the fault, longest time from the fault to the exit."""
    groups = collections.defaultdict(list)
    for case in sorted(cases, key=lambda case: (list(COUNTS).index(case.kind), case.told.get("phase", ""))):
        groups[case.kind, case.told.get("phase", "not reached")].append(case)
    rows = [
        "| fault | where it fell | cases | bit for bit | exit codes | longest exit, s |",
        "|---|---|--:|--:|---|--:|",
    ]
    for (kind, phase), group in groups.items():
        codes = collections.Counter(str(case.told.get("code")) for case in group)
        slowest = max((case.told.get("seconds", 0.0) for case in group), default=0.0)
        good = sum(not case.bad for case in group)
        many = ", ".join(f"{code} ({n})" for code, n in sorted(codes.items()))
        rows.append(f"| {kind} | {phase} | {len(group)} | {good} | {many} | {f'{slowest:.1f}' if slowest else ''} |")
    good = sum(not case.bad for case in cases)
    return "\n".join([*rows, f"| all | | {len(cases)} | {good} | | |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(COUNTS), help=f"of {', '.join(COUNTS)}")
    parser.add_argument("--count", type=int, help="cases of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--out", type=Path, help="folder; default: a temporary one. Bad cases stay in it")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(COUNTS):
        parser.error(f"--only {unknown.pop()!r}; it must be of {', '.join(COUNTS)}")
    counts = {
        kind: n if args.count is None else args.count for kind, n in COUNTS.items() if kind in args.only.split(",")
    }

    out = args.out or Path(tempfile.mkdtemp(prefix="faults-"))
    out.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(out / "compiled")  # runs of one shape compile once
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    cache, began = str(out / "corpora"), time.monotonic()
    cases = plan(args.seed, counts, out, cache)
    with ThreadPoolExecutor(args.jobs) as pool:
        needed = sorted({case.arch for case in cases})
        # The first alone, as it tokenises the corpus that the others share.
        undisturbed = {arch: references(arch, set(counts), out, cache) for arch in needed[:1]}
        undisturbed |= zip(needed[1:], pool.map(lambda arch: references(arch, set(counts), out, cache), needed[1:]))
        ended = []
        for case in pool.map(lambda case: carry_out(case, undisturbed[case.arch][case.kind]), cases):
            ended.append(case)
            what = f"{case.kind} {case.number:3} {case.arch:10} {case.told.get('phase', '')}"
            print(f"{len(ended):3}/{len(cases)}  {what}: {'; '.join(case.bad) or 'equal'}", flush=True)
    about = {
        "seed": args.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in ("jax", "orbax-checkpoint", "grain", "numpy")},
        "undisturbed seconds": {
            arch: {kind: round(one["seconds"], 2) for kind, one in kinds.items()} for arch, kinds in undisturbed.items()
        },
    }
    (out / "campaign.json").write_text(json.dumps(about | {"cases": [asdict(case) for case in ended]}, indent=1))
    print(f"\n{table(ended)}\n\n{json.dumps(about)}\n{out / 'campaign.json'}")
    return int(any(case.bad for case in ended))


if __name__ == "__main__":
    sys.exit(main())
