"""Linear attention one token at a time: the definition that every other implementation is tested against.

Letters: B batch, T tokens, H heads, K key channels, V value channels.
"""

import jax
import jax.numpy as jnp


def step(q_BHK, k_BHK, v_BHV, state, log_decay=None, phase_HK=None):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T; o_t = S_t^T q_t. With phase the state turns by theta (see api.py)."""
    dtype = state.dtype
    if k_BHK is None:
        k_BHK = -jnp.expm1(log_decay.astype(dtype))
    update = jnp.einsum("bhk,bhv->bhkv", k_BHK.astype(dtype), v_BHV.astype(dtype), precision="highest")
    if phase_HK is not None:
        cos, sin = jnp.cos(phase_HK.astype(dtype))[..., None], jnp.sin(phase_HK.astype(dtype))[..., None]
        even, odd = jnp.split(state, 2, axis=2)
        even, odd = cos * even - sin * odd + update, sin * even + cos * odd
        state, read = jnp.concatenate([even, odd], axis=2), even
    else:
        if log_decay is not None:
            decay = jnp.exp(log_decay.astype(dtype))
            state = state * (decay[:, None, None] if decay.ndim == 1 else decay[..., None])
        state = read = state + update
    out = jnp.einsum("bhk,bhkv->bhv", q_BHK.astype(dtype), read, precision="highest")
    return out.astype(v_BHV.dtype), state


def scan(q, k, v, log_decay, phase, initial_state, segment_ids):
    """Arguments and results as `api.linear_attention`. Keeps a state per token for the gradient: for tests only."""
    batch, _, heads, channels = q.shape
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    rows = channels if phase is None else 2 * channels
    state = (
        jnp.zeros((batch, heads, rows, v.shape[-1]), dtype) if initial_state is None else initial_state.astype(dtype)
    )
    per_token = log_decay is not None and log_decay.ndim == 4

    def body(state, x):
        starts = x["starts"][:, None, None, None]
        state = jnp.where(starts, 0, state)
        decay = x["log_decay"] if per_token else log_decay
        out, state = step(x["q"], x.get("k"), x["v"], state, decay, phase)
        return state, out

    xs = {"q": q, "v": v, "starts": document_starts(segment_ids, q)}
    if k is not None:
        xs["k"] = k
    if per_token:
        xs["log_decay"] = log_decay
    state, out = jax.lax.scan(body, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    return jnp.moveaxis(out, 0, 1), state


def document_starts(segment_ids, q) -> jax.Array:
    """[B,T] bool: True where a token's segment id differs from the one before it; the first token never starts one."""
    if segment_ids is None:
        return jnp.zeros(q.shape[:2], bool)
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
