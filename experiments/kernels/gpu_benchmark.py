"""Linear attention on a Hopper GPU: our implementations, flash-linear-attention and cuDNN softmax on the same inputs.

    python experiments/kernels/gpu_benchmark.py [--kinds scalar,none,vector,phase] [--no-peer] [--out DIR]

Checks every implementation against a float64 scan first (relative RMS error of the output and of each gradient), and
times only what passed. Times are device times: the sum of the durations of all GPU kernels of a call as CUPTI records
them (for JAX jax.experimental.mosaic.gpu.profiler, for torch torch.profiler), median of repetitions (torch: mean); launch gaps do
not count for either side. The floor is measured in the same run: elementwise kernels that read and write what
the operator must (forward: 3 tensors in, 1 out; backward: 4 in, 3 out). The inputs of all shapes but the smallest
exceed the 60 MB of cache. fla runs in its own process, since CUPTI serves one library at a time; it needs torch and
fla-core (and is left out without them).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SHAPES = [  # batch, tokens, heads, channels
    (16, 2048, 8, 128),
    (8, 8192, 16, 128),
    (4, 4096, 64, 128),
    (1, 131072, 16, 128),
    (4, 2048, 16, 128),
    (8, 1024, 8, 64),
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
]
PEER_SHAPES = {"scalar": SHAPES, "none": SHAPES[:3], "vector": SHAPES[:3], "phase": []}
CHECK = (2, 1000, 4, 128)


def draw(shape, kind, seed=0):
    """What is repeated over batch and tokens where these are many: drawing gigabytes on the host takes minutes."""
    shape = (min(shape[0], 2), min(shape[1], 1024), *shape[2:])
    heads, channels = shape[2:]
    rng = np.random.default_rng(seed)
    arrays = {n: rng.standard_normal(shape, dtype=np.float32) for n in ("q", "k", "v", "d_out")}
    if kind == "scalar":
        arrays["log_decay"] = -(2.0 ** (-8 * np.arange(heads) / heads - 1)).astype(np.float32)
    if kind == "vector":
        arrays["log_decay"] = -np.logaddexp(0, -2 - rng.standard_normal(shape, dtype=np.float32))
    if kind == "phase":
        arrays["phase"] = rng.uniform(0, 0.1, (heads, channels)).astype(np.float32)
    return arrays


def error(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def ours(args):
    import jax
    import jax.numpy as jnp
    from jax.experimental.mosaic.gpu import profiler

    from linscale.kernels import linear_attention

    def device_time(f, *a, repeat):
        """(ms, seconds to the first result)"""
        f, start = jax.jit(f), time.time()
        jax.block_until_ready(f(*a))
        first = time.time() - start
        return float(np.median(profiler.measure(f, iterations=repeat)(*a)[1])), first

    def functions(implementation):
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
        x = {n: jnp.asarray(a, jnp.bfloat16 if a.ndim == 4 else jnp.float32) for n, a in draw(shape, kind).items()}
        times = lambda a: (shape[0] // a.shape[0], shape[1] // a.shape[1], 1, 1)  # noqa: E731
        return {n: jnp.tile(a, times(a)) if a.ndim == 4 else a for n, a in x.items()}

    def softmax(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def softmax_both(q, k, v, d):
        out, pull = jax.vjp(softmax, q, k, v)
        return out, pull(d)

    floors, rows = {}, []

    def floor(shape):
        if shape not in floors:
            q, k, v, d = place(shape, "none").values()
            repeat = 20
            forward, _ = device_time(lambda q, k, v: q + k + v, q, k, v, repeat=repeat)
            backward, _ = device_time(
                lambda q, k, v, d: (q + k + v - d, q * k + v * d, q - k * v * d), q, k, v, d, repeat=repeat
            )
            floors[shape] = forward, forward + backward
        return floors[shape]

    for kind in args.kinds:
        low = place(CHECK, kind)
        with jax.enable_x64(True):
            wide = {n: jnp.asarray(np.asarray(a, np.float64)) for n, a in low.items()}
            want_out, want = jax.jit(functions("scan")[1])(wide)
            want = {"out": want_out} | {f"d_{n}": g for n, g in want.items()}
        np.savez(args.out / f"want_{kind}.npz", **{n: np.asarray(a) for n, a in want.items()})
        for name in args.implementations:
            out, grads = jax.jit(functions(name)[1])(low)
            got = {"out": out} | {f"d_{n}": g for n, g in grads.items()}
            errors = {n: error(got[n], want[n]) for n in want}
            print(f"check {kind:7s} {name:10s}", {n: f"{e:.1e}" for n, e in errors.items()}, flush=True)
            if not max(errors.values()) < 5e-3:
                print(f"{name} is wrong for {kind} and is not timed")
                continue
            for shape in SHAPES[: args.shapes] if name == "pallas_gpu" else SHAPES[:2]:
                x = place(shape, kind)
                forward, both = functions(name)
                slow = name == "chunked" or (kind == "vector" and args.few)
                times = [device_time(f, x, repeat=3 if slow else 15) for f in (forward, both)]
                rows.append(row(kind, name, shape, [t for t, _ in times], floor(shape), [s for _, s in times]))

    for tokens in args.softmax:
        shape = (max(1, 32768 // tokens), tokens, 16, 128)
        x = place(shape, "none")
        times = [
            device_time(softmax, x["q"], x["k"], x["v"], repeat=5)[0],
            device_time(softmax_both, x["q"], x["k"], x["v"], x["d_out"], repeat=5)[0],
        ]
        rows.append(row("softmax", "cudnn", shape, times, floor(shape), [0, 0]))
        y = place(shape, "scalar")
        times = [device_time(f, y, repeat=10)[0] for f in functions("pallas_gpu")]
        rows.append(row("scalar", "pallas_gpu", shape, times, floor(shape), [0, 0]))
    return rows


def peer(args):
    """fla in a process of its own."""
    import torch
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    def call(kind, x):
        if kind == "scalar":
            return chunk_simple_gla(x["q"], x["k"], x["v"], g_gamma=x["log_decay"], scale=1.0)[0]
        if kind == "none":
            return chunk_linear_attn(x["q"], x["k"], x["v"], scale=1.0, normalize=False)[0]
        return chunk_gla(x["q"], x["k"], x["v"], x["log_decay"], scale=1.0)[0]

    def place(shape, kind):
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
        out = call(kind, x)
        return out, torch.autograd.grad(out, [x[n] for n in leaves], x["d_out"])

    def device_time(f, repeat):
        f()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for _ in range(repeat):
                f()
            torch.cuda.synchronize()
        return sum(e.self_device_time_total for e in prof.key_averages()) / 1e3 / repeat  # a mean: events carry no call

    rows = []
    for kind in args.kinds:
        if not PEER_SHAPES[kind]:
            continue
        x, leaves = place(CHECK, kind)
        start = time.time()
        out, grads = (call(kind, x), ()) if args.peer_forward_only else both(kind, x, leaves)
        torch.cuda.synchronize()
        first = time.time() - start
        want = np.load(args.out / f"want_{kind}.npz")
        errors = {"out": error(out.detach().float().cpu(), want["out"])}
        for n, g in zip(leaves, grads):
            if f"d_{n}" in want and (
                kind != "vector" or n in ("q", "v")
            ):  # ours ties k to the decay, so that these two differ by design
                errors[f"d_{n}"] = error(g.float().cpu(), want[f"d_{n}"])
        print(
            f"check {kind:7s} fla       ",
            {n: f"{e:.1e}" for n, e in errors.items()},
            f"tuning {first:.0f} s",
            flush=True,
        )
        for shape in PEER_SHAPES[kind][: args.shapes]:
            x, leaves = place(shape, kind)

            def forward(kind=kind, x=x):
                with torch.no_grad():
                    return call(kind, x)

            times = [device_time(forward, 7), math.nan]
            if not args.peer_forward_only:
                times[1] = device_time(lambda k=kind, x=x, n=leaves: both(k, x, n), 7)
            rows.append(row(kind, "fla", shape, times, None, [first, first]))
    return rows


def row(kind, name, shape, times, floors, first):
    r = {"kind": kind, "name": name, "shape": shape, "forward": times[0], "both": times[1], "first": first}
    r["floors"] = floors
    share = "" if floors is None else "  of the floor {:.0%} | {:.0%}".format(*(f / t for f, t in zip(floors, times)))
    label = "B{}_T{}_H{}_D{}".format(*shape)
    print(
        f"{kind:8s}{name:11s}{label:22s}{times[0]:8.4f} |{times[1]:9.4f} ms{share}  first {first[0]:.0f}, {first[1]:.0f} s",
        flush=True,
    )
    return r


def table(rows):
    print(
        "\n| kind | shape | ours forward, of floor | forward + backward, of floor | fla | ratio |\n|---|---|---|---|---|---|"
    )
    peers = {(r["kind"], tuple(r["shape"])): r for r in rows if r["name"] == "fla"}
    for r in rows:
        if r["name"] != "pallas_gpu":
            continue
        p = peers.get((r["kind"], tuple(r["shape"])))
        other = "| - | - |"
        if p:
            other = f"| {p['forward']:.3f} / {p['both']:.3f} | {p['forward'] / r['forward']:.2f} / {p['both'] / r['both']:.2f} |"
        share = [f / r[n] for f, n in zip(r["floors"], ("forward", "both"))]
        label = "B{}_T{}_H{}_D{}".format(*r["shape"])
        print(f"| {r['kind']} | {label} | {r['forward']:.4f}, {share[0]:.0%} | {r['both']:.4f}, {share[1]:.0%} {other}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=["scalar", "none", "vector", "phase"])
    parser.add_argument("--out", type=Path, default=Path("gpu_benchmark"))
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-timeout", type=float, default=600, help="seconds: fla tunes for minutes")
    parser.add_argument("--peer-kinds", type=lambda s: s.split(","), help="default: --kinds")
    parser.add_argument(
        "--softmax", type=lambda s: [int(t) for t in s.split(",") if t], default=[512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--peer-forward-only", action="store_true", help="fla tunes its backward for minutes more")
    parser.add_argument("--implementations", type=lambda s: s.split(","), default=["chunked", "pallas_gpu"])
    parser.add_argument("--few", action="store_true", help="fewer repetitions of the slow ones")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.as_peer:
        (args.out / "peer.json").write_text(json.dumps(peer(args)))
        return
    rows = ours(args)
    for kind in [] if args.no_peer else args.peer_kinds or args.kinds:
        command = [sys.executable, __file__, "--as-peer", "--kinds", kind, "--out", str(args.out)]
        command += ["--shapes", str(args.shapes)] + ["--peer-forward-only"] * args.peer_forward_only
        try:
            subprocess.run(command, timeout=args.peer_timeout, check=True)
            rows += json.loads((args.out / "peer.json").read_text())
        except (subprocess.SubprocessError, OSError) as e:
            print(f"fla, {kind}: no result ({type(e).__name__})")
    (args.out / "rows.json").write_text(json.dumps(rows))
    table(rows)


if __name__ == "__main__":
    main()
