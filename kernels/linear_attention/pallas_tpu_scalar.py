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

import functools
import itertools
import operator
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
    across,
    apart,
    by_head,
    dot,
    dots,
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

    inside: jax.Array  # [C,heads*C]: a query's weight for each key, head by head
    q_in: jax.Array | None  # [C,128] or [C,1]: what a query still reads of the state before the chunk
    k_out: jax.Array | None  # [C,128] or [C,1]: what is left of a key at the chunk's end
    through: jax.Array | None  # [1,128]: what is left of the state at the chunk's end


def rates(rate_ref, column, heads):
    """The column's log decays: per head as scalars, and per lane [1,128]."""
    each = [rate_ref[column * heads + g] for g in range(heads)]
    lanes = jnp.full((1, LANES), each[0])
    return each, lanes if heads == 1 else by_head([lanes, jnp.full((1, LANES), each[1])], heads)


def ages_of(C, heads):
    """Tokens from key to query, [C,heads*C]: [query, keys of each head]."""
    row, col = (lax.broadcasted_iota(jnp.int32, (C, heads * C), d) for d in (0, 1))
    return row - col % C


def fill_tables(plan, tables, rate_ref, first_column, columns, transposed):
    """Weights that do not change along a row, once per row: they cost one exponential an element."""
    C, heads = plan.chunk, plan.heads
    ages = ages_of(C, heads)
    place = lax.broadcasted_iota(jnp.int32, (C, LANES), 0).astype(F32)
    for w in range(columns):
        each, lanes = rates(rate_ref, first_column + w, heads)
        wide = jnp.full(ages.shape, each[0])
        if heads == 2:
            wide = jnp.where(lax.broadcasted_iota(jnp.int32, ages.shape, 1) < C, wide, each[1])
        decay = lambda ages: jnp.where(ages >= 0, jnp.exp(wide * jnp.maximum(ages, 0).astype(F32)), 0.0)  # noqa: B023, E731
        tables.inside[w] = decay(ages)
        if transposed:
            tables.turned[w] = decay(-ages)
        tables.q_in[w] = jnp.exp(lanes * (place + 1.0))
        tables.k_out[w] = jnp.exp(lanes * (C - 1.0 - place))


class Tables(NamedTuple):
    inside: object  # [columns, C, heads * C]
    q_in: object  # [columns, C, 128]
    k_out: object
    turned: object = None  # inside, transposed


def table_shapes(plan, columns, transposed):
    C = plan.chunk
    if not plan.decay:
        return []
    square, tall = pltpu.VMEM((columns, C, plan.heads * C), F32), pltpu.VMEM((columns, C, LANES), F32)
    return [square, tall, tall] + [square] * transposed


def weights(plan, tables, rate_ref, docs_ref, t, c, column, first_column, turned=False):
    """The Weights of chunk c of block t; `turned` gives the transposed inside."""
    C, heads = plan.chunk, plan.heads
    if plan.decay:
        inside = (tables.turned if turned else tables.inside)[column]
        q_in, k_out = tables.q_in[column], tables.k_out[column]
        through = tables.q_in[column, C - 1 : C]
        if plan.tokens % C:  # padded tokens at the end do not decay the state
            length = jnp.clip(plan.tokens - t * plan.block - c * C, 0, C)
            _, lanes = rates(rate_ref, first_column + column, heads)
            place = lax.broadcasted_iota(jnp.int32, (C, LANES), 0)
            k_out = jnp.exp(lanes * jnp.maximum(length - 1 - place, 0).astype(F32))
            through = jnp.exp(lanes * length.astype(F32))
    else:
        ages = ages_of(C, heads)
        inside = (ages <= 0 if turned else ages >= 0).astype(F32)
        q_in = k_out = through = None
    if docs_ref is not None:
        docs = docs_ref[0, c]  # [8,heads*C]
        columns = docs.T[:C]
        inside = inside * (columns[:, :1] == docs[:1]).astype(F32)
        q_in, k_out = times(q_in, columns[:, 1:2]), times(k_out, columns[:, 2:3])
        through = times(through, jnp.broadcast_to(docs[3:4, :1], (1, LANES)))
    return Weights(inside, q_in, k_out, through)


def added_to_state(x, weight, y, heads, exact):
    """Keys and values of a chunk, or queries and what their outputs' gradient is; a learned rate needs it exact."""
    parts = parts_of(times(x, weight), x.dtype, exact)
    return functools.reduce(operator.add, [across(part, y, heads) for part in parts])


def in_turn(column, columns, together=None):
    """Runs a generator for each column, one step of each of those `together` (all of them unless said) at a time.

    The compiler keeps matrix products near the program's order. A column's wait for one another, so those of other columns are
    put between them; where the vector units are the busy ones, as many registers as that takes cost more than it gives.
    """
    together = together or columns
    for first in range(0, columns, together):
        for _ in itertools.zip_longest(*map(column, range(first, min(first + together, columns)))):
            pass


def _specs(plan, columns, blocks, state, reverse=False):
    """Block specifications by kind; the grid is (batch, groups of columns, blocks); `state`: shape of a column's."""
    at = (lambda n: blocks - 1 - n) if reverse else (lambda n: n)
    return {
        "tokens": pl.BlockSpec((1, plan.block, columns * LANES), lambda b, w, n: (b, at(n), w)),
        "docs": pl.BlockSpec(
            (1, plan.chunks, DOCUMENT_ROWS, plan.heads * plan.chunk), lambda b, w, n: (b, at(n), 0, 0)
        ),
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
    """(out [B,T,W*128], the last state [B,W,D,128], the state before each block [B,W,N,D,128] if `save`).

    q, k, v [B,T,W*128], T in whole blocks; rate [heads] float32 or None; initial [B,W,D,128] float32 or None;
    docs [B,T/C,8,heads*C] float32 or None. States are [key channels, value channels of each head].
    """
    batch, padded, width = q.shape
    columns, dtype, heads = plan.columns, q.dtype, plan.heads

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

            def column(w):
                at = (0, rows, pl.ds(w * LANES, LANES))
                weight = weights(plan, tables, rate_ref, docs_ref, t, c, w, first)
                q, k, v = (ref[at] for ref in (q_ref, k_ref, v_ref))
                scores = (dot(q, apart(k, heads), NT) * weight.inside).astype(dtype)
                yield
                read = times(dot(q, apart(state[w].astype(dtype), heads), NN), weight.q_in)
                added = added_to_state(k, weight.k_out, v, heads, exact)
                yield
                out_ref[at] = (read + dot(scores, apart(v, heads), NN)).astype(dtype)
                state[w] = times(state[w], weight.through) + added

            in_turn(column, columns)
            return 0

        lax.fori_loop(0, plan.chunks, chunk, 0)

        @pl.when(t == pl.num_programs(2) - 1)
        def _():
            final_ref[0] = state[...]

    one = (batch, width // LANES, LANES // plan.heads, LANES)
    inputs = [("tokens", q), ("tokens", k), ("tokens", v)]
    inputs += [("rate", rate)] * plan.decay
    inputs += [("state", initial)] if initial is not None else []
    inputs += [("docs", docs)] if docs is not None else []
    outputs = [("tokens", q.shape, dtype), ("state", one, F32)]
    outputs += [("states", (*one[:2], padded // plan.block, *one[2:]), F32)] * save
    scratch = [pltpu.VMEM((columns, *one[2:]), F32), *table_shapes(plan, columns, False)]
    out, final, *saved = call(
        plan, columns, body, inputs, outputs, scratch, q, reverse=False, name="linear_attention_forward"
    )
    return out, final, saved[0] if save else None


def backward(plan: Plan, q, k, v, rate, docs, saved, d_out, d_final, *, learn: bool):
    """(dq, dk, dv, the state's gradient before the first token [B,W,D,128], d rate [heads] if `learn`).

    saved: as `forward` left them. d_final [B,W,D,128] float32 or None.
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
            def column(w):
                k, v = (ref[0, place(c), pl.ds(w * LANES, LANES)] for ref in (k_ref, v_ref))
                weight = weights(plan, tables, rate_ref, docs_ref, t, c, w, first)
                states[w, c] = state[w].astype(states.dtype)
                added = added_to_state(k, weight.k_out, v, heads, learn)
                yield
                state[w] = times(state[w], weight.through) + added

            in_turn(column, columns)
            return 0

        def learned(w, per_lane):
            """Adds [rows,heads*n] to the gradient of the log decay of each head."""
            total = jnp.sum(per_lane, axis=0, keepdims=True)
            width = total.shape[1]
            head = lax.broadcasted_iota(jnp.int32, total.shape, 1) // (width // heads)
            for g in range(heads):
                for lane in range(0, width, LANES):
                    mine = slice(lane, lane + LANES)
                    d_rate_ref[0, w, g : g + 1] += jnp.where(head == g, total, 0.0)[:, mine]

        def back(i, _):
            c = plan.chunks - 1 - i
            rows = place(c)

            def column(w):
                at = (0, rows, pl.ds(w * LANES, LANES))
                weight = weights(plan, tables, rate_ref, docs_ref, t, c, w, first)
                turned = weights(plan, tables, rate_ref, docs_ref, t, c, w, first, turned=True)
                q, k, v, d_out = (ref[at] for ref in (q_ref, k_ref, v_ref, d_out_ref))
                after, keys, d_outs = d_state[w], apart(k, heads), apart(d_out, heads)
                lows, before = ([apart(x, heads) for x in parts_of(s, dtype, learn)] for s in (after, states[w, c]))
                d_scores = dot(d_out, apart(v, heads), NT) * weight.inside  # [queries, keys]
                d_low = d_scores.astype(dtype)
                scores = (dot(k, apart(q, heads), NT) * turned.inside).astype(dtype)  # [keys, queries]
                dq_in = times(dots([d_out], before, NT), weight.q_in)
                yield
                dk_out = times(dots([v], lows, NT), weight.k_out)
                dv_out = times(dot(k, lows[0], NN), weight.k_out)
                d_state[w] = times(after, weight.through) + added_to_state(q, weight.q_in, d_out, heads, learn)
                dq_ref[at] = (dot(d_low, keys, NN) + dq_in).astype(dtype)
                dv_ref[at] = (dot(scores, d_outs, NN) + dv_out).astype(dtype)
                dk_ref[at] = (across(d_low, q, heads) + dk_out).astype(dtype)  # last: it waits for a transposition
                if learn:
                    length = jnp.clip(plan.tokens - t * plan.block - c * C, 0, C).astype(F32)
                    each = lax.broadcasted_iota(jnp.int32, (C, LANES), 0).astype(F32)
                    learned(w, ages_of(C, heads).astype(F32) * d_scores * dot(q, keys, NT))
                    learned(w, (each + 1.0) * dq_in * q.astype(F32))
                    learned(w, (length - 1.0 - each) * dk_out * k.astype(F32))
                    learned(w, length * weight.through * states[w, c] * after)

            in_turn(column, columns)
            return 0

        lax.fori_loop(0, plan.chunks, onward, 0, unroll=plan.chunks <= UNROLLED)
        lax.fori_loop(0, plan.chunks, back, 0)

        @pl.when(t == 0)
        def _():
            d_initial_ref[0] = d_state[...]

    one = (batch, width // LANES, LANES // plan.heads, LANES)
    inputs = [("tokens", x) for x in (q, k, v, d_out)] + [("states", saved)]
    inputs += [("rate", rate)] * plan.decay
    inputs += [("state", d_final)] if d_final is not None else []
    inputs += [("docs", docs)] if docs is not None else []
    outputs = [("tokens", q.shape, dtype)] * 3 + [("state", one, F32)]
    outputs += [("rows", (*one[:2], DOCUMENT_ROWS, LANES), F32)] * learn
    small = pltpu.VMEM((columns, *one[2:]), F32)
    scratch = [small, small, pltpu.VMEM((columns, plan.chunks, *one[2:]), F32 if learn else dtype)]
    scratch += table_shapes(plan, columns, True)
    dq, dk, dv, d_initial, *d_rate = call(
        plan, columns, body, inputs, outputs, scratch, q, reverse=True, name="linear_attention_backward"
    )
    d_rate = d_rate[0][:, :, :heads].sum((0, 3)).reshape(-1) if learn else None
    return dq, dk, dv, d_initial, d_rate
