"""What a checkpoint every 30 steps costs, in the demo.

    python experiments/faults/overhead.py [--sizes 14k,28k,57k,155k,450k] [--archs llama,...] [--segments 20] [--batch 8] [--out DIR]

Runs of the demo (configs/demo.py) that save every 60 steps and log every 30: segments of 30 steps with a save at their
beginning alternate with segments without one, in the same process and minute, so that other load on the machine falls
on both alike. The overhead is the median of with / without - 1 over neighbours, with a 95 % bootstrap interval, of wall
time and of the processor time of all threads; it contains the wait for the step before, the copy, the sums, and what
the write in the background takes from the steps beside it. Beside them the time that the loop itself stands still for a
save, over the time of 30 steps: what remains where the write in the background has a core of its own. The last row of
each architecture weighs the sizes as the demo does, by the steps of each. Prints a table, writes overhead.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402

from linscale import data  # noqa: E402
from linscale.training import checkpoint, loop, metrics, recipes  # noqa: E402

INTERVAL = 30  # steps


def measure(arch: str, size: str, segments: int, batch: int, out: Path) -> dict:
    """Seconds of each segment of 30 steps, with and without a save; seconds that each call of save took."""
    fields = {
        "output": out / "runs", "data.cache": out / "corpora", "log.tensorboard": "false", "train.eval_count": 1,
        "train.batch": batch, "train.log_every": INTERVAL, "train.checkpoint_every": 2 * INTERVAL, "train.steps": INTERVAL * (2 * segments + 4),
    }  # fmt: skip
    config = recipes.load_run(f"{ROOT}/configs/demo.py:{arch}-{size}", [(k, str(v)) for k, v in fields.items()])
    corpus = data.prepare(config.data, config.model.vocab_size, log=lambda text: None)
    save, log, still, clocks = checkpoint.save, metrics.Log.training, [], []

    def timed(*args, **more):
        began = time.perf_counter()
        save(*args, **more)
        still.append(time.perf_counter() - began)

    def logged(*args):  # every 30 steps
        log(*args)
        clocks.append((time.perf_counter(), time.process_time()))

    checkpoint.save, metrics.Log.training = timed, logged
    try:
        loop.train(config, corpus)
    finally:
        checkpoint.save, metrics.Log.training = save, log
    spans = np.diff(
        clocks, axis=0
    )  # the first is steps 31 to 60, without a save; the next begins with the save of step 60
    with_save, without = spans[3::2][:segments], spans[4::2][:segments]  # the very first of each warms up
    return {"arch": arch, "size": size, "with": with_save.tolist(), "without": without.tolist(), "still": still[1:]}


def overhead(with_save, without) -> tuple[float, float, float]:
    """(overhead, lower, upper), shares of the time of 30 steps."""
    dice = np.random.default_rng(0)
    ratios = np.array(with_save) / np.array(without) - 1
    draws = [np.median(dice.choice(ratios, ratios.size)) for _ in range(2000)]
    return (np.median(ratios), *np.percentile(draws, [2.5, 97.5]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="14k,28k,57k,155k,450k")
    parser.add_argument("--archs", default="llama,tnl,hgrn2,cosformer2")
    parser.add_argument("--segments", type=int, default=20, help="of each kind")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step; the demo has 8")
    parser.add_argument("--out", type=Path, help="folder; default: a temporary one")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="overhead-"))
    rows = [measure(a, s, args.segments, args.batch, out) for a in args.archs.split(",") for s in args.sizes.split(",")]
    (out / "overhead.json").write_text(json.dumps(rows))
    sizes = recipes._import(f"{ROOT}/configs/demo.py").SIZES
    print(
        "| architecture | size | a step, ms | save, loop stands still, ms | wall, % (95 %) | processor, % (95 %) | still, % |"
    )
    print("|---|---|--:|--:|--:|--:|--:|")
    for arch in args.archs.split(","):
        total = np.zeros(2)  # wall, processor
        extra, stands = np.zeros(2), 0.0
        for row in (row for row in rows if row["arch"] == arch):
            each, still = np.median(row["without"], axis=0), np.median(row["still"])
            found = [overhead(*(np.array(row[kind])[:, i] for kind in ("with", "without"))) for i in range(2)]
            steps = sizes[row["size"]][3] / INTERVAL
            total, extra = total + steps * each, extra + steps * each * [share for share, _, _ in found]
            stands += steps * still
            cells = [f"{share:.1%} ({low:.1%} to {high:.1%})" for share, low, high in found]
            times = f"{each[0] / INTERVAL * 1e3:.2f} | {still * 1e3:.1f}"
            print(f"| {arch} | {row['size']} | {times} | {' | '.join(cells)} | {still / each[0]:.1%} |")
        shares = " | ".join(f"{share:.1%}" for share in extra / total)
        print(f"| {arch} | all | | | {shares} | {stands / total[0]:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
