"""Linear attention with optional decay or phase: one public function for every architecture, and its decoding step.

Letters: B batch, T tokens, H heads, K key channels of a head, V value channels of a head.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from linscale.kernels.axes import Axes, mesh_for
from linscale.kernels.linear_attention import chunked, context_parallel, pallas_gpu, pallas_tpu, reference
from linscale.kernels.remat import kept

_IMPLEMENTATIONS = {
    "scan": reference.scan,
    "chunked": chunked.chunked,
    "pallas_gpu": pallas_gpu.pallas_gpu,
    "pallas_tpu": pallas_tpu.pallas_tpu,
}
_REFUSALS = {"pallas_tpu": pallas_tpu.refusal, "pallas_gpu": pallas_gpu.refusal}

_log = logging.getLogger("linscale.kernels")


def linear_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    phase: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    axes: Axes | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Causal linear attention: S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, without scaling of q k.

    The operator of all three linear models of arXiv 2406.16690 (appendix A.1): cosFormer2 (`phase`), TNL (`log_decay`
    [H]) and HGRN2 (`log_decay` [B,T,H,K]). Differentiable in all array arguments but `segment_ids`, by reverse mode.

    Args:
      q: [B,T,H,K] float32 or bfloat16 (float64 with x64 enabled), T >= 1.
      k: [B,T,H,K], the dtype of q; or None with a vector decay: then k = 1 - exp(log_decay), HGRN2's tied key.
      v: [B,T,H,V], the dtype of q.
      log_decay: log a_t, each <= 0. None: no decay. [H]: one constant per head (TNL). [B,T,H,K]: one per token and
        channel (HGRN2); any value down to -inf is exact. Values above zero are not checked and are undefined.
      phase: [H,K], theta in radians a token: q_t and k_s meet as sum_c q_tc k_sc cos((t-s) theta_c), cosFormer2's
        per-channel cosine reweighting. Not together with log_decay.
      initial_state: [B,H,K,V] float32, the state before the first token; [B,H,2K,V] with phase (see below). None: 0.
      segment_ids: [B,T] integers. A new document starts wherever the id differs from the token before; the state is
        reset there. The first document of a row continues `initial_state`.
      implementation: None picks the best available; "scan" (one token at a time, the reference), "chunked" (matrix
        products over chunks in XLA, any device), "pallas_gpu" (Hopper GPUs, bfloat16, 64, 128 or 256
        channels) or "pallas_tpu" (TPUs, 64 or 128 channels) forces one. Which device the program is for is told by the
        mesh in context or the default backend, so that programs compiled ahead of time for another machine choose as
        that machine would.
      axes: how the mesh in context (jax.set_mesh) splits batch, tokens and heads; every device runs an implementation on
        its own part. Devices of the sequence axis exchange states alone, [B,H,K,V] ([B,H,2K,V] with phase) log2(n) + 1
        times, forward and backward, and documents may cross from one to the next. None, or no mesh: one device's work.

    Returns:
      out [B,T,H,V] in the dtype of v, and the state after the last token, float32. With phase the state is
      [B,H,2K,V]: rows [:K] hold sum_s cos((t-s) theta) k_s v_s^T and rows [K:] the same with sin, t being the last
      token, so that no position need be remembered.

    Raises:
      ValueError: shapes or dtypes that do not fit, phase with log_decay, an implementation that cannot serve,
        batch, tokens or heads that do not divide over their mesh axes.
    """
    _check(q, k, v, log_decay, phase, initial_state, segment_ids)
    if (mesh := mesh_for(axes)) is not None:
        local = functools.partial(linear_attention, implementation=implementation)
        return context_parallel.sharded(mesh, axes, local, q, k, v, log_decay, phase, initial_state, segment_ids)
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        known = ", ".join(repr(n) for n in _IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r} is unknown; it must be None or one of {known}.")
    asked = _REFUSALS if implementation is None else _REFUSALS.keys() & {implementation}
    refusals = {n: _REFUSALS[n](q, k, v, log_decay, phase) for n in asked}
    if refusals.get(implementation) is not None:
        raise ValueError(
            f"implementation={implementation!r} cannot serve: {refusals[implementation]}. None or 'chunked' can."
        )
    serving = [n for n, reason in refusals.items() if reason is None]
    name = implementation or ("chunked" if not serving or _partitioned(q) else serving[0])
    _announce(name, "phase" if phase is not None else _decay_kind(log_decay))
    out, state = _IMPLEMENTATIONS[name](q, k, v, log_decay, phase, initial_state, segment_ids)
    return kept(out), state


def linear_attention_step(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array,
    state: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    phase: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, for decoding.

    Args:
      q, k: [B,H,K]; k may be None with a vector decay. v: [B,H,V].
      state: [B,H,K,V] float32, or [B,H,2K,V] with phase, as `linear_attention` returns it.
      log_decay: None, [H] or [B,H,K]. phase: None or [H,K].

    Returns:
      out [B,H,V] in the dtype of v, and the new state.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    one_token = [None if x is None else x[:, None] for x in (q, k, v)]
    decay = log_decay[:, None] if log_decay is not None and log_decay.ndim == 3 else log_decay
    _check(*one_token, decay, phase, state, None)
    return reference.step(q, k, v, state, log_decay, phase)


def _partitioned(x) -> bool:
    """Whether the partitioner will spread this program over devices: kernels are opaque to it outside shard_map."""
    for mesh in (jax.sharding.get_abstract_mesh(), getattr(jax.typeof(x).sharding, "mesh", None)):
        if mesh is not None and not mesh.empty:
            return any(n > 1 and t != jax.sharding.AxisType.Manual for n, t in zip(mesh.axis_sizes, mesh.axis_types))
    return jax.device_count() > 1


def _decay_kind(log_decay) -> str:
    return "no decay" if log_decay is None else "scalar decay" if log_decay.ndim == 1 else "vector decay"


@functools.cache
def _announce(name: str, kind: str) -> None:
    _log.info("linear attention, %s: implementation %r on %s", kind, name, jax.default_backend())


def _check(q, k, v, log_decay, phase, initial_state, segment_ids) -> None:
    def expect(name, x, shape, dtype=None):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}.")
        if dtype is not None and x.dtype != dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be {dtype}.")

    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q and v have {q.ndim} and {v.ndim} dimensions; they must be [batch, tokens, heads, channels]."
        )
    batch, tokens, heads, channels = q.shape
    if tokens < 1:
        raise ValueError("q has 0 tokens; it must have at least 1.")
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"q has dtype {q.dtype}; it must be float32, bfloat16 or float64.")
    expect("v", v, (batch, tokens, heads, v.shape[-1]), q.dtype)
    if k is not None:
        expect("k", k, q.shape, q.dtype)
    elif log_decay is None or log_decay.ndim != 4:
        raise ValueError(
            "k is None, which stands for 1 - exp(log_decay) and needs a log_decay [batch, tokens, heads, K]."
        )
    if log_decay is not None:
        if phase is not None:
            raise ValueError("phase and log_decay are both given; give one of them.")
        expect("log_decay", log_decay, (heads,) if log_decay.ndim == 1 else q.shape)
    if phase is not None:
        expect("phase", phase, (heads, channels))
    if initial_state is not None:
        rows = channels if phase is None else 2 * channels
        expect("initial_state", initial_state, (batch, heads, rows, v.shape[-1]))
    if segment_ids is not None:
        expect("segment_ids", segment_ids, (batch, tokens))
