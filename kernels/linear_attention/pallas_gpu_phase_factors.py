"""Factors of a chunk's tokens with phase on Hopper GPUs: cosines and sines of t theta, formed by the fetching warpgroup.

Angles count from the row's first token, so that a chunk's factors are no other's: while the computing warpgroups have the
tensor cores work, the one that fetches, idle otherwise, forms those of the chunks to come.

Letters: C tokens of a chunk, n channels of a part.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as math_dialect

from linscale.kernels.linear_attention.pallas_gpu_scalar import BF, ROWS, C, tiles


class Factors:
    """The ring of tables between the warpgroup that forms them and those that compute, each with a part of the channels.

    Table `parts` t + w is of chunk t and warpgroup w, and takes the place of the one `places` before it.
    """

    def __init__(self, parts, places):
        self.parts, self.places = parts, places
        self.announced = -(-places // parts) * parts  # barriers, each of which a single warpgroup waits for

    def scratch(self, n):
        """Cosines, sines, and the barriers of tables that were formed and that were read."""
        table = plgpu.SMEM((self.places, C, n), BF, transforms=tiles(n))
        barriers = (plgpu.Barrier(num_arrivals=1, num_barriers=n) for n in (self.announced, self.places))
        return [table, table, *barriers]

    def _at(self, t, w):
        number = t * self.parts + w
        return number, lax.rem(number, jnp.int32(self.places)), lax.rem(number, jnp.int32(self.announced))

    def of(self, refs, t, w):
        """Cosines and sines [C,n] bfloat16 in shared memory, what waits for them, and what gives them back."""
        cos_s, sin_s, formed, read = refs
        _, place, announced = self._at(t, w)
        wait, done = (lambda: plgpu.barrier_wait(formed.at[announced])), (lambda: plgpu.barrier_arrive(read.at[place]))
        return cos_s.at[place], sin_s.at[place], wait, done

    def form(self, refs, turns_g, t, first):
        """The tables of chunk t, whose tokens count from `first`; turns_g [K] int32: see pallas_gpu_phase.turns."""
        cos_s, sin_s, formed, read = refs
        n = cos_s.shape[-1]
        for w in range(self.parts):
            number, place, announced = self._at(t, w)

            @pl.when(number >= self.places)
            def _(place=place):
                plgpu.barrier_wait(read.at[place])

            put_factors(turns_g.at[pl.ds(w * n, n)], first, cos_s.at[place], sin_s.at[place])
            plgpu.barrier_arrive(formed.at[announced])

    def feed(self, fetch, form, chunks, stages, empty):
        """What the fetching warpgroup does: keep `stages` chunks and the tables ahead."""
        plgpu.set_max_registers(40, action="decrease")
        for i in range(stages):
            fetch(jnp.int32(i), i)

        @pl.loop(0, chunks)
        def _(t):
            form(t)
            before = t - 1  # whose place is given back early in chunk t

            @pl.when((t > 0) & (before + stages < chunks))
            def _():
                slot = lax.rem(before, jnp.int32(stages))
                plgpu.barrier_wait(empty.at[slot])
                fetch(before + stages, slot)


def put_factors(turns, first, cos, sin):
    """Writes cosines and sines of (first + row) theta to cos and sin [C,n] bfloat16, with n = 64 or 32.

    Each thread has two channels and a run of 16 or 8 rows: it begins with angles as fractions of a turn in 32 bits, whose
    overflow is the wanted remainder, and goes on by cos((t+1) theta) = 2 cos(theta) cos(t theta) - cos((t-1) theta), sines
    alike, in float32. In so few steps that loses at most 1e-4; bfloat16 rounds by up to 2e-3.
    """
    n = cos.shape[-1]
    matrix = plgpu.RefType(tiles(n))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS, matrix, matrix), return_type=None)
    def write(_, turns, first, cos, sin):
        i8, i32, f32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.F32Type.get()
        number = lambda x: utils.c(x, i32)  # noqa: E731
        pairs, run, line = n // 2, n // 4, 2 * n  # of a row; rows of a thread; bytes of a row
        thread = arith.remui(utils.thread_idx(), number(128))
        pair, group = arith.remui(thread, number(pairs)), arith.divui(thread, number(pairs))

        def features(angle):
            x = arith.mulf(arith.sitofp(f32, angle), utils.c(2 * math.pi / 2**32, f32))
            asm = lambda f: llvm.inline_asm(f32, [x], f"{f}.approx.ftz.f32 $0, $1;", "=f,f", has_side_effects=False)  # noqa: E731
            return asm("cos"), asm("sin")

        column = arith.index_cast(ir.IndexType.get(), arith.muli(pair, number(2)))
        turns = vector.load(ir.VectorType.get((2,), i32), turns, [column])
        turns = [vector.extract(turns, [], [e]) for e in range(2)]
        position = arith.addi(first.registers.item(), arith.muli(group, number(run)))
        twice = [arith.addf(*[features(x)[0]] * 2) for x in turns]
        before = [features(arith.muli(arith.subi(position, number(1)), x)) for x in turns]
        here = [features(arith.muli(position, x)) for x in turns]

        # Rows of 128 or 64 bytes, whose pieces of 16 bytes are exchanged by the bits of the row's number.
        place = arith.addi(arith.muli(group, number(run * line)), arith.muli(pair, number(4)))
        for row in range(run):
            exchanged = (row % 8 * line >> 7) % (line // 16) * 16
            at = arith.addi(arith.xori(place, number(exchanged)), number(row * line))
            for target, values in zip((cos, sin), zip(*here)):
                values = arith.truncf(
                    ir.VectorType.get((2,), ir.BF16Type.get()),
                    vector.from_elements(ir.VectorType.get((2,), f32), list(values)),
                )
                pointer = utils.getelementptr(utils.memref_ptr(target), [at], i8)
                llvm.store(utils.bitcast(values, i32), pointer, alignment=4)
            after = [
                [math_dialect.fma(factor, now, arith.negf(old)) for now, old in zip(*both)]
                for factor, *both in zip(twice, here, before)
            ]
            before, here = here, after

    write(turns, first, cos, sin)
