"""Linear attention on TPUs: which calls the kernels serve, how arrays are laid out for them, and the gradients.

The kernels read [B,T,H,K] as [B,T,H*K] in columns of 128 lanes, a view that costs nothing where the projections before
wrote it that way. They hold one head of 128 channels or two of 64 in a column.

Letters: B batch, T tokens, H heads, K key channels, V value channels, W columns, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from linscale.kernels.linear_attention import pallas_tpu_phase as turning
from linscale.kernels.linear_attention import pallas_tpu_scalar as scalar
from linscale.kernels.linear_attention import pallas_tpu_tiles as tiles
from linscale.kernels.linear_attention import pallas_tpu_vector as vector
from linscale.kernels.linear_attention.reference import document_starts
from linscale.kernels.remat import kept

CHANNELS = (64, 128)
LANES = 128
INTERPRET = None  # pltpu.InterpretParams: the kernels then run on any device, slowly; for tests


def refusal(q, k, v, log_decay, phase) -> str | None:
    """Why these kernels cannot serve the call, as a sentence without its stop; None if they can."""
    if tiles.target(q) is None and INTERPRET is None:
        return f"it needs a TPU, this program is for {jax.default_backend()}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k and v have dtype {q.dtype}, it takes bfloat16 or float32"
    if q.shape[-1] not in CHANNELS or v.shape[-1] not in CHANNELS:
        return f"it takes 64 or 128 channels a head, q has {q.shape[-1]} and v {v.shape[-1]}"
    if log_decay is not None and log_decay.ndim == 4 and log_decay.dtype not in (jnp.bfloat16, jnp.float32):
        return f"log_decay has dtype {log_decay.dtype}, it takes float32 or bfloat16"
    return None


def pallas_tpu(q, k, v, log_decay, phase, initial_state, segment_ids):
    """Arguments and results as `api.linear_attention`."""
    batch, tokens, H, K = q.shape
    V = v.shape[-1]
    kind = kind_of(k, log_decay, phase)
    plan = plan_for(tokens, H, K, V, kind, q.dtype, INTERPRET or False, q)
    heads, width = plan.heads, -(-H // plan.heads)
    padded = -(-tokens // plan.block) * plan.block

    def to_columns(x):
        wide = LANES // heads
        x = _pad(x, [(0, 0), (0, padded - tokens), (0, width * heads - H), (0, wide - x.shape[-1])])
        return x.reshape(batch, padded, width * LANES)

    initial = None if initial_state is None else initial_state.astype(jnp.float32)
    if kind == "phase":  # the kernel takes the state as its first token sees it, and gives it as its last chunk's does
        theta = phase.astype(jnp.float32)
        initial = None if initial is None else _phase_to_columns(_turned(initial, theta, 1), width, heads)
    elif initial is not None:
        initial = _state_to_columns(initial.mT if kind in ("vector", "tied") else initial, width, heads)
    docs = None if segment_ids is None else _documents(segment_ids, q, padded, plan.chunk, heads)
    q, v, k = to_columns(q), to_columns(v), None if k is None else to_columns(k)
    if kind in ("vector", "tied"):
        out, state = _vector(plan, q, k, v, to_columns(log_decay), initial, docs)
    elif kind == "phase":
        lanes = _pad(theta, [(0, width * heads - H), (0, LANES // heads - K)]).reshape(-1)
        out, state = _phase(plan, q, k, v, lanes, initial, docs)
    else:
        rate = None
        if log_decay is not None:  # bounded, because minus infinity times an age of 0 would be NaN
            rate = _pad(jnp.maximum(log_decay.astype(jnp.float32), -1e4), [(0, width * heads - H)])
        out, state = _scalar(plan, q, k, v, rate, initial, docs)
    out = out.reshape(batch, padded, width * heads, LANES // heads)[:, :tokens, :H, :V]
    if kind == "phase":
        state = _phase_from_columns(state, heads, K)[:, :H, :, :V]
        return out, _turned(state, theta, tokens - 1 - (padded - plan.chunk))
    state = _state_from_columns(state, heads)
    return out, (state.mT if kind in ("vector", "tied") else state)[:, :H, :K, :V]


def kind_of(k, log_decay, phase) -> str:
    """The operator, by its name in the table of tiles."""
    if log_decay is None:
        return "none" if phase is None else "phase"
    return "scalar" if log_decay.ndim == 1 else "vector" if k is not None else "tied"


def plan_for(tokens, H, K, V, kind, dtype, interpret, q=None) -> scalar.Plan:
    """Tiles for the generation that the program is for; blocks of equal size that pad the tokens least."""
    heads = 2 if K == V == 64 else 1
    generation = tiles.generation(tiles.target(q))
    size = tiles.table(kind)[generation]
    columns = -(-H // heads)
    chunk = size.chunk if heads == 1 else size.pair
    wide = jnp.dtype(dtype).itemsize // 2  # float32: twice the memory, products in six passes
    share = wide * max(heads * chunk // size.chunk, 1)
    chunks = -(-tokens // chunk)
    most = max(size.block // chunk // wide, 1)
    return scalar.Plan(
        tokens=tokens,
        heads=heads,
        chunk=chunk,
        chunks=-(-chunks // -(-chunks // most)),
        columns=_divisor(columns, max(size.forward // share, 1)),
        columns_backward=_divisor(columns, max(size.backward // share, 1)),
        decay=kind == "scalar",
        memory=tiles.MEMORY[generation],
        interpret=interpret,
    )


def inner_loops(plan, direction) -> list[int]:
    """Trips of the loops inside a grid step, for reading a compiled schedule; loops of one trip are no loops."""
    trips = [plan.chunks] * (1 if direction == "forward" or plan.chunks <= scalar.UNROLLED else 2)
    return [n for n in trips if n > 1]


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


def _pad(x, widths, **kw):
    return jnp.pad(x, widths, **kw) if any(w != (0, 0) for w in widths) else x


def _turned(state, theta, tokens):
    """The state of a phase [B,H,2K,V], as it is that many tokens later if nothing is added to it.

    Turned first by the leading 8 bits of theta, whose product is exact, then by the rest: 500 theta, rounded, is off by
    1e-5 radians.
    """
    even, odd = jnp.split(state, 2, axis=2)
    leading = jax.lax.stop_gradient(jax.lax.reduce_precision(theta, 8, 7))
    for part in (leading, theta - leading):
        cos, sin = jnp.cos(tokens * part)[..., None], jnp.sin(tokens * part)[..., None]
        even, odd = cos * even - sin * odd, sin * even + cos * odd
    return jnp.concatenate([even, odd], axis=2)


def _state_to_columns(state, width, heads):
    """[B,H,K,V] -> [B,W,128/heads,128]: a column's heads beside one another."""
    wide = LANES // heads
    batch, H, K, V = state.shape
    state = _pad(state, [(0, 0), (0, width * heads - H), (0, wide - K), (0, wide - V)])
    return state.reshape(batch, width, heads, wide, wide).swapaxes(2, 3).reshape(batch, width, wide, LANES)


def _state_from_columns(state, heads):
    """[B,W,128/heads,128] -> [B,W*heads,128/heads,128/heads]."""
    batch, width, wide, _ = state.shape
    return state.reshape(batch, width, wide, heads, wide).swapaxes(2, 3).reshape(batch, width * heads, wide, wide)


def _phase_to_columns(state, width, heads):
    """[B,H,2K,V] -> [B,W,128/heads,256]: value channels first, the sine part turned backwards, as the kernel's features."""
    even, odd = jnp.split(state.mT, 2, axis=3)
    return jnp.concatenate([_state_to_columns(x, width, heads) for x in (even, -odd)], axis=3)


def _phase_from_columns(state, heads, K):
    """The inverse: [B,W*heads,2K,128/heads]."""
    even, odd = (_state_from_columns(x, heads)[..., :K] for x in jnp.split(state, 2, axis=3))
    return jnp.concatenate([even, -odd], axis=3).mT


def _documents(segment_ids, q, padded, C, heads):
    """What the kernels need to know of documents, [B,T/C,8,heads*C] float32: the same for each head of a column.

    Rows: documents begun by a token, whether it reads the state before its chunk, whether it reaches the chunk's end,
    whether the state passes the whole chunk, whether a token begins a document; the rest is zero.
    """
    batch, tokens = segment_ids.shape
    starts = document_starts(segment_ids, q)
    begun = jnp.cumsum(starts, axis=1)
    starts = _pad(starts, [(0, 0), (0, padded - tokens)]).reshape(batch, padded // C, C)
    begun = _pad(begun, [(0, 0), (0, padded - tokens)], mode="edge").reshape(batch, padded // C, C)
    last = begun[..., -1:]
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0), (0, 0)))  # the first token starts no document
    rows = (begun, begun == before, begun == last, jnp.broadcast_to(before == last, begun.shape), starts)
    docs = jnp.stack([r.astype(jnp.float32) for r in rows], axis=2)
    docs = jnp.pad(docs, ((0, 0), (0, 0), (0, scalar.DOCUMENT_ROWS - len(rows)), (0, 0)))
    return jnp.tile(docs, (1, 1, 1, heads))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scalar(plan, q, k, v, rate, initial, docs):
    return scalar.forward(plan, q, k, v, rate, initial, docs, save=False)[:2]


def _scalar_forward(plan, *args):
    q, k, v, rate, initial, docs = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    learn = args[3] is not None and args[3].perturbed
    out, state, saved = scalar.forward(plan, q, k, v, rate, initial, docs, save=True, exact=learn)
    return (out, state), (q, k, v, rate, docs, kept(saved), None if initial is None else (), () if learn else None)


def _scalar_backward(plan, residuals, cotangents):
    q, k, v, rate, docs, saved, started, learn = residuals
    d_out, d_state = (None if isinstance(d, SymbolicZero) else d for d in cotangents)
    d_out = jnp.zeros_like(v) if d_out is None else d_out
    dq, dk, dv, d_initial, d_rate = scalar.backward(
        plan, q, k, v, rate, docs, saved, d_out, d_state, learn=learn is not None
    )
    return dq, dk, dv, d_rate, None if started is None else d_initial, None


_scalar.defvjp(_scalar_forward, _scalar_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vector(plan, q, k, v, log_decay, initial, docs):
    return vector.forward(plan, q, k, v, log_decay, initial, docs, save=False)[:2]


def _vector_forward(plan, *args):
    q, k, v, log_decay, initial, docs = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    out, state, saved = vector.forward(plan, q, k, v, log_decay, initial, docs, save=True)
    return (out, state), (q, k, v, log_decay, docs, kept(saved), None if initial is None else ())


def _vector_backward(plan, residuals, cotangents):
    q, k, v, log_decay, docs, saved, started = residuals
    d_out, d_state = (None if isinstance(d, SymbolicZero) else d for d in cotangents)
    d_out = jnp.zeros_like(v) if d_out is None else d_out
    dq, dk, dv, dg, d_initial = vector.backward(plan, q, k, v, log_decay, docs, saved, d_out, d_state)
    return dq, dk, dv, dg, None if started is None else d_initial, None


_vector.defvjp(_vector_forward, _vector_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _phase(plan, q, k, v, theta, initial, docs):
    return turning.forward(plan, q, k, v, theta, initial, docs, save=False)[:2]


def _phase_forward(plan, *args):
    q, k, v, theta, initial, docs = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    out, state, saved = turning.forward(plan, q, k, v, theta, initial, docs, save=True)
    learn = () if args[3].perturbed else None
    return (out, state), (q, k, v, theta, docs, kept(saved), None if initial is None else (), learn)


def _phase_backward(plan, residuals, cotangents):
    q, k, v, theta, docs, saved, started, learn = residuals
    d_out, d_state = (None if isinstance(d, SymbolicZero) else d for d in cotangents)
    d_out = jnp.zeros_like(v) if d_out is None else d_out
    dq, dk, dv, d_initial, d_theta = turning.backward(
        plan, q, k, v, theta, docs, saved, d_out, d_state, learn=learn is not None
    )
    return dq, dk, dv, d_theta, None if started is None else d_initial, None


_phase.defvjp(_phase_forward, _phase_backward, symbolic_zeros=True)
