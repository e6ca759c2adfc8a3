"""Static schedules of the TPU linear-attention kernels, from ahead-of-time compiles: no TPU is needed, only libtpu.

    pip install 'jax[tpu]'
    python experiments/kernels/tpu_schedule.py --output=tpu_schedules       # all generations, kinds and head sizes
    python experiments/kernels/tpu_schedule.py --generations=v5e --kinds=scalar --channels=128 --tiles=128,512,8,4,64
    python experiments/kernels/tpu_schedule.py --compile-times              # no schedules: how long tracing and compiling take

For each kernel the compiler's final schedule is read: how many cycles one step of the grid takes in the steady state
(waits for memory are not part of a schedule), against two floors of the same step: the matrix unit's, by the operator's
multiplications at peak rate, and the memory's, by the bytes no kernel can avoid (q, k, v read once and so on, at the
data sheet's bandwidth). Memory transfers run beside the computation, so a step takes about the larger of the two.

Cycles are those before runs of empty instructions are folded into delays. Counted are the grid loop's body and its inner
loops times their trips; left out are regions that run at the first or last block of a row only (they hold no transfer). Vector
decay has two ways through a chunk, for mild gates and for strong ones: each is counted as if all chunks took it.

Compile times are read without a dump, whose writing takes longer than the compiler; backward is both kernels.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import tempfile
import time

DUMP = pathlib.Path(tempfile.mkdtemp(prefix="tpu_schedule_"))
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true",
}
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # compile times are part of the report

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from linscale.kernels.linear_attention import pallas_tpu, pallas_tpu_tiles  # noqa: E402

# Topology to ask for, cores of a chip, cycles a second and bytes a second of one core (data sheets).
CHIPS = {
    "v4": ("v4:2x2x1", 2, 1.05e9, 1228e9 / 2),
    "v5e": ("v5e:2x2", 1, 1.5e9, 819e9),
    "v5p": ("v5p:2x2x1", 2, 1.75e9, 2765e9 / 2),
    "v6e": ("v6e:2x2", 1, 1.75e9, 1640e9),
    "tpu7x": ("tpu7x:2x2x1", 2, 2.2e9, 7380e9 / 2),
}
KINDS = ("none", "scalar", "vector", "tied", "phase")
UNITS = ("mxu", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")


def mesh_of(generation):
    device = topologies.get_topology_desc(CHIPS[generation][0], "tpu").devices[0]
    return jax.sharding.Mesh([device], ("data",))


def compile_kernel(mesh, kind, direction, batch, tokens, heads, channels, dtype):
    """Compiles one call on [B,T,H*K] arrays, as the projections around it write and read them; backward with its forward.

    ((seconds, seconds of processors), bytes of temporary arrays).
    """
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)  # noqa: E731
    flat = array((batch, tokens, heads * channels), dtype)
    extra = {
        "scalar": array((heads,), jnp.float32),
        "phase": array((heads, channels), jnp.float32),
        "vector": flat,
        "tied": flat,
    }.get(kind)

    def forward(q, k, v, extra):
        split = lambda x: x.reshape(batch, tokens, heads, channels)  # noqa: E731
        q, k, v = split(q), None if kind == "tied" else split(k), split(v)
        decay = split(extra) if kind in ("vector", "tied") else extra if kind == "scalar" else None
        out, _ = pallas_tpu.pallas_tpu(q, k, v, decay, extra if kind == "phase" else None, None, None)
        return out.reshape(flat.shape)

    def backward(q, k, v, extra, d_out):
        if kind in ("none", "scalar"):  # TNL's decay is fixed
            return jax.vjp(lambda q, k, v: forward(q, k, v, extra), q, k, v)[1](d_out)
        return jax.vjp(forward, q, k, v, extra)[1](d_out)

    shutil.rmtree(DUMP, ignore_errors=True)
    function, more = (forward, ()) if direction == "forward" else (backward, (flat,))
    start = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        program = jax.jit(function).lower(flat, flat, flat, extra, *more).compile()
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return seconds, program.memory_analysis().temp_size_in_bytes


def dumped(name, ending):
    files = [f for f in DUMP.glob(f"*{name}*{ending}") if "schedule-analysis" not in f.name]
    return max(files, key=lambda f: f.name)


def utilisation(name):
    rows = dumped(name, "pre-delay_hlo-static-per-bundle-utilization.txt").read_text().split("\n")
    return [tuple(map(int, r.split())) for r in rows if re.match(r"^\d[\d ]*$", r.strip())][1:]  # first: capacities


def schedule(name, trips):
    """(for each way through a steady grid step its cycles and busy slots per unit, bytes of VMEM, bundles of inner loops).

    trips: of the inner loops, in order. Ways: one, or where a loop's body is one of two branches, those of mild and of
    strong chunks, as if all of a block's were alike.
    """
    before = utilisation(name)
    lines = []
    for line in dumped(name, "packed-bundles-post-ra.txt").read_text().split("\n"):
        if m := re.match(r"^ *(0x[0-9a-f]+|0) +([A-Z]*) *: *(>*) *(\{.*)$", line):
            depth = lines[-1][2] if m[4].startswith("{}") else len(m[3])  # empty ones are printed without it
            lines.append((int(m[1], 16), m[2], depth, m[4]))
    starts = {depth: [i for i, x in enumerate(lines) if x[1] == "LB" and x[2] == depth] for depth in (1, 2)}

    def span(i):
        """Cycles [a, b) of the loop whose first bundle is line i."""
        j = i
        while j + 1 < len(lines) and lines[j + 1][2] >= lines[i][2]:
            j += 1
        return lines[i][0], lines[j][0] + 1

    grid = span(starts[1][0])
    weight = [0] * len(before)
    weight[grid[0] : grid[1]] = [1] * (grid[1] - grid[0])
    loops = [span(i) for i in starts[2]]
    assert len(loops) == len(trips), (loops, trips)
    for (a, b), n in zip(loops, trips):
        weight[a:b] = [n] * (b - a)

    for i, (address, _, depth, bundle) in enumerate(lines):
        m = re.search(r"sbr\.rel \(.*?\) target bundleno = (\d+)", bundle)
        if depth != 1 or not m or int(m[1]) <= address:
            continue
        a, b = address + 5, int(m[1])
        inside = [x for x in lines[i + 1 :] if a <= x[0] < b]
        if not any("dma" in x[3] or x[2] > 1 for x in inside):
            weight[a:b] = [0] * (b - a)
    branches = [
        (address + 5, int(m[1]))
        for address, _, depth, bundle in lines
        if depth == 2 and (m := re.search(r"sbr\.rel \(.*?\) target bundleno = (\d+)", bundle)) and int(m[1]) > address
    ]
    assert len(branches) in (0, 2), branches
    ways = []
    for skipped in branches[::-1] or [None]:
        taken = list(weight)
        if skipped:
            taken[skipped[0] : skipped[1]] = [0] * (skipped[1] - skipped[0])
        slots = {u: sum(w * r[c] for w, r in zip(taken, before)) for c, u in enumerate(UNITS)}
        ways.append((sum(taken), slots))
    header = dumped(name, "post-delay-converter.txt").read_text()[:40_000]
    sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", header)
    return ways, sum(int(s, 16) for s in sizes), [b - a for a, b in loops]


def floors(generation, kind, direction, plan, columns, channels, dtype):
    """Cycles of one grid step: (matrix unit, memory)."""
    _, _, clock, bandwidth = CHIPS[generation]
    with jax.set_mesh(mesh_of(generation)):
        peak = pltpu.get_tpu_info().bf16_ops_per_second
    products = {"forward": (4, 4), "backward": (10, 10)}[direction]
    if kind == "phase":  # the state has twice the rows, and scores sum over twice the channels
        products = {"forward": (8, 6), "backward": (20, 16)}[direction]
    arrays = {"forward": 4, "backward": 7}[direction] + (kind == "vector") * (1 if direction == "forward" else 2)
    items = plan.block * columns * pallas_tpu.LANES
    flops = items * (products[0] * channels + products[1] * plan.chunk)
    return flops / peak * clock, arrays * items * jnp.dtype(dtype).itemsize / bandwidth * clock


def measure(generation, kind, direction, channels, *, batch=8, tokens=8192, heads=16, dtype=jnp.bfloat16):
    mesh = mesh_of(generation)
    with jax.set_mesh(mesh):
        plan = pallas_tpu.plan_for(tokens, heads, channels, channels, kind, jnp.dtype(dtype), False)
    columns = plan.columns if direction == "forward" else plan.columns_backward
    temporary = compile_kernel(mesh, kind, direction, batch, tokens, heads, channels, dtype)[1]
    trips = pallas_tpu.inner_loops(plan, direction)
    ways, vmem, loops = schedule(f"linear_attention_{direction}", trips)
    (mild, _), (cycles, slots) = ways[0], ways[-1]
    matrix, memory = floors(generation, kind, direction, plan, columns, channels, dtype)
    steps = batch * tokens / plan.block * (heads * channels / pallas_tpu.LANES / columns)
    _, cores, clock, _ = CHIPS[generation]
    return {
        "generation": generation,
        "kind": kind,
        "direction": direction,
        "channels": channels,
        "chunk": plan.chunk,
        "block": plan.block,
        "columns": columns,
        "cycles": cycles,
        "mild_cycles": mild,
        "mxu_floor": round(matrix),
        "hbm_floor": round(memory),
        "ratio": round(cycles / max(matrix, memory), 2),
        "mild_ratio": round(mild / max(matrix, memory), 2),
        "loops": loops,
        "milliseconds": round(steps * max(cycles, memory) / clock / cores * 1e3, 2),
        "floor_milliseconds": round(steps * max(matrix, memory) / clock / cores * 1e3, 2),
        "spills_and_fills": slots["spill"] + slots["fill"],
        "vmem_bytes": vmem,
        "temporary_bytes": temporary,
        "slots": slots,
        "mild_slots": ways[0][1],
    }


def compile_times(generation, kind, direction, channels, *, batch=8, tokens=8192, heads=16, dtype=jnp.bfloat16):
    mesh = mesh_of(generation)
    wall, processor = compile_kernel(mesh, kind, direction, batch, tokens, heads, channels, dtype)[0]
    return {
        "generation": generation,
        "kind": kind,
        "direction": direction,
        "channels": channels,
        "compile_seconds": round(wall, 1),
        "compile_cpu_seconds": round(processor, 1),
    }


COLUMNS = {
    "generation": "chip",
    "kind": "kind",
    "channels": "D",
    "direction": "pass",
    "chunk": "chunk",
    "block": "block",
    "columns": "columns",
    "cycles": "cycles a step",
    "mild_cycles": "of mild chunks",
    "mxu_floor": "MXU floor",
    "hbm_floor": "HBM floor",
    "ratio": "ratio",
    "mild_ratio": "ratio of mild chunks",
    "milliseconds": "ms of a chip",
    "floor_milliseconds": "floor ms",
    "spills_and_fills": "spills + fills",
    "vmem_bytes": "VMEM MiB",
    "compile_seconds": "compile s",
    "compile_cpu_seconds": "of a processor",
}


def cells(row):
    return [f"{row[c] / 2**20:.1f}" if c == "vmem_bytes" else f"{row[c]}" for c in COLUMNS if c in row]


def table(rows):
    names = [name for c, name in COLUMNS.items() if c in rows[0]]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(cells(row)) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda s: s.split(",")  # noqa: E731
    parser.add_argument("--generations", type=words, default=list(CHIPS))
    parser.add_argument("--kinds", type=words, default=list(KINDS))
    parser.add_argument("--channels", type=lambda s: [int(x) for x in s.split(",")], default=[128, 64])
    parser.add_argument("--directions", type=words, default=["forward", "backward"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument(
        "--tiles", help="chunk,block,forward columns,backward columns,chunk of two heads: instead of the table's"
    )
    parser.add_argument("--output", help="folder for schedules.json and schedules.md")
    parser.add_argument("--compile-times", action="store_true", help="these instead of schedules")
    parser.add_argument("--keep", action="store_true", help="keep the compiler's dump of the last kernel")
    args = parser.parse_args()
    if args.compile_times:
        os.environ.pop("LIBTPU_INIT_ARGS")
    row_of = compile_times if args.compile_times else measure
    rows = []
    for generation in args.generations:
        for kind in args.kinds:
            if args.tiles:
                own = pallas_tpu_tiles.Tiles(*map(int, args.tiles.split(",")))
                pallas_tpu_tiles.table(kind)[generation] = own
            for channels in args.channels:
                for direction in args.directions:
                    row = row_of(generation, kind, direction, channels, batch=args.batch, heads=args.heads)
                    rows.append(row)
                    names = [name for c, name in COLUMNS.items() if c in row]
                    print(", ".join(f"{name} {cell}" for name, cell in zip(names, cells(row))), flush=True)
    if args.output:
        folder = pathlib.Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schedules.json").write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1))
        (folder / "schedules.md").write_text(table(rows))
    if args.keep:
        print(f"dump: {DUMP}")
    else:
        shutil.rmtree(DUMP, ignore_errors=True)


if __name__ == "__main__":
    main()
