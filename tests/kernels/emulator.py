"""Runs the Hopper kernels' own Python on a CPU, warpgroup by warpgroup: what they compute, and whether they wait rightly.

Pallas' interpreter does not know accumulators of wgmma inside run_state. Here each warpgroup is a thread, barriers count
as the hardware's do, and a wait that nothing ends fails. Copies and matrix products happen at once, so a missing wait for
the copy engine is not seen. Call kernels outside jit.
"""

import contextlib
import threading
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels import hopper_rows
from linscale.kernels.cross_entropy import pallas_gpu as cross_entropy
from linscale.kernels.linear_attention import (
    pallas_gpu_gates,
    pallas_gpu_mild,
    pallas_gpu_phase_factors,
    pallas_gpu_phase_kernels,
    pallas_gpu_phase_states,
    pallas_gpu_rows,
    pallas_gpu_scalar,
    pallas_gpu_scalar_backward,
    pallas_gpu_scores,
    pallas_gpu_vector,
    pallas_gpu_vector_backward,
    pallas_gpu_vector_states,
    pallas_gpu_vector_within,
)
from linscale.kernels.rms_norm import pallas_gpu as rms_norm

MODULES = (
    cross_entropy,
    hopper_rows,
    pallas_gpu_gates,
    pallas_gpu_mild,
    pallas_gpu_phase_factors,
    pallas_gpu_phase_kernels,
    pallas_gpu_phase_states,
    pallas_gpu_scalar,
    pallas_gpu_scalar_backward,
    pallas_gpu_vector,
    pallas_gpu_vector_backward,
    pallas_gpu_vector_states,
    pallas_gpu_vector_within,
    rms_norm,
)
PATIENCE = 60  # seconds
_here = threading.local()


class Ref:
    """A view of an array in memory; indexing past the end clips, as the copy engine does."""

    def __init__(self, view):
        self.view = view

    shape = property(lambda self: self.view.shape)
    dtype = property(lambda self: self.view.dtype)
    at = property(lambda self: _At(self))

    def transpose(self, axes):
        return Ref(self.view.transpose(axes))

    def __getitem__(self, index):
        return jnp.asarray(np.array(self.view[index]))  # a copy: what is in memory changes

    def __setitem__(self, index, value):
        self.view[index] = np.asarray(value).astype(self.view.dtype)


class _At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        plain = []
        for i in index:
            if isinstance(i, pl.Slice):
                plain.append(slice(int(i.start), int(i.start) + i.size))
            else:
                plain.append(i if isinstance(i, slice) else int(i))
        return Ref(self.ref.view[tuple(plain)])


class Barrier:
    def __init__(self, arrivals):
        self.arrivals, self.arrived, self.phase, self.seen = arrivals, 0, 0, {}
        self.changed = threading.Condition()

    def arrive(self):
        with self.changed:
            self.arrived += 1
            if self.arrived == self.arrivals:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self):
        with self.changed:
            seen = self.seen.get(_here.wg, 0)
            assert self.changed.wait_for(lambda: self.phase > seen, PATIENCE), "a wait that nothing ends"
            assert self.phase == seen + 1, "the barrier ran ahead of a waiting warpgroup by two phases"
            self.seen[_here.wg] = seen + 1


class Barriers:
    def __init__(self, arrivals, number):
        self.each = [Barrier(arrivals) for _ in range(number)]

    at = property(lambda self: self)

    def __getitem__(self, slot):
        return self.each[int(slot)]


def _one(barrier):
    return barrier.each[0] if isinstance(barrier, Barriers) else barrier


class Accumulator:
    def __init__(self, value):
        self.value = jnp.asarray(value, jnp.float32)

    shape = property(lambda self: self.value.shape)

    def __getitem__(self, _):
        return self.value


class ACC:
    def __init__(self, shape, dtype=jnp.float32):
        self.shape = shape

    init = Accumulator


def _wgmma(acc, a, b):
    wide = [np.asarray(x.view if isinstance(x, Ref) else x, np.float32) for x in (a, b)]
    with np.errstate(invalid="ignore"):  # zeros of a mask meet infinities
        acc.value = acc.value + wide[0] @ wide[1]


def _copy(source, target):
    if source.shape == target.shape:
        target.view[...] = source.view
        return
    inside = tuple(slice(0, min(s, t)) for s, t in zip(source.shape, target.shape))
    if source.view.size < target.view.size:  # read past the end: zeros
        target.view[...] = 0
    target.view[inside] = source.view[inside]


def _copy_in(source, target, barrier, oob_mode=None):
    _copy(source, target)
    _one(barrier).arrive()


def _run_state(f):
    def run(accumulators):
        f(accumulators)
        return jax.tree.map(lambda x: x.value, accumulators, is_leaf=lambda x: isinstance(x, Accumulator))

    return run


def _when(condition):
    return lambda f: f() if bool(condition) else None


def _loop(start, stop):
    def run(f):
        for i in range(start, stop):
            f(jnp.int32(i))

    return run


def _cond(condition, true, false):
    return true() if bool(condition) else false()


def _fori_loop(start, stop, f, carry):
    for i in range(start, stop):
        carry = f(jnp.int32(i), carry)
    return carry


def _scratch(kind):
    if isinstance(kind, plgpu.Barrier):
        return Barriers(kind.num_arrivals, int(np.prod(kind.num_barriers)))
    return Ref(np.full(kind.shape, np.nan if jnp.issubdtype(kind.dtype, jnp.inexact) else -1, kind.dtype))


def _kernel(
    body, *, out_type, grid, scratch_types=(), grid_names, num_threads=1, thread_name="wg", compiler_params=None
):
    def run(*arrays):
        single = not isinstance(out_type, (list, tuple))
        outs = [np.full(o.shape, np.nan, o.dtype) for o in ([out_type] if single else out_type)]
        refs = [Ref(np.asarray(x)) for x in arrays] + [Ref(o) for o in outs]
        for place in np.ndindex(*grid):
            scratch, failures = [_scratch(s) for s in scratch_types], []

            def warpgroup(number, place=place, scratch=scratch, failures=failures):
                _here.wg, _here.axes = number, dict(zip((*grid_names, thread_name), (*place, number)))
                try:
                    body(*refs, *scratch)
                except BaseException as e:
                    failures.append(e)

            threads = [threading.Thread(target=warpgroup, args=(n,)) for n in range(num_threads)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            if failures:
                raise failures[0]
        outs = [jnp.asarray(o) for o in outs]
        return outs[0] if single else outs

    return run


def _tiles(x):
    return np.asarray(x, np.float32).reshape(4, 16, -1)


def _tile_rows(ref, distance, n):
    return jnp.asarray(np.repeat(ref.view[np.arange(4) ^ distance], 16, axis=0))


def _select_levels(levels):
    i, j = np.arange(64)[:, None] % 16, np.arange(16)[None]
    tile = jnp.where(i == j, levels[0], 0.0)
    for level, x in enumerate(levels[1:]):
        tile = jnp.where((i >> level & 1 == 1) & (i >> level == (j >> level) + 1), x, tile)
    return tile


def _blocks(size):
    return np.arange(64)[:, None] // size, np.arange(64)[None] // size


def _assemble_scores(tile, across16, across32):
    (i, j), (upper, lower) = _blocks(16), _blocks(32)
    near = jnp.where((i == j + 1) & (i % 2 == 1), across16, 0.0)
    return jnp.where(i == j, jnp.tile(tile, (1, 4)), jnp.where(upper > lower, across32, near))


def _across_tiles(forth, back, size):
    i, j = _blocks(size)
    return jnp.where((i // 2 == j // 2) & (i != j), jnp.where(i > j, forth, back), 0.0)


def _order_masks(what):
    (i, j), (a, b) = _blocks(1), _blocks(32)
    joined = (a == b) & np.where(a == 1, j >= i, j < i)
    return jnp.asarray({"above": j >= i, "below": j < i, "upto": j <= i, "joined": joined}[what], jnp.bfloat16)


def _within(x, edge, reverse=False):
    column, edge = np.arange(64)[None], edge[:, None]
    return jnp.triu(jnp.where(column <= edge, x, 0)) if reverse else jnp.tril(jnp.where(column >= edge, x, 0))


def _put_factors(turns, first, cos, sin):
    """In 32 bits, as the kernel's angles."""
    numbers = (int(first) + np.arange(64, dtype=np.int64))[:, None] * turns.view.astype(np.int64)
    angle = numbers.astype(np.int32).astype(np.float64) * (2 * np.pi / 2**32)
    cos[...], sin[...] = np.cos(angle), np.sin(angle)


_INLINE = {
    "partner_rows": lambda x, distance: x[np.arange(64) ^ distance],
    "pick": lambda size, upper, lower: jnp.where((np.arange(64) // size % 2 == 1)[:, None], upper, lower),
    "tile_products": lambda total, a, b: total + (_tiles(a) @ _tiles(b).swapaxes(1, 2)).reshape(64, 16),
    "tile_apply": lambda total, a, x: total + (_tiles(a) @ _tiles(x)).reshape(total.shape),
    "diagonal_tiles": lambda x: jnp.concatenate([x[i : i + 16, i : i + 16] for i in range(0, 64, 16)]),
    "select_levels": _select_levels,
    "assemble_scores": _assemble_scores,
    "across_tiles": _across_tiles,
    "order_masks": _order_masks,
    "causal": lambda x, reverse=False: jnp.triu(x) if reverse else jnp.tril(x),
    "alike": lambda x: x,
    "put_whether": lambda x, bound, ref: ref.__setitem__(..., jnp.all(x >= bound)),
    "within": _within,
    "put_tile_rows": lambda x, ref: ref.__setitem__(..., x[::16]),
    "get_tile_rows": _tile_rows,
    "put_factors": _put_factors,
    "load_state": lambda ref, shape: ref[...],
}


def _over(module, **names):
    return types.SimpleNamespace(**({n: getattr(module, n) for n in dir(module)} | names))


@contextlib.contextmanager
def emulated():
    """Within it, the kernels run here."""
    nothing = lambda *_, **__: None  # noqa: E731
    arrive, wait = (lambda barrier: _one(barrier).arrive()), (lambda barrier: _one(barrier).wait())
    fake_plgpu = _over(
        plgpu,
        **{"kernel": _kernel, "ACC": ACC, "wgmma": _wgmma, "copy_gmem_to_smem": _copy_in, "copy_smem_to_gmem": _copy},
        **{"barrier_arrive": arrive, "barrier_wait": wait, "commit_smem": nothing, "set_max_registers": nothing},
        wait_smem_to_gmem=nothing,
        layout_cast=lambda x, _: x,
        wgmma_accumulator_load=lambda acc, wait_n=0: acc.value,
        load=lambda ref, *_, **__: ref[...],
        store=lambda ref, x, **__: ref.__setitem__(..., x),
        broadcasted_iota=lambda dtype, shape, dimension, layout: lax.broadcasted_iota(dtype, shape, dimension),
    )
    scoped = lambda f, *kinds: f(*(Accumulator(jnp.zeros(k.shape)) for k in kinds))  # noqa: E731
    fake_pl = _over(pl, when=_when, loop=_loop, run_scoped=scoped, run_state=_run_state)
    fake_lax = _over(lax, axis_index=lambda name: jnp.int32(_here.axes[name]), fori_loop=_fori_loop, cond=_cond)
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            for name, fake in (("plgpu", fake_plgpu), ("pl", fake_pl), ("lax", fake_lax)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, fake))
        for name, f in _INLINE.items():
            homes = pallas_gpu_rows, pallas_gpu_scores, pallas_gpu_phase_factors
            module = next(m for m in homes if hasattr(m, name))
            stack.enter_context(mock.patch.object(module, name, f))
        yield
