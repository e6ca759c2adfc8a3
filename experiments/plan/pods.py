"""Plans of every recipe in configs/pods.py, each in a process of its own, with its time and memory; and what the sequence
axis sends of each architecture at T and at 4T tokens a sequence. Prints the tables of a report.

    pip install 'linscale[tpu]'
    python experiments/plan/pods.py --output plans             # nine compiles of a 7B model, then eight small ones
    python experiments/plan/pods.py --output plans --only 'hgrn2-*'

A plan that is in the folder already is not made again; one that fails has its reason on stderr, and the others are made.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from linscale.training import recipes

TOPOLOGIES = {"v5p128": "v5p:4x4x8", "v5e256": "v5e:16x16"}
GIB = 2**30
SMALL = ("width=256", "heads=4", "ffn=704", "layers=4", "remat=full")  # 64 channels a head, which the TPU kernels serve


def plan(folder: Path, name: str, *argv: str) -> dict | None:
    """The JSON of `linscale plan`, with the seconds, processor seconds and peak memory of its process; None: it failed."""
    file, cost = folder / f"{name}.json", folder / f"{name}.cost.json"
    if not cost.exists():
        began = time.perf_counter()
        command = [sys.executable, "-m", "linscale", "plan", f"--json={file}", "--no-search", *argv]
        with open(folder / f"{name}.txt", "w") as out:
            child = subprocess.Popen(command, stdout=out)
            _, status, used = os.wait4(child.pid, 0)
        if not file.exists():
            print(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
            return None
        numbers = {
            "wall": time.perf_counter() - began,
            "processor": used.ru_utime + used.ru_stime,
            "memory": used.ru_maxrss * 1024,
        }
        cost.write_text(json.dumps(numbers))
    return json.loads(file.read_text())["asked"] | {"cost": json.loads(cost.read_text())}


def row(name: str, one: dict | None) -> str:
    if one is None:
        return f"| {name} | failed |"
    mesh = " x ".join(str(n) for n in one["mesh"].values())
    bound, train = one.get("bound"), one["config"]["train"]
    cells = [
        name,
        f"{mesh}, {train['accumulation']}, {one['config']['model']['remat']}",
        f"{one['parameters'] / GIB:.2f} + {one['optimizer'] / GIB:.2f} + {one['temporaries'] / GIB:.1f}",
        f"{one['peak'] / GIB:.1f} of {one['available'] / GIB:.1f}{'' if one['fits'] else ' **no**'}",
        "; ".join(f"{axis} {sent / GIB:.3g}" for axis, sent in one["sent"].items()),
    ]
    if bound:
        times = [f"{bound[part]:.2f}" for part in ("compute", "memory", "links")]
        cells += [" / ".join(times), f"{100 * one['mfu_at_bound']:.0f} %", f"{one['days_at_bound']:.2f}"]
    else:
        cells += ["", "", ""]
    cost = one["cost"]
    cells.append(f"{cost['wall']:.0f} ({cost['processor']:.0f}) s, {cost['memory'] / GIB:.1f} GiB")
    return f"| {' | '.join(cells)} |"


def pods(folder: Path, only: str) -> None:
    head = (
        "recipe",
        "data x fsdp x sequence x tensor, micro-batches, remat",
        "parameters + optimizer + rest, GiB",
        "peak, GiB",
        "sent by a device in a step, GiB",
        "least seconds: arithmetic / memory / links",
        "MFU at most",
        "days at least",
        "wall (processor) time, memory",
    )
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for rung in (one.name for one in recipes.load_ladder("configs/pods.py", [("data.path", "unread")])):
        if fnmatch.fnmatchcase(rung, only):
            topology = TOPOLOGIES[rung.rpartition("-")[2]]
            one = plan(folder, rung, f"--config=configs/pods.py:{rung}", f"--topology={topology}")
            print(row(rung, one), flush=True)


def sequence_axis(folder: Path, only: str) -> None:
    print(
        "\n| architecture | tokens a sequence | sequence axis, bytes a device and step | all axes |\n|---|---|---|---|"
    )
    for arch in ("tnl", "hgrn2", "cosformer2", "llama"):
        for tokens in (2048, 8192):
            if not fnmatch.fnmatchcase(arch, only) and only != "*":
                continue
            options = [f"--config.model.{field}" for field in SMALL]
            options += ["--config.mesh.data=1", "--config.mesh.sequence=4", f"--config.train.sequence={tokens}"]
            recipe = f"--config=configs/demo.py:{arch}-14k"
            one = plan(folder, f"{arch}-{tokens}", recipe, "--topology=v5e:2x2", *options)
            sent = one["sent"] if one else {"sequence": float("nan")}
            print(f"| {arch} | {tokens} | {sent['sequence']:,.0f} | {sum(sent.values()):,.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of the plans")
    parser.add_argument("--only", default="*", help="pattern of rungs")
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    pods(folder, options.only)
    sequence_axis(folder, options.only)


if __name__ == "__main__":
    main()
