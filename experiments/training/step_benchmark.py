"""Throughput of the train step, one architecture after the other, on whatever device is here.

    python experiments/training/step_benchmark.py --layers 24 --width 1024 --ffn 2560 --batch 16 --sequence 2048

The exact step of `linscale train` (float32 master weights, AdamW, clip, bfloat16 compute on accelerators, nothing left
out) on random tokens, as unevenly frequent as words are (Zipf), with documents of random length packed together
(--mean-document 0: one document a row). Each
architecture runs in a process of its own: wall time of --steps steps after two warm-up steps, the device drained at
both ends; seconds from the start of the process to the end of the first step; peak memory as the allocator saw it.
MFU: exact FLOPs (linscale/scaling/flops.py) over the datasheet's dense bfloat16 peak, and over the rate of an
8192 x 8192 x 8192 product measured in the same process. Prints one line an architecture; --json writes them all.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # as of the command line
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
ARCHITECTURES = ["llama", "tnl", "hgrn2", "cosformer2"]


def draw(rng, batch, sequence, vocabulary, mean_document):
    import numpy as np

    frequency = 1 / np.arange(3, vocabulary + 3)  # even ones would hide what frequent tokens cost the embedding
    tokens = rng.choice(vocabulary, (batch, sequence + 1), p=frequency / frequency.sum()).astype(np.int32)
    starts = rng.random((batch, sequence)) < (1 / mean_document if mean_document else 0)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segment_ids": 1 + np.cumsum(starts, axis=1, dtype=np.int32),
        "weights": np.ones((batch, sequence), np.float32),
    }


def config_of(args):
    from linscale.config import Config, Model, Train

    model = Model(arch=args.arch, layers=args.layers, width=args.width, heads=args.width // args.head_dim, ffn=args.ffn)
    changes = {name: getattr(args, name) for name in ("vocab_size", "tied", "remat", "unroll", "attention")}
    model = dataclasses.replace(model, **changes)
    return Config(model=model, train=Train(batch=args.batch, sequence=args.sequence, accumulation=args.accumulation))


def matmul_flops(jax, size=8192, repeats=100):
    """FLOP/s of a bfloat16 product of random matrices, the ceiling this device reaches today."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), "bfloat16")
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    began = time.perf_counter()
    out = None
    for _ in range(repeats):
        out = product(a, b)
    out.block_until_ready()
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def measure(args) -> dict:
    import jax
    import numpy as np

    from linscale.scaling import flops
    from linscale.training import step

    config = config_of(args)
    rng = np.random.default_rng(0)
    shape = (args.batch, args.sequence, config.model.vocab_size, args.mean_document)
    batches = [draw(rng, *shape) for _ in range(4)]
    init = jax.jit(functools.partial(step.init, config))
    train_step = jax.jit(functools.partial(step.train_step, config), donate_argnums=0)
    began = time.perf_counter()
    train_step = train_step.lower(jax.eval_shape(init), batches[0]).compile()
    compile_seconds = time.perf_counter() - began
    if args.compile_only:
        init.lower().compile()
        return {"arch": args.arch, "compile_s": compile_seconds}
    batches = jax.device_put(batches)
    state = init()
    state, metrics = train_step(state, batches[0])
    first_loss = float(metrics["loss"])
    first_step = time.perf_counter() - BEGAN
    state, metrics = train_step(state, batches[1])
    metrics["loss"].block_until_ready()
    if args.profile:
        jax.profiler.start_trace(args.profile)
    began = time.perf_counter()
    for i in range(args.steps):
        state, metrics = train_step(state, batches[i % 4])
    last_loss = float(metrics["loss"])  # waits for the device
    seconds = (time.perf_counter() - began) / args.steps
    if args.profile:
        jax.profiler.stop_trace()
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind, "bfloat16")
    rate = args.batch * args.sequence / seconds
    achieved = rate * flops.flops_per_token(config.model, args.sequence)
    count = flops.count_parameters(config.model)
    planned = train_step.memory_analysis()
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    del state, batches
    return {
        "arch": args.arch,
        "device": device.device_kind,
        "jax": jax.__version__,
        "parameters": count.total,
        "parameters_nonembedding": count.nonembedding,
        "batch": args.batch,
        "sequence": args.sequence,
        "tokens_per_s": rate,
        "step_ms": 1e3 * seconds,
        "tflops": achieved / 1e12,
        "mfu": peak and achieved / peak,
        "of_matmul": achieved / matmul_flops(jax) if device.platform != "cpu" else None,
        "peak_gb": used and used / 1e9,
        "planned_gb": (planned.argument_size_in_bytes + planned.temp_size_in_bytes) / 1e9,
        "compile_s": compile_seconds,
        "first_step_s": first_step,
        "losses": [first_loss, last_loss],
    }


def line(row: dict) -> str:
    def percent(x):
        return f"{x:6.1%}" if x else "     -"

    return (
        f"{row['arch']:10s} {row['parameters'] / 1e6:7.1f}M  {row['batch']} x {row['sequence']}  "
        f"{row['tokens_per_s']:10,.0f} tokens/s  {row['step_ms']:8.1f} ms  MFU {percent(row['mfu'])}  "
        f"of matmul {percent(row['of_matmul'])}  {row['peak_gb'] or row['planned_gb']:6.1f} GB  "
        f"compile {row['compile_s']:5.1f} s  first step {row['first_step_s']:5.1f} s  loss {row['losses'][0]:.3f} to {row['losses'][1]:.3f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 24, "width": 1024, "ffn": 2560, "head-dim": 128, "vocab-size": 50_304}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = {"batch": 16, "sequence": 2048, "steps": 10, "mean-document": 1024, "accumulation": 1, "unroll": 0}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--architectures", type=lambda s: s.split(","), default=ARCHITECTURES)
    parser.add_argument("--arch", help="measure this one in this process and print its JSON")
    parser.add_argument("--compile-only", action="store_true", help="with --arch: to fill a compilation cache")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one architecture")
    parser.add_argument("--profile", help="folder for a profile of the timed steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    if args.arch:
        print(json.dumps(measure(args)), flush=True)
        return
    rows = []
    for arch in args.architectures:
        command = [sys.executable, __file__, *sys.argv[1:], "--arch", arch]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, check=True)
        except subprocess.TimeoutExpired:
            print(f"{arch:10s} did not finish in {args.limit:.0f} s", flush=True)
            continue
        except subprocess.CalledProcessError as error:  # out of memory, say: the others still run
            print(f"{arch:10s} failed: {error.stderr.strip().splitlines()[-1][:400]}", flush=True)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
