"""flash-linear-attention's side of gpu_benchmark: compiling what its tuning tries, checking and timing it.

Run by gpu_benchmark.py. With --compile i/n the process compiles every n-th program of all that tuning will try into
Triton's cache and runs nothing on the GPU but small inputs; without, it waits for that, checks and times one kind.
"""

import argparse
import gc
import os
import time
import zlib
from pathlib import Path

import numpy as np
from gpu_benchmark_rows import CHECK, Turns, check, draw, write_row
from gpu_benchmark_rows import SHAPES as ALL

SHAPES = [shape for shape in ALL if shape not in ((1, 131072, 16, 128), (8, 2048, 16, 128))]  # for time


def stages(kinds):
    """(kind, shape) in the order of compiling: a program differs by heads and channels, few by batch, none by tokens."""
    first = {shape[2:]: shape for shape in reversed(SHAPES)}
    order = sorted(first.values(), key=SHAPES.index)
    return [(kind, shape) for kind in kinds for shape in order[:3]] + [
        (kind, shape) for shape in order[3:] for kind in kinds
    ]


def marker(folder, kind, shape, share):
    return folder / "compiled_{}_{}_{}_{}".format(kind, *shape[2:], share)


def call(kind, x):
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    if kind == "scalar":
        return chunk_simple_gla(x["q"], x["k"], x["v"], g_gamma=x["log_decay"], scale=1.0)[0]
    if kind == "none":
        return chunk_linear_attn(x["q"], x["k"], x["v"], scale=1.0, normalize=False)[0]
    return chunk_gla(x["q"], x["k"], x["v"], x["log_decay"], scale=1.0)[0]


def place(shape, kind):
    import torch

    x = {n: torch.tensor(a, device="cuda") for n, a in draw(shape, kind).items()}
    for n, a in x.items():
        if a.ndim == 4:
            x[n] = a.bfloat16().repeat(shape[0] // a.shape[0], shape[1] // a.shape[1], 1, 1)
    if kind == "vector":
        x["k"] = (1 - x["log_decay"].float().exp()).bfloat16()
    leaves = ["q", "k", "v"] + (["log_decay"] if kind == "vector" else [])
    for n in leaves:
        x[n].requires_grad_(True)
    return x, leaves


def both(kind, x, leaves):
    import torch

    out = call(kind, x)
    return out, torch.autograd.grad(out, [x[n] for n in leaves], x["d_out"])


def compile_instead(share, shares):
    """Puts in the place of Triton's tuning and launching the compilation of every `shares`-th program into its cache."""
    from triton.runtime.autotuner import Autotuner

    def compile_only(self, *positional, **named):
        self.nargs = dict(zip(self.arg_names, positional))
        offset = zlib.crc32(
            self.base_fn.__name__.encode()
        )  # kernels with few programs do not all fall to the first process
        for n, config in enumerate(self.prune_configs(named)):
            if (n + offset) % shares == share:
                try:
                    self.fn.run(*positional, **{**named, **config.all_kwargs(), "warmup": True})
                except Exception as e:  # tuning will meet it too, and pass on
                    print(f"not compiled: {self.base_fn.__name__} {config}: {type(e).__name__}", flush=True)

    Autotuner.run = compile_only


def compile_share(args, share, shares):
    compile_instead(share, shares)
    for kind, shape in stages(args.kinds):
        try:
            x, leaves = place((shape[0], 256, *shape[2:]), kind)
            both(kind, x, leaves)
        except Exception as e:
            print(f"fla, {kind} {shape}: {type(e).__name__} {str(e)[:300]}", flush=True)
        marker(args.out, kind, shape, share).touch()


def device_time(f, repeat):
    """Mean milliseconds of all kernels of a call: the profiler's events carry no call."""
    import torch

    f()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeat):
            f()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in profile.key_averages()) / 1e3 / repeat


def wait(condition):
    while not condition():
        time.sleep(0.3)


def right(args, kind):
    x, leaves = place(CHECK, kind)
    out, grads = both(kind, x, leaves)
    got = {"out": out} | {f"d_{n}": g for n, g in zip(leaves, grads)}
    if kind == "vector":  # ours ties k to the decay: the gradients of those two differ by design
        got = {n: got[n] for n in ("out", "d_q", "d_v")}
    return check(
        kind, "fla", {n: a.detach().float().cpu() for n, a in got.items()}, np.load(args.out / f"want_{kind}.npz")
    )


def measure(args, kind):
    import torch

    turns = Turns(args.out)
    wait((args.out / f"want_{kind}.npz").exists)
    for n, shape in enumerate(SHAPES):
        wait(lambda s=shape: all(marker(args.out, kind, s, i).exists() for i in range(args.compilers)))
        try:
            with turns.mine():
                x, leaves = place(shape, kind)
                start = time.time()
                both(kind, x, leaves)
                torch.cuda.synchronize()
                tuned = time.time() - start
                if n == 0 and not right(args, kind):
                    return

                def forward(x=x):
                    with torch.no_grad():
                        return call(kind, x)

                times = [device_time(forward, 7), device_time(lambda x=x, n=leaves: both(kind, x, n), 7)]
                del x, forward
                gc.collect()
                torch.cuda.empty_cache()
            write_row(args.out, {"kind": kind, "name": "fla", "shape": shape, "times": times})
            write_row(args.out, {"kind": kind, "name": "tuning", "shape": shape, "seconds": tuned})
        except Exception as e:  # the next shape may do
            print(f"fla, {kind} {shape}: {type(e).__name__} {str(e)[:300]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", type=lambda s: s.split(","), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compile")
    parser.add_argument("--compilers", type=int, default=0)
    args = parser.parse_args()
    os.environ["FLA_CACHE_RESULTS"] = "0"  # choices are made anew, and never taken from the compiling processes
    os.environ["TRITON_CACHE_DIR"] = str(args.out / "triton")
    if args.compile:
        compile_share(args, *(int(n) for n in args.compile.split("/")))
    else:
        measure(args, args.kinds[0])


if __name__ == "__main__":
    main()
