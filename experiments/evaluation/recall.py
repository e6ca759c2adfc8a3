"""Trains small models on multi-query associative recall and tests them on fewer, as many and more pairs.

  python experiments/evaluation/recall.py --out recall.json

Every architecture is trained by the same rule with linscale's own train step: it begins with 2 pairs and goes on to
twice as many whenever 9 of 10 answers are right, up to --pairs, for --steps steps at most.
"""

import argparse
import json
import time

import jax
import numpy as np

import linscale
from linscale.config import base, resolve
from linscale.evaluation import recall
from linscale.training import step as steps


def config_of(arch: str, args):
    config = base()
    config.name = f"recall-{arch}"
    config.model.arch = arch
    config.model.layers, config.model.width, config.model.ffn = args.layers, args.width, args.width * 2
    config.model.heads = args.heads
    config.model.vocab_size = args.vocab
    config.model.init_std = args.init_std
    config.model.rope_base = args.rope_base
    config.optimizer.weight_decay = args.weight_decay
    config.train.batch, config.train.sequence, config.train.steps = args.batch, 4 * args.pairs, args.steps
    config.optimizer.learning_rate = args.lr
    config.optimizer.warmup_tokens = args.batch * 4 * args.pairs * 50
    return resolve(config)


def train(arch: str, args) -> dict:
    config = config_of(arch, args)
    state = jax.jit(lambda: steps.init(config))()
    one_step = jax.jit(lambda state, batch: steps.train_step(config, state, batch), donate_argnums=0)
    rng = np.random.default_rng(args.seed)
    begin, history, pairs = time.perf_counter(), [], 2
    for n in range(1, args.steps + 1):
        state, metrics = one_step(state, recall.batch(rng, args.batch, pairs, args.vocab))
        if n % args.every == 0 or n == args.steps:
            got = recall.accuracy(config.model, state.params, pairs=pairs, sequences=64, seed=n)
            history.append({"step": n, "pairs": pairs, "loss": float(metrics["loss"]), "accuracy": got})
            print(f"{arch} step {n}: {pairs} pairs, loss {history[-1]['loss']:.3f}, accuracy {got:.3f}", flush=True)
            if got > (0.9 if pairs < args.pairs else 0.995):
                if pairs == args.pairs:
                    break
                pairs = min(2 * pairs, args.pairs)
    tested = [p for p in (2, 4, 8, 16, 32, 64, 128) if p <= 2 * args.pairs]
    table = {p: recall.accuracy(config.model, state.params, pairs=p, sequences=256, seed=2) for p in tested}
    head = args.width // args.heads
    return {
        "arch": arch,
        "parameters": int(sum(x.size for x in jax.tree.leaves(state.params))),
        "state": None if arch == "llama" else args.layers * args.heads * head * head,
        "accuracy": table,
        "steps": n,
        "seconds": round(time.perf_counter() - begin, 1),
        "history": history,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="llama,hgrn2")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--init-std", type=float, default=0.125)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--rope-base", type=float, default=10_000.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    results = [train(arch, args) for arch in args.arch.split(",")]
    text = {"settings": vars(args), "linscale": linscale.__version__, "jax": jax.__version__, "results": results}
    if args.out:
        with open(args.out, "w") as file:
            json.dump(text, file, indent=1)
    for result in results:
        row = " | ".join(f"{100 * share:.1f}" for share in result["accuracy"].values())
        print(f"| {result['arch']} | {result['parameters']:,} | {row} | {result['seconds']} s |")


if __name__ == "__main__":
    main()
