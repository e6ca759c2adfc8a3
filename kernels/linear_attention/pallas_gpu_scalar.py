"""Linear attention with no decay or one decay per head on Hopper GPUs: Pallas Mosaic GPU (wgmma, TMA), state on chip.

One block of threads walks the chunks of one (batch, span, head): two warpgroups compute, a third fetches chunks of 64
tokens into a ring in shared memory. Each computing warpgroup owns half of the value channels and of the float32 state,
which stays in its registers; a bfloat16 copy of it lies in shared memory, where wgmma wants its second operand. The
two warpgroups both form q k^T, which is cheaper than waiting for each other.

What decides the speed (measured on an H200): registers moved from the fetching to the computing warpgroups (half the
speed without), the decay mask formed once and not per chunk, and a chunk loop that is not unrolled (it would spill).

Tokens past the end are read as zeros and not written (the copy engine clips), so T need only be a multiple of 8;
`tokens` says how many of them there really are.

The state of a head of 256 channels fits no block of threads: its keys and values are cut into blocks of 128, each pair of
which is one walk of its own, and what pairs give to one block is summed by the caller (`pallas_gpu_blocks`).

Letters: B batch, T tokens, H heads, K key channels, V value channels, N spans, C tokens of a chunk.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention import pallas_gpu_scores as on_scores

C = 64
BF, F32 = jnp.bfloat16, jnp.float32
ROWS = plgpu.Layout.WGMMA
PARAMS = {"approx_math": True, "lowering_semantics": plgpu.LoweringSemantics.Warpgroup}

# Rows of `documents` [B,chunks,5,C], see `pallas_gpu.documents`.
FIRST, LAST, READS, REACHES, SURVIVES = range(5)


def load(ref, layout=ROWS):
    """jax 0.10 needs the index, 0.11 deprecates it, 0.12 has removed it."""
    old = tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11)
    return plgpu.load(ref, (), layout=layout) if old else plgpu.load(ref, layout=layout)


def tiles(columns, dtype=BF):
    """The shared-memory form of a matrix that wgmma and the copy engine read: 8 rows of 128 or 64 bytes a tile."""
    size = jnp.dtype(dtype).itemsize
    width = min(128, columns * size)
    return (plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width))


def iota(shape, dimension):
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=ROWS).astype(F32)


def along_rows(vector, shape):
    return plgpu.layout_cast(lax.broadcast_in_dim(load(vector, ROWS.reduce(1)), shape, (0,)), ROWS)


def along_columns(vector, shape):
    return plgpu.layout_cast(lax.broadcast_in_dim(load(vector, ROWS.reduce(0)), shape, (1,)), ROWS)


def same_document(doc_s, transposed):
    """[C,C] of ones and zeros: whether query and key share a document. Rows are queries, or keys if `transposed`.

    doc_s begins with the first position of each query's document in the chunk, or the last of each key's.
    """
    if transposed:
        room = along_rows(doc_s.at[0], (C, C)) - iota((C, C), 1)
    else:
        room = iota((C, C), 1) - along_rows(doc_s.at[0], (C, C))
    return jnp.where(room >= 0.0, 1.0, 0.0)


class Zero:
    """0, in the eyes of the compiler an unknown number that changes from chunk to chunk.

    As an index it keeps descriptors of shared memory from being formed once before the loop: registers cannot hold them
    all, and what they spill comes back from memory far slower than it is formed.
    """

    @staticmethod
    def start(number_below_two):
        return jnp.where(number_below_two > 2.0, 1, 0).astype(jnp.int32)

    @staticmethod
    def next(zero, t):
        return zero * (t + 3)


def ring(fetch, chunks, stages, empty):
    """What the fetching warpgroup does: keep `stages` chunks ahead."""
    plgpu.set_max_registers(24, action="decrease")
    for i in range(stages):
        fetch(jnp.int32(i), i)

    @pl.loop(0, chunks - stages)
    def _(t):
        slot = lax.rem(t, jnp.int32(stages))
        plgpu.barrier_wait(empty.at[slot])
        fetch(t + stages, slot)


class Walk:
    """Chunk numbers and what is left of the tokens at the end, the same for all three kernels."""

    def __init__(self, tokens, spans):
        self.tokens = tokens
        self.chunks = math.ceil(math.ceil(tokens / C) / spans)  # of one span
        self.whole = self.chunks * C * spans == tokens

    def start(self, span, t, reverse=False):
        return (span * self.chunks + (self.chunks - 1 - t if reverse else t)) * C

    def length(self, start):
        return float(C) if self.whole else jnp.clip(self.tokens - start, 0, C).astype(F32)

    def to_end(self, start, shape):
        """Tokens from each row's token to the last of the chunk; padding is zero, so any finite weight will do."""
        if self.whole:
            return float(C - 1) - iota(shape, 0)
        return jnp.maximum(self.length(start) - 1.0 - iota(shape, 0), 0.0)


def forward(q, k, v, rate, initial, docs, *, blocks, decays=True, tokens=None, spans=1, final=True, stages=3):
    """out [B,T,walks,V] and the state at the end of each span [B,N,walks,K,V] (None unless `final`).

    q, k, v bfloat16, [B,T,H blocks,.], and walks as in `Blocks`; rate [H] = log2 of the decay; initial [B,N,walks,K,V] or None; docs
    [B,chunks,5,C] or None. The backward pass calls it with (do, v, k) for dq. Without decay (`decays` False) nothing but
    documents is weighted.
    """
    (B, T, _, K), V = q.shape, v.shape[-1]
    walks = q.shape[2] * blocks.values
    half = V // 2
    walk = Walk(tokens or T, spans)
    stages = min(stages, walk.chunks)
    documents, start_state = docs is not None, initial is not None
    weighs = decays or documents

    def body(*refs):
        refs = list(refs)
        q_g, k_g, v_g, rate_g = (refs.pop(0) for _ in range(4))
        initial_g = refs.pop(0) if start_state else None
        docs_g = refs.pop(0) if documents else None
        o_g = refs.pop(0)
        final_g = refs.pop(0) if final else None
        q_s, k_s, v_s, vs_s, s_s, o_s, full, empty, *docs_s = refs
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            r = rate_g[blocks.places(h)[0]]
            if weighs:
                age = iota((C, C), 0) - iota((C, C), 1)
                mask = jnp.where(age >= 0, jnp.exp2(r * jnp.maximum(age, 0.0)), 0.0)
            mine = pl.ds(wg * half, half)
            if start_state:
                S = rows.load_state(initial_g.at[b, span, h, :, mine], (K, half))
            else:
                S = plgpu.layout_cast(jnp.zeros((K, half), F32), ROWS)
            s_s.at[wg][...] = S.astype(BF)
            plgpu.commit_smem()

            def chunk(t, state):
                S, zero = state
                here = wg + zero
                slot = lax.rem(t, jnp.int32(stages))
                start = walk.start(span, t)
                plgpu.barrier_wait(full.at[slot])

                def scores(acc, oacc):
                    plgpu.wgmma(acc, q_s.at[slot], k_s.at[slot].transpose((1, 0)))
                    plgpu.wgmma(oacc, q_s.at[slot], s_s.at[here])
                    if weighs:  # While the tensor cores run: values carried to the chunk's end.
                        weight = jnp.exp2(r * walk.to_end(start, (C, half)))
                        if documents:
                            weight = weight * along_rows(docs_s[0].at[slot, REACHES], (C, half))
                        vs_s.at[here][...] = (load(v_s.at[slot, wg]).astype(F32) * weight).astype(BF)
                    p = plgpu.wgmma_accumulator_load(acc, wait_n=1)
                    p = p * mask if weighs else on_scores.causal(p)
                    if documents:
                        p = p * same_document(docs_s[0].at[slot], transposed=False)
                    return p.astype(BF), oacc[...]

                p, o = pl.run_scoped(scores, plgpu.ACC((C, C), F32), plgpu.ACC((C, half), F32))
                if weighs:
                    reads = jnp.exp2(r * (iota((C, half), 0) + 1.0))
                    S = S * jnp.exp2(r * walk.length(start))
                    if documents:
                        reads = reads * along_rows(docs_s[0].at[slot, READS], (C, half))
                        S = S * along_columns(docs_s[0].at[slot, SURVIVES, pl.ds(0, half)], (K, half))
                    o = o * reads
                plgpu.commit_smem()

                def update(refs):
                    oacc, sacc = refs
                    plgpu.wgmma(oacc, p, v_s.at[slot, wg])
                    plgpu.wgmma(sacc, k_s.at[slot].transpose((1, 0)), vs_s.at[here] if weighs else v_s.at[slot, wg])

                o, S = pl.run_state(update)((plgpu.ACC.init(o), plgpu.ACC.init(S)))
                plgpu.barrier_arrive(empty.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the output before has left shared memory
                o_s.at[wg][...] = o.astype(BF)
                s_s.at[here][...] = S.astype(BF)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_s.at[wg], o_g.at[b, pl.ds(start, C), h, mine])
                return S, Zero.next(zero, t)

            S, _ = lax.fori_loop(0, walk.chunks, chunk, (S, Zero.start(r)))
            if final:
                final_g.at[b, span, h, :, mine][...] = S
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _producer():
            _, key, value = blocks.places(h)

            def fetch(t, slot):
                start = walk.start(span, t)
                at = pl.ds(start, C)
                plgpu.copy_gmem_to_smem(q_g.at[b, at, key], q_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(k_g.at[b, at, key], k_s.at[slot], full.at[slot])
                for w in range(2):
                    source = v_g.at[b, at, value, pl.ds(w * half, half)]
                    plgpu.copy_gmem_to_smem(source, v_s.at[slot, w], full.at[slot])
                if documents:
                    plgpu.copy_gmem_to_smem(docs_g.at[b, span * walk.chunks + t], docs_s[0].at[slot], full.at[slot])

            ring(fetch, walk.chunks, stages, empty)

    out_type = [jax.ShapeDtypeStruct((B, T, walks, V), BF)]
    if final:
        out_type.append(jax.ShapeDtypeStruct((B, spans, walks, K, V), F32))
    scratch = [
        plgpu.SMEM((stages, C, K), BF, transforms=tiles(half)),
        plgpu.SMEM((stages, C, K), BF, transforms=tiles(half)),
        plgpu.SMEM((stages, 2, C, half), BF, transforms=tiles(half)),
        plgpu.SMEM((2, C, half), BF, transforms=tiles(half)),
        plgpu.SMEM((2, K, half), BF, transforms=tiles(half)),
        plgpu.SMEM((2, C, half), BF, transforms=tiles(half)),
        plgpu.Barrier(num_arrivals=4 + documents, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ]
    if documents:
        scratch.append(plgpu.SMEM((stages, 5, C), F32))
    inputs = [x for x in (q, k, v, rate, initial, docs) if x is not None]
    out = call(body, "linear_attention_forward", out_type, scratch, (B, spans, walks))(*inputs)
    return out[0], out[1] if final else None


def states(k, v, rate, docs, *, blocks, decays=True, tokens=None, spans, reverse=False, stages=4):
    """What each span adds to a state that enters it as zero: [B,N,walks,K,V].

    Forward: sum over the span of decay^(tokens to its end) k v^T. Reverse, with (q, do) for (k, v):
    decay^(tokens from before its start), what the backward pass carries towards the start.
    """
    (B, T, _, K), V = k.shape, v.shape[-1]
    walks = k.shape[2] * blocks.values
    half = V // 2
    walk = Walk(tokens or T, spans)
    stages = min(stages, walk.chunks)
    documents = docs is not None
    weighs = decays or documents

    def body(*refs):
        refs = list(refs)
        k_g, v_g, rate_g = (refs.pop(0) for _ in range(3))
        docs_g = refs.pop(0) if documents else None
        final_g, k_s, v_s, vs_s, full, empty, *docs_s = refs
        b, span, h, wg = (lax.axis_index(a) for a in ("b", "n", "h", "wg"))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            r = rate_g[blocks.places(h)[0]]

            def chunk(t, S):
                slot = lax.rem(t, jnp.int32(stages))
                start = walk.start(span, t, reverse)
                plgpu.barrier_wait(full.at[slot])
                if weighs:
                    shape = (C, half)
                    weight = jnp.exp2(r * (iota(shape, 0) + 1.0 if reverse else walk.to_end(start, shape)))
                    S = S * jnp.exp2(r * walk.length(start))
                    if documents:
                        weight = weight * along_rows(docs_s[0].at[slot, READS if reverse else REACHES], shape)
                        S = S * along_columns(docs_s[0].at[slot, SURVIVES, pl.ds(0, half)], (K, half))
                    plgpu.commit_smem()  # all warps have read the values before
                    vs_s.at[wg][...] = (load(v_s.at[slot, wg]).astype(F32) * weight).astype(BF)
                    plgpu.commit_smem()

                def update(sacc):
                    plgpu.wgmma(sacc, k_s.at[slot].transpose((1, 0)), vs_s.at[wg] if weighs else v_s.at[slot, wg])

                S = pl.run_state(update)(plgpu.ACC.init(S))
                plgpu.barrier_arrive(empty.at[slot])
                return S

            zero = plgpu.layout_cast(jnp.zeros((K, half), F32), ROWS)
            final_g.at[b, span, h, :, pl.ds(wg * half, half)][...] = lax.fori_loop(0, walk.chunks, chunk, zero)

        @pl.when(wg == 2)
        def _producer():
            _, key, value = blocks.places(h)

            def fetch(t, slot):
                start = walk.start(span, t, reverse)
                at = pl.ds(start, C)
                plgpu.copy_gmem_to_smem(k_g.at[b, at, key], k_s.at[slot], full.at[slot])
                for w in range(2):
                    source = v_g.at[b, at, value, pl.ds(w * half, half)]
                    plgpu.copy_gmem_to_smem(source, v_s.at[slot, w], full.at[slot])
                if documents:
                    plgpu.copy_gmem_to_smem(docs_g.at[b, start // C], docs_s[0].at[slot], full.at[slot])

            ring(fetch, walk.chunks, stages, empty)

    scratch = [
        plgpu.SMEM((stages, C, K), BF, transforms=tiles(half)),
        plgpu.SMEM((stages, 2, C, half), BF, transforms=tiles(half)),
        plgpu.SMEM((2, C, half), BF, transforms=tiles(half)),
        plgpu.Barrier(num_arrivals=3 + documents, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ]
    if documents:
        scratch.append(plgpu.SMEM((stages, 5, C), F32))
    out_type = jax.ShapeDtypeStruct((B, spans, walks, K, V), F32)
    inputs = [x for x in (k, v, rate, docs) if x is not None]
    return call(body, "linear_attention_states", out_type, scratch, (B, spans, walks))(*inputs)


def call(body, name, out_type, scratch, grid, computing=2):
    """`computing` warpgroups and one that fetches."""
    body.__name__ = name  # what profilers show
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("b", "n", "h") if len(grid) == 3 else ("b", "h"),
        num_threads=computing + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(**PARAMS),
    )
