"""Gradients spoilt at 1 % of the steps, and at every step: what a run loses, and how it stops.

    python experiments/faults/spikes.py [--size 57k] [--share 0.01] [--seed 0] [--out DIR]

For each of the four architectures, demo runs (configs/demo.py) with the same data and seed: a clean one; one whose
gradients are spoilt at `share` of its steps, chosen at random, in turn by NaN in one parameter group, an infinity in
another, and all gradients times 1000; one whose gradients are NaN in one group at every step from the middle on; one
where they are 1000 times too large at every step from the middle on.

The gradients are spoilt where linscale.training.step.gradients returns them, inside the compiled step, by the sum of the
batch, so that a restored or diagnosed step is spoilt alike. The window of the spike rule needs 128 finite norms; the
spikes among the faults before that are not seen by it and marked as such.
Prints a table and writes spikes.json: skipped steps, held-out loss against the clean run, and for the runs that must
stop the number of steps until they did and the sentence they ended with. Exits with 1 if a loss is off by more than 1 %
or a run did not stop with the right parameter group named.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from linscale import data  # noqa: E402
from linscale.config import Config  # noqa: E402
from linscale.training import guard, loop, recipes, run_folder, step  # noqa: E402

FACTOR = 1000.0
KINDS = ("nan", "infinity", "spike")
gradients = step.gradients


def mark(batch: dict):
    """A number that tells batches apart, the same in numpy and inside a compiled step: sum of token times place."""
    tokens = batch["tokens"]
    place = np.arange(tokens.size, dtype=np.uint32).reshape(tokens.shape) * np.uint32(2_654_435_761)
    return (tokens.astype(np.uint32) * place).sum(dtype=np.uint32)


def spoil(faults: dict[int, str], groups: dict[str, str], marks: list[int]) -> None:
    """Replaces step.gradients. faults: step -> kind. groups: kind -> parameter group. marks: of every batch, in order."""
    table = {kind: np.array([marks[n - 1] for n, k in faults.items() if k == kind], np.uint32) for kind in KINDS}

    def spoilt(config, params, batch):
        loss, grads = gradients(config, params, batch)
        hit = {kind: jnp.any(mark(batch) == known) for kind, known in table.items()}

        def leaf(path, grad):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            grad = grad * jnp.where(hit["spike"], FACTOR, 1.0)
            for kind, value in (("nan", jnp.nan), ("infinity", jnp.inf)):
                if name == groups[kind]:
                    grad = jnp.where(hit[kind], value, grad)
            return grad

        return loss, jax.tree_util.tree_map_with_path(leaf, grads)

    step.gradients = spoilt


def run(config: Config, corpus, name: str, faults: dict[int, str], groups: dict[str, str], marks: list[int]) -> dict:
    """What came of it: held-out loss or the sentence it stopped with, steps done, skipped steps."""
    config = dataclasses.replace(config, name=f"{config.name}-{name}")
    spoil(faults, groups, marks)
    found = {"run": name, "faults": len(faults), "stopped": "", "heldout_loss": None}
    try:
        found["heldout_loss"] = loop.train(config, corpus)["heldout_loss"]
    except FloatingPointError as error:
        found["stopped"] = str(error)
    lines = [json.loads(text) for text in (run_folder.of(config) / "metrics.jsonl").read_text().splitlines()]
    found["skipped"] = next((line["skipped"] for line in reversed(lines) if "skipped" in line), 0)
    found["steps"] = lines[-1]["step"]
    return found


def of_architecture(arch: str, args, out: Path) -> list[dict]:
    overrides = {
        "output": out / "runs",
        "data.cache": out / "corpora",
        "log.tensorboard": "false",
        "train.log_every": 1,
    }
    config = recipes.load_run(f"{ROOT}/configs/demo.py:{arch}-{args.size}", [(k, str(v)) for k, v in overrides.items()])
    corpus = data.prepare(config.data, config.model.vocab_size, log=lambda text: None)
    batches = data.train_batches(corpus, batch=config.train.batch, sequence=config.train.sequence, seed=config.seed)
    marks = [int(mark(next(batches))) for _ in range(config.steps)]
    assert len(set(marks)) == len(marks)

    shapes = jax.eval_shape(lambda: step.init(config)).params
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    dice = random.Random(f"{args.seed} {arch}")
    groups = dict(zip(("nan", "infinity"), dice.sample(names, 2)))
    some = sorted(dice.sample(range(1, config.steps + 1), math.ceil(args.share * config.steps)))
    some = {n: KINDS[i % 3] for i, n in enumerate(some)}
    unseen = sum(kind == "spike" and n <= guard.WINDOW for n, kind in some.items())
    middle = config.steps // 2
    every = {kind: dict.fromkeys(range(middle, config.steps + 1), kind) for kind in ("nan", "spike")}

    clean = run(config, corpus, "clean", {}, groups, marks)
    rows = [clean, run(config, corpus, "some", some, groups, marks) | {"unseen": unseen}]
    for kind, faults in every.items():
        found = run(config, corpus, f"every-{kind}", faults, groups, marks)
        rows.append(found | {"until stop": found["steps"] - middle + 1, "group": groups.get(kind, "")})
    for row in rows:
        bad = []
        if row["run"] in ("clean", "some"):
            row["off"] = row["heldout_loss"] / clean["heldout_loss"] - 1 if row["heldout_loss"] else math.inf
            if abs(row["off"]) > 0.01:
                bad.append("the loss is off by more than 1 %")
            if row["skipped"] < row["faults"] - row.get("unseen", 0):
                bad.append("not all faults were skipped")
        elif not row["stopped"] or row["group"] not in row["stopped"] or row["until stop"] > config.train.skip_limit:
            bad.append("did not stop in time with its cause named")
        row |= {"arch": arch, "bad": bad, "limit": config.train.skip_limit}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="57k", help="of configs/demo.py")
    parser.add_argument("--share", type=float, default=0.01, help="of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder; default: a temporary one")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="spikes-"))
    rows = [row for arch in ("llama", "tnl", "hgrn2", "cosformer2") for row in of_architecture(arch, args, out)]
    (out / "spikes.json").write_text(json.dumps(rows, indent=1))
    print("| architecture | run | spoilt steps | skipped | held-out loss | off | steps until it stopped |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        loss = f"{row['heldout_loss']:.4f}" if row["heldout_loss"] else ""
        off = f"{row['off']:+.2%}" if "off" in row else ""
        stop = f"{row['until stop']} of {row['limit']}" if "until stop" in row else ""
        cells = (row["arch"], row["run"], row["faults"], row["skipped"], loss, off, stop)
        print("| " + " | ".join(map(str, cells)) + " |" + (f" {'; '.join(row['bad'])}" if row["bad"] else ""))
    for row in rows:
        if row["stopped"]:
            print(f"\n{row['arch']} {row['run']}: {row['stopped']}")
    return int(any(row["bad"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
