"""What the processes of gpu_benchmark share: inputs, checks, turns on the GPU, rows, the tables and the plot."""

import contextlib
import fcntl
import json

import numpy as np

SHAPES = [  # batch, tokens, heads, channels; the most wanted first
    (8, 8192, 16, 128),
    (16, 2048, 8, 128),
    (4, 4096, 64, 128),
    (1, 131072, 16, 128),
    (8, 2048, 16, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (1, 8192, 96, 128),
    (8, 1024, 8, 64),
    (8, 2048, 32, 256),
]
CHECK = (2, 1000, 16, 128)


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


def check(kind, name, got, want, bound=5e-3):
    """Whether relative RMS errors are within the bound; prints them."""
    errors = {}
    for n in got:
        a, b = (np.asarray(x, np.float64) for x in (got[n], want[n]))
        errors[n] = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
    print(f"check    {kind:8s}{name:11s}", {n: f"{e:.1e}" for n, e in errors.items()}, flush=True)
    right = max(errors.values()) < bound  # not so for NaN
    if not right:
        print(f"{name} is wrong for {kind} and is not timed", flush=True)
    return right


class Turns:
    """One process at a time on the GPU."""

    def __init__(self, folder):
        self.file = open(folder / "gpu.lock", "w")  # noqa: SIM115

    @contextlib.contextmanager
    def mine(self):
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)


def label(shape):
    return "B{}_T{}_H{}_D{}".format(*shape)


def write_row(folder, row):
    with open(folder / "rows.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    if "times" not in row:
        return
    share = ""
    if row.get("floors"):
        share = "  of the floor {:.0%} | {:.0%}".format(*(f / t for f, t in zip(row["floors"], row["times"])))
    print(
        f"{row['kind']:9s}{row['name']:11s}{label(row['shape']):22s}{row['times'][0]:8.4f} |{row['times'][1]:9.4f} ms{share}",
        flush=True,
    )


def load_rows(folder):
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(rows):
    print(
        "\n| kind | shape | forward, of floor | forward + backward, of floor | fla | ratio |\n|---|---|---|---|---|---|"
    )
    timed = [r for r in rows if "times" in r and r.get("for") != "softmax"]
    peers = {(r["kind"], tuple(r["shape"])): r["times"] for r in timed if r["name"] == "fla"}
    for r in sorted((r for r in timed if r["name"] != "fla"), key=lambda r: (r["kind"], r["name"])):
        other, (forward, both) = "- | -", r["times"]
        if r["name"] != "cudnn" and (p := peers.get((r["kind"], tuple(r["shape"])))):
            other = f"{p[0]:.3f} / {p[1]:.3f} | {p[0] / forward:.2f} / {p[1] / both:.2f}"
        share = [f / t for f, t in zip(r["floors"], r["times"])]
        name = r["kind"] + ("" if r["name"] == "pallas_gpu" else f" ({r['name']})")
        print(
            f"| {name} | {label(r['shape'])} | {forward:.4f}, {share[0]:.0%} | {both:.4f}, {share[1]:.0%} | {other} |"
        )
    for r in rows:
        if r["name"] in ("first", "tuning"):
            print(f"{r['name']}: {r['kind']} {r.get('shape', '')} {r['seconds']:.1f} s")
    print("\n| tokens | cuDNN softmax forward, forward + backward | ours, decay per head |\n|---|---|---|")
    for tokens, soft, linear in crossing(rows):
        print(f"| {tokens} | {soft[0]:.3f}, {soft[1]:.3f} | {linear[0]:.3f}, {linear[1]:.3f} |")


def crossing(rows):
    """(tokens, times of softmax, times of ours), by tokens."""
    rows = [r for r in rows if r.get("for") == "softmax"]
    ours = {r["shape"][1]: r["times"] for r in rows if r["name"] == "pallas_gpu"}
    soft = {r["shape"][1]: r["times"] for r in rows if r["name"] == "cudnn"}
    return [(t, soft[t], ours[t]) for t in sorted(ours.keys() & soft.keys())]


def plot(rows, folder):
    found = crossing(rows)
    if not found:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    tokens = [t for t, _, _ in found]
    for i, title in enumerate(("forward", "forward + backward")):
        axes[i].loglog(tokens, [soft[i] for _, soft, _ in found], "o-", label="softmax, cuDNN")
        axes[i].loglog(tokens, [linear[i] for _, _, linear in found], "s-", label="decay per head, ours")
        axes[i].set(title=title, xlabel="tokens of a sequence (65,536 in all, 16 heads of 128)", ylabel="ms")
        axes[i].set_xticks(tokens, [str(t) for t in tokens], rotation=45)
        axes[i].minorticks_off()
        axes[i].grid(alpha=0.3)
        axes[i].legend()
    figure.tight_layout()
    figure.savefig(folder / "softmax.png", dpi=120)
