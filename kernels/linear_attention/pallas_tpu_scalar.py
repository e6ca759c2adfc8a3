"""Linear attention without decay or with one decay per head on TPUs: Pallas Mosaic TPU, forward and backward.

A grid step takes a block of tokens of some columns; a column is 128 lanes of [B,T,H*K], which is one head of 128
channels or two of 64, so that no array is copied or padded to be cut into heads. Blocks of a row follow one another,
with the state in scratch memory (VMEM) in float32. Inside a block, a loop walks the chunks; its body holds all columns,
so that the matrix units have independent work to overlap.

The backward pass takes blocks from the last to the first and reads each array once: the forward pass left the state
before each block, from which one walk over the block's chunks recomputes the states and gives dq (it is the forward
walk with (dout, v, k) in place of (q, k, v) and the state transposed), and a second one, backwards, gives dk and dv.

Letters: B batch, T tokens, W columns of 128 lanes, N blocks of a row, C tokens of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from linscale.kernels.linear_attention.pallas_tpu_products import (
    F32,
    LANES,
    NN,
    NT,
    TN,
    by_head,
    dot,
    dots,
    lane_heads,
    only,
    own_blocks,
    parts_of,
    times,
)

ORDER = ("parallel", "parallel", "arbitrary")  # of the grid: batch, groups of columns, blocks
UNROLLED = 8  # chunks of a block, at most, whose onward walk is one piece for the scheduler
DOCUMENT_ROWS = 8  # rows of the array that tells documents apart: see pallas_tpu._documents


class Plan(NamedTuple):
    """What fixes a kernel besides the arrays' shapes."""

    tokens: int  # of the caller; the arrays are padded to whole blocks
    heads: int  # of a column: 1 or 2
    chunk: int
    chunks: int  # of a block
    columns: int  # worked on together, forward
    columns_backward: int
    decay: bool
    memory: int | None = None  # bytes of VMEM a kernel may take; None: the compiler's limit
    interpret: object = False

    @property
    def block(self):
        return self.chunk * self.chunks


class Weights(NamedTuple):
    """What a chunk's decay and documents multiply; None stands for one."""

    inside: list  # per head of the column [C,C]: a query's weight for each key
    q_in: jax.Array | None  # [C,128] or [C,1]: what a query still reads of the state before the chunk
    k_out: jax.Array | None  # [C,128] or [C,1]: what is left of a key at the chunk's end
    through: jax.Array | None  # [1,128]: what is left of the state at the chunk's end


def rates(rate_ref, column, heads):
    """The column's log decays: per head as scalars, and per lane [1,128]."""
    each = [rate_ref[column * heads + g] for g in range(heads)]
    lanes = jnp.full((1, LANES), each[0])
    return each, lanes if heads == 1 else jnp.where(lane_heads((1, LANES), 1, heads) == 0, lanes, each[1])


def fill_tables(plan, tables, rate_ref, first_column, columns, transposed):
    """Weights that do not change along a row, once per row: they cost one exponential an element."""
    C = plan.chunk
    ages = lax.broadcasted_iota(jnp.int32, (C, C), 0) - lax.broadcasted_iota(jnp.int32, (C, C), 1)
    place = lax.broadcasted_iota(jnp.int32, (C, LANES), 0).astype(F32)
    for w in range(columns):
        each, lanes = rates(rate_ref, first_column + w, plan.heads)
        for g, rate in enumerate(each):
            i = w * plan.heads + g
            decay = lambda ages: jnp.where(ages >= 0, jnp.exp(rate * jnp.maximum(ages, 0).astype(F32)), 0.0)  # noqa: B023, E731
            tables.inside[i] = decay(ages)
            if transposed:
                tables.turned[i] = decay(-ages)
        tables.q_in[w] = jnp.exp(lanes * (place + 1.0))
        tables.k_out[w] = jnp.exp(lanes * (C - 1.0 - place))


class Tables(NamedTuple):
    inside: object  # [columns * heads, C, C]
    q_in: object  # [columns, C, 128]
    k_out: object
    turned: object = None  # inside, transposed


def table_shapes(plan, columns, transposed):
    C = plan.chunk
    if not plan.decay:
        return []
    square, tall = pltpu.VMEM((columns * plan.heads, C, C), F32), pltpu.VMEM((columns, C, LANES), F32)
    return [square, tall, tall] + [square] * transposed


def weights(plan, tables, rate_ref, docs_ref, t, c, column, first_column, turned=False):
    """The Weights of chunk c of block t; `turned` gives the transposed inside."""
    C, heads = plan.chunk, plan.heads
    if plan.decay:
        table = tables.turned if turned else tables.inside
        inside = [table[column * heads + g] for g in range(heads)]
        q_in, k_out = tables.q_in[column], tables.k_out[column]
        through = tables.q_in[column, C - 1 : C]
        if plan.tokens % C:  # padded tokens at the end do not decay the state
            length = jnp.clip(plan.tokens - t * plan.block - c * C, 0, C)
            _, lanes = rates(rate_ref, first_column + column, heads)
            place = lax.broadcasted_iota(jnp.int32, (C, LANES), 0)
            k_out = jnp.exp(lanes * jnp.maximum(length - 1 - place, 0).astype(F32))
            through = jnp.exp(lanes * length.astype(F32))
    else:
        rows, cols = (lax.broadcasted_iota(jnp.int32, (C, C), d) for d in (0, 1))
        inside = [(cols >= rows if turned else rows >= cols).astype(F32)] * heads
        q_in = k_out = through = None
    if docs_ref is not None:
        docs = docs_ref[0, c]  # [8,C]
        columns = docs.T
        same = (columns[:, :1] == docs[:1]).astype(F32)
        inside = [x * same for x in inside]
        q_in, k_out = times(q_in, columns[:, 1:2]), times(k_out, columns[:, 2:3])
        through = times(through, jnp.broadcast_to(docs[3:4, :1], (1, LANES)))
    return Weights(inside, q_in, k_out, through)


def added_to_state(x, weight, y, heads, exact):
    """Keys and values of a chunk, or queries and what their outputs' gradient is; a learned rate needs it exact."""
    return own_blocks(dots(parts_of(times(x, weight), x.dtype, exact), [y], TN), heads)


def walk(q, k, v, state, w, heads, exact):
    """One chunk: (what queries read [C,128], the state after)."""
    before = times(dot(q, state.astype(q.dtype), NN), w.q_in)
    parts = []
    for g in range(heads):
        scores = dot(only(q, g, heads), k, NT) * w.inside[g]
        parts.append(dot(scores.astype(v.dtype), v, NN))
    return before + by_head(parts, heads), times(state, w.through) + added_to_state(k, w.k_out, v, heads, exact)


def _specs(plan, columns, blocks, state, reverse=False):
    """Block specifications by kind; the grid is (batch, groups of columns, blocks); `state`: shape of a column's."""
    at = (lambda n: blocks - 1 - n) if reverse else (lambda n: n)
    return {
        "tokens": pl.BlockSpec((1, plan.block, columns * LANES), lambda b, w, n: (b, at(n), w)),
        "docs": pl.BlockSpec((1, plan.chunks, DOCUMENT_ROWS, plan.chunk), lambda b, w, n: (b, at(n), 0, 0)),
        "state": pl.BlockSpec((1, columns, *state), lambda b, w, n: (b, w, 0, 0)),
        "states": pl.BlockSpec((1, columns, 1, *state), lambda b, w, n: (b, w, at(n), 0, 0)),
        "rate": pl.BlockSpec(memory_space=pltpu.SMEM),
        "table": pl.BlockSpec((2, plan.chunk + 8, columns * LANES), lambda b, w, n: (0, 0, w)),
        "rows": pl.BlockSpec((1, columns, DOCUMENT_ROWS, LANES), lambda b, w, n: (b, w, 0, 0)),
    }


def call(plan, columns, body, inputs, outputs, scratch, like, *, reverse, name):
    """pallas_call of `body` over (batch, groups of columns, blocks); inputs and outputs are (kind, array or shape)."""
    batch, padded, width = like.shape
    blocks = padded // plan.block
    state = next(shape[2:] for kind, shape, _ in outputs if kind == "state")
    spec = _specs(plan, columns, blocks, state, reverse)
    shapes = [_shape(shape, dtype, like) for _, shape, dtype in outputs]
    return pl.pallas_call(
        body,
        grid=(batch, width // LANES // columns, blocks),
        in_specs=[spec[kind] for kind, _ in inputs],
        out_specs=[spec[kind] for kind, *_ in outputs],
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=ORDER, vmem_limit_bytes=plan.memory),
        interpret=plan.interpret,
        name=name,
    )(*[x for _, x in inputs])


def _shape(shape, dtype, like):
    """Inside shard_map an output varies over the mesh axes that the inputs vary over; jax has renamed the field."""
    for field in ("manual_axis_type", "vma"):
        if getattr(jax.typeof(like), field, None):
            return jax.ShapeDtypeStruct(shape, dtype, **{field: getattr(jax.typeof(like), field)})
    return jax.ShapeDtypeStruct(shape, dtype)


def forward(plan: Plan, q, k, v, rate, initial, docs, *, save: bool, exact: bool = False):
    """(out [B,T,W*128], the last state [B,W,128,128], the state before each block [B,W,N,128,128] if `save`).

    q, k, v [B,T,W*128], T in whole blocks; rate [heads] float32 or None; initial [B,W,128,128] float32 or None;
    docs [B,T/C,8,C] float32 or None. The states before the blocks are transposed: value channels first.
    """
    batch, padded, width = q.shape
    columns, dtype = plan.columns, q.dtype

    def body(*refs):
        refs = list(refs)
        q_ref, k_ref, v_ref = refs[:3]
        del refs[:3]
        rate_ref = refs.pop(0) if plan.decay else None
        initial_ref = refs.pop(0) if initial is not None else None
        docs_ref = refs.pop(0) if docs is not None else None
        out_ref, final_ref = refs.pop(0), refs.pop(0)
        saved_ref = refs.pop(0) if save else None
        state, *tables = refs
        tables = Tables(*tables) if tables else None
        first, t = pl.program_id(1) * columns, pl.program_id(2)

        @pl.when(t == 0)
        def _():
            state[...] = jnp.zeros_like(state) if initial_ref is None else initial_ref[0]
            if plan.decay:
                fill_tables(plan, tables, rate_ref, first, columns, transposed=False)

        if save:
            for w in range(columns):
                saved_ref[0, w, 0] = state[w]

        def chunk(c, _):
            rows = pl.ds(pl.multiple_of(c * plan.chunk, plan.chunk), plan.chunk)
            for w in range(columns):
                cols = pl.ds(w * LANES, LANES)
                weight = weights(plan, tables, rate_ref, docs_ref, t, c, w, first)
                x = (ref[0, rows, cols] for ref in (q_ref, k_ref, v_ref))
                out, state[w] = walk(*x, state[w], weight, plan.heads, exact)
                out_ref[0, rows, cols] = out.astype(dtype)
            return 0

        lax.fori_loop(0, plan.chunks, chunk, 0)

        @pl.when(t == pl.num_programs(2) - 1)
        def _():
            final_ref[0] = state[...]

    one = (batch, width // LANES, LANES, LANES)
    inputs = [("tokens", q), ("tokens", k), ("tokens", v)]
    inputs += [("rate", rate)] * plan.decay
    inputs += [("state", initial)] if initial is not None else []
    inputs += [("docs", docs)] if docs is not None else []
    outputs = [("tokens", q.shape, dtype), ("state", one, F32)]
    outputs += [("states", (*one[:2], padded // plan.block, LANES, LANES), F32)] * save
    scratch = [pltpu.VMEM((columns, LANES, LANES), F32), *table_shapes(plan, columns, False)]
    out, final, *saved = call(
        plan, columns, body, inputs, outputs, scratch, q, reverse=False, name="linear_attention_forward"
    )
    return out, final, saved[0] if save else None


def backward(plan: Plan, q, k, v, rate, docs, saved, d_out, d_final, *, learn: bool):
    """(dq, dk, dv, the state's gradient before the first token [B,W,128,128], d rate [heads] if `learn`).

    saved: as `forward` left them. d_final [B,W,128,128] float32 or None.
    """
    batch, _, width = q.shape
    columns, dtype, C, heads = plan.columns_backward, q.dtype, plan.chunk, plan.heads

    def body(*refs):
        refs = list(refs)
        q_ref, k_ref, v_ref, d_out_ref, saved_ref = refs[:5]
        del refs[:5]
        rate_ref = refs.pop(0) if plan.decay else None
        d_final_ref = refs.pop(0) if d_final is not None else None
        docs_ref = refs.pop(0) if docs is not None else None
        dq_ref, dk_ref, dv_ref, d_initial_ref = refs[:4]
        del refs[:4]
        d_rate_ref = refs.pop(0) if learn else None
        d_state, state = refs[:2]
        del refs[:2]
        states = refs.pop(0)
        tables = Tables(*(refs[i] for i in (0, 1, 2, 3))) if refs else None
        first, step = pl.program_id(1) * columns, pl.program_id(2)
        t = pl.num_programs(2) - 1 - step

        @pl.when(step == 0)
        def _():
            d_state[...] = jnp.zeros_like(d_state) if d_final_ref is None else d_final_ref[0]
            if plan.decay:
                fill_tables(plan, tables, rate_ref, first, columns, transposed=True)
            if learn:
                d_rate_ref[...] = jnp.zeros_like(d_rate_ref)

        def place(c):
            return pl.ds(pl.multiple_of(c * C, C), C)

        state[...] = saved_ref[0, :, 0]

        def onward(c, _):
            for w in range(columns):
                k, v = (ref[0, place(c), pl.ds(w * LANES, LANES)] for ref in (k_ref, v_ref))
                weight = weights(plan, tables, rate_ref, docs_ref, t, c, w, first)
                states[w, c] = state[w].astype(states.dtype)
                state[w] = times(state[w], weight.through) + added_to_state(k, weight.k_out, v, heads, learn)
            return 0

        def learned(w, per_lane):
            """Adds [rows,128] to the gradient of the log decay of each lane's head."""
            total = jnp.sum(per_lane, axis=0, keepdims=True)
            for g in range(heads):
                mine = total if heads == 1 else jnp.where(lane_heads(total.shape, 1, heads) == g, total, 0.0)
                d_rate_ref[0, w, g : g + 1] += mine

        def learned_from_pairs(w, g, products):
            ages = lax.broadcasted_iota(jnp.int32, (C, C), 0) - lax.broadcasted_iota(jnp.int32, (C, C), 1)
            term = jnp.sum(ages.astype(F32) * products, axis=0, keepdims=True)
            for lane in range(0, C, LANES):
                d_rate_ref[0, w, g : g + 1] += term[:, lane : lane + LANES]

        def back(i, _):
            c = plan.chunks - 1 - i
            rows = place(c)
            for w in range(columns):
                cols = pl.ds(w * LANES, LANES)
                weight = weights(plan, tables, rate_ref, docs_ref, t, c, w, first)
                turned = weights(plan, tables, rate_ref, docs_ref, t, c, w, first, turned=True)
                q, k, v, d_out = (ref[0, rows, cols] for ref in (q_ref, k_ref, v_ref, d_out_ref))
                after = d_state[w]
                lows, before = parts_of(after, dtype, learn), parts_of(states[w, c], dtype, learn)
                dqs, dks, dvs = [], [], []
                for g in range(heads):
                    d_scores = dot(only(d_out, g, heads), v, NT) * weight.inside[g]  # [queries, keys]
                    d_low = d_scores.astype(dtype)
                    if learn:
                        learned_from_pairs(w, g, d_scores * dot(only(q, g, heads), k, NT))
                    scores = dot(only(k, g, heads), q, NT) * turned.inside[g]  # [keys, queries]
                    dvs.append(dot(scores.astype(dtype), d_out, NN))
                    dqs.append(dot(d_low, k, NN))
                    dks.append(dot(d_low, q, TN))
                dq_in = times(dots([d_out], before, NT), weight.q_in)
                dk_out = times(dots([v], lows, NT), weight.k_out)
                dv_out = times(dot(k, lows[0], NN), weight.k_out)
                dq_ref[0, rows, cols] = (by_head(dqs, heads) + dq_in).astype(dtype)
                dk_ref[0, rows, cols] = (by_head(dks, heads) + dk_out).astype(dtype)
                dv_ref[0, rows, cols] = (by_head(dvs, heads) + dv_out).astype(dtype)
                d_state[w] = times(after, weight.through) + added_to_state(q, weight.q_in, d_out, heads, learn)
                if learn:
                    length = jnp.clip(plan.tokens - t * plan.block - c * C, 0, C).astype(F32)
                    each = lax.broadcasted_iota(jnp.int32, (C, LANES), 0).astype(F32)
                    learned(w, (each + 1.0) * dq_in * q.astype(F32))
                    learned(w, (length - 1.0 - each) * dk_out * k.astype(F32))
                    learned(w, length * weight.through * states[w, c] * after)
            return 0

        lax.fori_loop(0, plan.chunks, onward, 0, unroll=plan.chunks <= UNROLLED)
        lax.fori_loop(0, plan.chunks, back, 0)

        @pl.when(t == 0)
        def _():
            d_initial_ref[0] = d_state[...]

    one = (batch, width // LANES, LANES, LANES)
    inputs = [("tokens", x) for x in (q, k, v, d_out)] + [("states", saved)]
    inputs += [("rate", rate)] * plan.decay
    inputs += [("state", d_final)] if d_final is not None else []
    inputs += [("docs", docs)] if docs is not None else []
    outputs = [("tokens", q.shape, dtype)] * 3 + [("state", one, F32)]
    outputs += [("rows", (*one[:2], DOCUMENT_ROWS, LANES), F32)] * learn
    small = pltpu.VMEM((columns, LANES, LANES), F32)
    scratch = [small, small, pltpu.VMEM((columns, plan.chunks, LANES, LANES), F32 if learn else dtype)]
    scratch += table_shapes(plan, columns, True)
    dq, dk, dv, d_initial, *d_rate = call(
        plan, columns, body, inputs, outputs, scratch, q, reverse=True, name="linear_attention_backward"
    )
    d_rate = d_rate[0][:, :, :heads].sum((0, 3)).reshape(-1) if learn else None
    return dq, dk, dv, d_initial, d_rate
