"""Throughput of the train step, one architecture after the other, on whatever device is here.

    python experiments/training/step_benchmark.py --layers 24 --width 1024 --ffn 2816 --batch 16 --sequence 2048

The exact step of `linscale train` (float32 master weights, Adam, clip, bfloat16 compute on accelerators) on random
tokens with documents of random length packed together. Wall time of `--steps` steps after two warm-up steps, the device
drained at both ends; compile time by itself. MFU: exact FLOPs (linscale/scaling/flops.py) over the datasheet's dense
bfloat16 peak. Prints one line an architecture and writes them as JSON with --json.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def draw(rng, batch, sequence, vocabulary, mean_document):
    import numpy as np

    tokens = rng.integers(vocabulary, size=(batch, sequence + 1)).astype(np.int32)
    starts = rng.random((batch, sequence)) < 1 / mean_document
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segment_ids": 1 + np.cumsum(starts, axis=1, dtype=np.int32),
        "weights": np.ones((batch, sequence), np.float32),
    }


def measure(config, args):
    import jax
    import numpy as np

    from linscale.scaling import flops
    from linscale.training import step

    rng = np.random.default_rng(0)
    shape = (args.batch, args.sequence, config.model.vocab_size, args.mean_document)
    batches = [jax.device_put(draw(rng, *shape)) for _ in range(4)]
    state = jax.jit(functools.partial(step.init, config))()
    began = time.perf_counter()
    train_step = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    train_step = train_step.lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - began
    for i in range(2):
        state, metrics = train_step(state, batches[i])
    first_loss = float(metrics["loss"])
    began = time.perf_counter()
    for i in range(args.steps):
        state, metrics = train_step(state, batches[i % 4])
    last_loss = float(metrics["loss"])  # waits for the device
    seconds = (time.perf_counter() - began) / args.steps
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind, "bfloat16")
    rate = args.batch * args.sequence / seconds
    memory = train_step.memory_analysis()
    count = flops.count_parameters(config.model)
    return {
        "arch": config.model.arch,
        "device": device.device_kind,
        "jax": jax.__version__,
        "parameters": count.total,
        "parameters_nonembedding": count.nonembedding,
        "batch": args.batch,
        "sequence": args.sequence,
        "tokens_per_s": rate,
        "step_ms": 1e3 * seconds,
        "mfu": peak and rate * flops.flops_per_token(config.model, args.sequence) / peak,
        "planned_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "compile_s": compile_seconds,
        "losses": [first_loss, last_loss],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 24, "width": 1024, "ffn": 2816, "head-dim": 128, "vocab-size": 50_304}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"batch": 16, "sequence": 2048, "steps": 10, "mean-document": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--unroll", type=int, default=1)
    parser.add_argument("--architectures", type=lambda s: s.split(","), default=["llama", "tnl", "hgrn2", "cosformer2"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    import jax

    from linscale.config import Config, Model, Train

    rows = []
    for arch in args.architectures:
        model = Model(arch=arch, layers=args.layers, width=args.width, heads=args.width // args.head_dim, ffn=args.ffn)
        model = dataclasses.replace(model, vocab_size=args.vocab_size, remat=args.remat, unroll=args.unroll)
        model = dataclasses.replace(model, attention=args.attention)
        config = Config(model=model, train=Train(batch=args.batch, sequence=args.sequence))
        try:
            rows.append(measure(config, args))
        except jax.errors.JaxRuntimeError as error:  # out of memory: the others still run
            print(f"{arch:10s} failed: {str(error).splitlines()[0][:300]}", flush=True)
            continue
        finally:
            jax.clear_caches()
        r = rows[-1]
        print(
            f"{arch:10s} {r['parameters_nonembedding'] / 1e6:7.1f}M  {args.batch} x {args.sequence}  {r['tokens_per_s']:10,.0f} tokens/s  "
            f"{r['step_ms']:8.1f} ms  MFU {r['mfu'] or float('nan'):6.1%}  {r['planned_gb']:6.1f} GB  compile {r['compile_s']:5.1f} s  "
            f"loss {r['losses'][0]:.3f} to {r['losses'][1]:.3f}",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
