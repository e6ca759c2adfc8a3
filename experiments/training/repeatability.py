"""Does the train step give the same bits each time it is run from the same state, and what differs where it does not?

    python experiments/training/repeatability.py --arch cosformer2 --batch 1 --sequence 65536
    python experiments/training/repeatability.py --arch cosformer2 --batch 1 --sequence 65536 --deterministic
    python experiments/training/repeatability.py --arch cosformer2 --batch 1 --sequence 65536 --theta-share 0

One compiled program of the benchmark's model with few layers, on the benchmark's tokens (step_benchmark.py), takes
--steps steps from the same first state --runs times. Prints JSON: the last losses, and for every array of the state
after one step that is not the same in all runs, the share of its elements that differ and the largest difference over
its largest element.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from step_benchmark import draw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from linscale.config import Config, Model, Optimizer, Train
from linscale.training import loop, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="cosformer2")
    for name, default in {"layers": 4, "width": 1024, "ffn": 2560, "batch": 1, "sequence": 65_536}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab-size", type=int, default=50_304)
    parser.add_argument("--mean-document", type=int, default=0, help="tokens; 0: one document a row")
    parser.add_argument("--theta-share", type=float, default=1.0, help="config.optimizer.theta_share")
    parser.add_argument("--deterministic", action="store_true", help="config.train.deterministic")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    model = Model(arch=args.arch, layers=args.layers, width=args.width, heads=args.width // 128, ffn=args.ffn)
    config = Config(
        model=dataclasses.replace(model, vocab_size=args.vocab_size),
        train=Train(batch=args.batch, sequence=args.sequence, deterministic=args.deterministic),
        optimizer=Optimizer(theta_share=args.theta_share),
    )
    rng = np.random.default_rng(0)
    batches = [draw(rng, args.batch, args.sequence, args.vocab_size, args.mean_document) for _ in range(4)]
    batches = jax.device_put(batches)
    init = jax.jit(functools.partial(step.init, config))
    train_step = jax.jit(functools.partial(step.train_step, config)).lower(jax.eval_shape(init), batches[0])
    train_step = train_step.compile(compiler_options=loop.compiler_options(config, jax.default_backend()))

    losses, first = [], []
    for _ in range(args.runs):
        state = init()
        for i in range(args.steps):
            state, metrics = train_step(state, batches[i % len(batches)])
            if i == 0:
                arrays = jax.tree_util.tree_leaves_with_path(state)
                first.append({jax.tree_util.keystr(path): np.asarray(x) for path, x in arrays})
        losses.append(float(metrics["loss"]))

    differ = {}
    for name, one in first[0].items():
        gap = np.max([np.abs(other[name] - one) for other in first[1:]], axis=0)
        if gap.any():
            differ[name] = [float(np.mean(gap > 0)), float(gap.max() / np.abs(one).max())]
    print(json.dumps(vars(args) | {"losses": losses, "differ_after_one_step": differ}))


if __name__ == "__main__":
    main()
