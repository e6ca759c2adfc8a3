"""Linear attention on a Hopper GPU: our kernels, flash-linear-attention and cuDNN softmax on the same inputs.

    python experiments/kernels/gpu_benchmark.py [--kinds scalar,vector,none,phase] [--no-peer] [--limit 480] [--out DIR]

Every implementation is checked against a float64 scan first (relative RMS error of the output and of each gradient);
only what passed is timed. Times are device times: the sum of the durations of all GPU kernels of a call as CUPTI
records them (for JAX jax.experimental.mosaic.gpu.profiler, for torch torch.profiler), median of repetitions (torch:
mean); launch gaps do not count for either side. The floor is measured beside each row: elementwise kernels that read
and write what the operator must (forward: 3 tensors in, 1 out; backward: 4 in, 3 out).

Each kind of each side is a process of its own; they build programs side by side and take turns on the GPU, most wanted
rows first. Rows are written as they come (rows.jsonl), so that a run which meets its limit loses only what is missing.
fla (needs torch and fla-core; left out without them) tunes by trying hundreds of programs. They are all compiled
beforehand by many processes into Triton's cache (`gpu_benchmark_peer.py`); the tuning itself runs alone on the GPU and
chooses as it always does. "first" is the time from a new shape to its first forward + backward result, taken before any
other process of this program has begun.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from gpu_benchmark_rows import CHECK, SHAPES, Turns, check, draw, load_rows, plot, report, write_row  # noqa: E402

SOFTMAX = (2048, 512, 128, 8192, 1024, 256, 4096, 16384, 32768, 65536)  # tokens, of 65,536 in all, 16 heads


def device_time(f, *a, repeat):
    """Median milliseconds of all kernels of a call; f is compiled."""
    from jax.experimental.mosaic.gpu import profiler

    return float(np.median(profiler.measure(f, iterations=repeat)(*a)[1]))


def functions(implementation):
    import jax

    from linscale.kernels import linear_attention

    def forward(x):
        extra = {n: x[n] for n in ("log_decay", "phase") if n in x}
        k = None if extra.get("log_decay") is not None and extra["log_decay"].ndim == 4 else x["k"]
        return linear_attention(x["q"], k, x["v"], implementation=implementation, **extra)[0]

    def both(x):
        vector = "log_decay" in x and x["log_decay"].ndim == 4  # k is then tied to the decay
        named = {n: x[n] for n in ("q", "v", "log_decay" if vector else "k")}
        out, pull = jax.vjp(lambda named: forward(x | named), named)
        return out, pull(x["d_out"])[0]

    return forward, both


def place(shape, kind):
    import jax.numpy as jnp

    x = {n: jnp.asarray(a, jnp.bfloat16 if a.ndim == 4 else jnp.float32) for n, a in draw(shape, kind).items()}
    times = lambda a: (shape[0] // a.shape[0], shape[1] // a.shape[1], 1, 1)  # noqa: E731
    return {n: jnp.tile(a, times(a)) if a.ndim == 4 else a for n, a in x.items()}


def abstract(shape, kind):
    import jax
    import jax.numpy as jnp

    given = {n: (shape if a.ndim == 4 else a.shape, a.ndim) for n, a in draw(shape, kind).items()}
    return {n: jax.ShapeDtypeStruct(s, jnp.bfloat16 if d == 4 else jnp.float32) for n, (s, d) in given.items()}


def build(f, *arguments):
    import jax

    return jax.jit(f).lower(*arguments).compile()


def floors(shape):
    """Programs that read and write what forward and backward must."""
    x = [abstract(shape, "none")[n] for n in ("q", "k", "v", "d_out")]
    backward = build(lambda q, k, v, d: (q + k + v - d, q * k + v * d, q - k * v * d), *x)
    return build(lambda q, k, v: q + k + v, *x[:3]), backward


def time_floors(programs, x, repeat):
    arrays = [x[n] for n in ("q", "k", "v", "d_out")]
    forward = device_time(programs[0], *arrays[:3], repeat=repeat)
    return forward, forward + device_time(programs[1], *arrays, repeat=repeat)


def ours(args, kind):
    import jax
    import jax.numpy as jnp

    turns = Turns(args.out)
    if args.first:
        x = place(SHAPES[0], kind)
        jax.block_until_ready(x)
        start = time.time()
        jax.block_until_ready(jax.jit(functions("pallas_gpu")[1])(x))
        first = time.time() - start
        print(f"first    {kind:8s} forward + backward {first:.1f} s", flush=True)
        write_row(args.out, {"kind": kind, "name": "first", "seconds": first})
        del x
    (args.out / f"first_{kind}").touch()

    with turns.mine(), jax.enable_x64(True):
        low = place(CHECK, kind)
        wide = {n: jnp.asarray(np.asarray(a, np.float64)) for n, a in low.items()}
        want_out, want = jax.jit(functions("scan")[1])(wide)
        want = {"out": want_out} | {f"d_{n}": g for n, g in want.items()}
        want = {n: np.asarray(a) for n, a in want.items()}
        np.savez(args.out / f"part_{kind}.npz", **want)
        (args.out / f"part_{kind}.npz").rename(args.out / f"want_{kind}.npz")
    for name in args.implementations:
        run = build(functions(name)[1], low)
        with turns.mine():
            out, grads = run(low)
            if not check(kind, name, {"out": out} | {f"d_{n}": g for n, g in grads.items()}, want):
                continue
        for shape in SHAPES[: args.shapes]:
            empty = abstract(shape, kind)
            programs = [build(f, empty) for f in functions(name)]
            floor = floors(shape)
            repeat = 15 if np.prod(shape) < 2**28 and name != "chunked" else 5  # the profiler keeps all results
            with turns.mine():
                x = place(shape, kind)
                times = [device_time(f, x, repeat=repeat) for f in programs]
                least = time_floors(floor, x, repeat)
                del x
            write_row(
                args.out,
                {"kind": kind, "name": name, "shape": shape, "times": times, "floors": least, "repeat": repeat},
            )


def softmax(args):
    import jax

    turns = Turns(args.out)

    def forward(x):
        return jax.nn.dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, implementation="cudnn")

    def both(x):
        named = {n: x[n] for n in "qkv"}
        out, pull = jax.vjp(lambda named: forward(x | named), named)
        return out, pull(x["d_out"])[0]

    for tokens in args.softmax:
        shape = (max(1, 65536 // tokens), tokens, 16, 128)
        for kind, name, pair in (
            ("softmax", "cudnn", (forward, both)),
            ("scalar", "pallas_gpu", functions("pallas_gpu")),
        ):
            programs = [build(f, abstract(shape, "none" if name == "cudnn" else kind)) for f in pair]
            with turns.mine():
                x = place(shape, "none" if name == "cudnn" else kind)
                times = [device_time(f, x, repeat=5) for f in programs]
                del x
            write_row(args.out, {"kind": kind, "name": name, "shape": shape, "times": times, "for": "softmax"})


def main():
    names = lambda s: [n for n in s.split(",") if n]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", type=names, default=["vector", "scalar", "none", "phase"])
    parser.add_argument("--out", type=Path, default=Path("gpu_benchmark"))
    parser.add_argument("--limit", type=float, default=480, help="seconds; what runs then is ended")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--compilers", type=int, default=max(1, (os.cpu_count() or 8) - 5), help="processes, for fla")
    parser.add_argument("--softmax", type=lambda s: [int(t) for t in names(s)], default=list(SOFTMAX))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--implementations", type=names, default=["pallas_gpu"])
    parser.add_argument("--no-first", dest="first", action="store_false")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.worker:
        side, _, kind = args.worker.partition(":")
        softmax(args) if side == "softmax" else ours(args, kind)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for old in [p for pattern in ("rows.jsonl", "first_*", "want_*", "compiled_*") for p in args.out.glob(pattern)]:
        old.unlink()
    end, children = time.time() + args.limit, []
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",  # several processes share the card: give memory back at once
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_gpu_autotune_level=0",  # no trials beside others' timings
    }

    def begin(script, *arguments):
        command = [sys.executable, str(Path(__file__).parent / script), "--out", str(args.out), *arguments]
        children.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return children[-1]

    lists = ["--softmax", ",".join(map(str, args.softmax)), "--shapes", str(args.shapes)]
    lists += ["--implementations", ",".join(args.implementations)] + ["--no-first"] * (not args.first)
    working = [begin("gpu_benchmark.py", "--worker", f"ours:{kind}", *lists) for kind in args.kinds]
    while time.time() < end and not all((args.out / f"first_{kind}").exists() for kind in args.kinds):
        if any(c.poll() for c in working):
            break
        time.sleep(0.2)
    if args.softmax:
        working.append(begin("gpu_benchmark.py", "--worker", "softmax", *lists))
    missing = [n for n in ("torch", "triton", "fla") if importlib.util.find_spec(n) is None]
    if missing and not args.no_peer:
        print(f"without fla: {', '.join(missing)} not installed", flush=True)
    elif not args.no_peer:
        peers = [k for k in args.kinds if k != "phase"]
        for share in range(args.compilers):
            begin("gpu_benchmark_peer.py", "--compile", f"{share}/{args.compilers}", "--kinds", ",".join(peers))
        working += [begin("gpu_benchmark_peer.py", "--kinds", k, "--compilers", str(args.compilers)) for k in peers]
    while time.time() < end and any(c.poll() is None for c in working):
        time.sleep(0.5)
    for child in children:
        if child.poll() is None:
            if child in working:
                print("ended by the limit:", " ".join(child.args[4:6]), flush=True)
            os.killpg(child.pid, signal.SIGKILL)
    rows = load_rows(args.out)
    (args.out / "rows.json").write_text(json.dumps(rows))
    report(rows)
    plot(rows, args.out)


if __name__ == "__main__":
    main()
