"""What Pallas cannot say about rows of a [64, n] register array: exchange between rows, and products of row tiles.

A warpgroup holds such an array as wgmma does: warp w has rows 16w to 16w+15; lane l has rows l/4 and l/4+8 of them and,
of every eight columns, the two at 2(l%4). A row's partner at distance 1, 2 or 4 is therefore 4, 8 or 16 lanes away, at
distance 8 in the same lane, and beyond in another warp. The same registers are valid operands of the warps' own matrix
product (mma.sync), so that a warp multiplies its 16 rows with one another without moving data.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, vector

F32 = jnp.float32
ROWS = plgpu.Layout.WGMMA


def array_type(shape, dtype=F32):
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=ROWS)


def like(registers, shape, layout):
    registers = np.asarray(registers, dtype=object).reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def partner_rows(x, distance):
    """Row i of the result is row i ^ distance of x; distance is 1, 2, 4 or 8."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=array_type(x.shape))
    def exchange(_, x):
        registers = x.registers.reshape(-1, 2)
        if distance == 8:
            registers = registers[:, ::-1]
        else:
            registers = [utils.shfl_bfly(r, 4 * distance) for r in registers.flatten()]
        return like(registers, x.shape, x.layout)

    return exchange(x)


def pick(size, upper, lower):
    """[64,n]: rows of `upper` where the row's block of `size` (1 to 32) rows has an odd number, else of `lower`.

    For blocks of 8 the choice is known when compiling: the lane's second row is the one in the upper block.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS), return_type=array_type(upper.shape))
    def choose(_, upper, lower):
        pairs = list(zip(upper.registers.reshape(-1, 2), lower.registers.reshape(-1, 2)))
        if size == 8:
            return like([r for (_, u), (low, _) in pairs for r in (low, u)], upper.shape, upper.layout)
        i32 = ir.IntegerType.get_signless(32)
        bit = arith.andi(utils.thread_idx(), utils.c(size * 4 if size < 8 else size * 2, i32))
        odd = arith.cmpi(arith.CmpIPredicate.ne, bit, utils.c(0, i32))
        registers = [arith.select(odd, u, low) for ups, lows in pairs for u, low in zip(ups, lows)]
        return like(registers, upper.shape, upper.layout)

    return choose(upper, lower)


def tile_products(total, a, b):
    """total [64,16] + each 16-row tile of a times the transpose of the same tile of b; a and b [64,n] bfloat16."""

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS, ROWS), return_type=array_type((64, 16)))
    def product(_, total, a, b):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        words = lambda x: np.asarray([utils.bitcast(r, i32) for r in x.registers.flatten()]).reshape(-1, 2)  # noqa: E731
        a_words, b_words = words(a), words(b)
        sums = [vector.extract(r, [], [i]) for r in total.registers.flatten() for i in range(2)]
        for step in range(a.shape[1] // 16):
            low, high = 2 * step, 2 * step + 1  # octets of columns
            lhs = [a_words[low, 0], a_words[low, 1], a_words[high, 0], a_words[high, 1]]
            for half in range(2):  # the tile's first or last eight rows of b
                rhs = [b_words[low, half], b_words[high, half]]
                at = slice(4 * half, 4 * half + 4)
                sums[at] = _mma(lhs, rhs, sums[at])
        pairs = [vector.from_elements(ir.VectorType.get((2,), f32), sums[i : i + 2]) for i in range(0, 8, 2)]
        return like(pairs, (64, 16), total.layout)

    return product(total, a, b)


def tile_apply(total, a, x):
    """total [64,n] + each 16-row tile of a [64,16] times the same 16 rows of x [64,n]; a and x bfloat16.

    mma.sync wants x with tokens along its inner dimension, so each 8 by 8 block is transposed within the warp.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS, ROWS), return_type=array_type(total.shape))
    def apply(_, total, a, x):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        words = lambda x: np.asarray([utils.bitcast(r, i32) for r in x.registers.flatten()]).reshape(-1, 2)  # noqa: E731
        lhs = words(a).flatten().tolist()
        results = []
        for (first, last), sums in zip(words(x), total.registers.reshape(-1, 2)):
            rhs = [
                llvm.inline_asm(
                    i32, [w], "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", has_side_effects=False
                )
                for w in (first, last)
            ]
            sums = [vector.extract(r, [], [i]) for r in sums for i in range(2)]
            sums = _mma(lhs, rhs, sums)
            results += [vector.from_elements(ir.VectorType.get((2,), f32), sums[i : i + 2]) for i in (0, 2)]
        return like(results, total.shape, total.layout)

    return apply(total, a, x)


def _mma(lhs, rhs, sums):
    """The warp's own product of 16 by 16 and 16 by 8, added to four sums a lane."""
    f32 = ir.F32Type.get()
    result = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*lhs, *rhs, *sums],
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def place():
    """The warp's number in its warpgroup, and the first of the lane's two columns in every eight, as indices."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    thread = utils.thread_idx()
    warp = arith.remui(arith.divui(thread, utils.c(32, i32)), utils.c(4, i32))
    column = arith.muli(arith.remui(thread, utils.c(4, i32)), utils.c(2, i32))
    return arith.index_cast(index, warp), arith.index_cast(index, column)


def _thread():
    """The thread's number, read anew: what the compiler derives from it outside a loop, it would spill to memory."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)


class Predicates:
    """Comparisons of small unsigned numbers that differ between threads or warps."""

    def __init__(self):
        self.i32 = ir.IntegerType.get_signless(32)
        thread = _thread()
        self.warp = arith.remui(arith.divui(thread, self.number(32)), self.number(4))
        self.row = arith.remui(arith.divui(thread, self.number(4)), self.number(8))  # in an 8 by 8 block
        self.column = arith.muli(arith.remui(thread, self.number(4)), self.number(2))

    def number(self, x):
        return utils.c(x, self.i32)

    def compare(self, how, a, b):
        b = self.number(b) if isinstance(b, int) else b
        return arith.cmpi(getattr(arith.CmpIPredicate, how), a, b)


def put_tile_rows(x, ref):
    """Writes one row of each 16-row tile of x [64,n], whose rows must be alike within a tile, to ref [4,n] float32."""

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()), return_type=None)
    def put(_, x, ref):
        warp, column = place()
        for octet, registers in enumerate(x.registers.reshape(-1, 2)):
            at = arith.addi(column, utils.c(8 * octet, ir.IndexType.get()))
            vector.store(registers[0], ref, [warp, at])

    put(x, ref)


def get_tile_rows(ref, distance, n):
    """[64,n]: the row of ref [4,n] that the tile at this distance (exclusive or) wrote."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=array_type((64, n)))
    def get(_, ref):
        warp, column = place()
        index = ir.IndexType.get()
        warp = arith.xori(warp, utils.c(distance, index))
        registers = []
        for octet in range(n // 8):
            at = arith.addi(column, utils.c(8 * octet, index))
            registers += [vector.load(ir.VectorType.get((2,), ir.F32Type.get()), ref, [warp, at])] * 2
        return like(registers, (64, n), ROWS.to_mgpu())

    return get(ref)


def alike(x):
    """x [64,n], of whose rows the compiler is to know that they are alike: each thread keeps one."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=array_type(x.shape))
    def first(_, x):
        return like([r for r, _ in x.registers.reshape(-1, 2) for _ in range(2)], x.shape, x.layout)

    return first(x)


def put_whether(x, bound, ref):
    """Writes to ref [1] int32 whether all of x [64,n], whose rows must be alike, is at least `bound`; NaN is not."""

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()), return_type=None)
    def put(_, x, ref):
        i32, least = ir.IntegerType.get_signless(32), utils.c(bound, ir.F32Type.get())
        every = None
        for pair, _ in x.registers.reshape(-1, 2):
            for e in range(2):
                here = arith.cmpf(arith.CmpFPredicate.OGE, vector.extract(pair, [], [e]), least)
                every = here if every is None else arith.andi(every, here)
        every = nvvm.vote_sync(utils.c(0xFFFFFFFF, i32), every, "all")
        memref.store(arith.extui(i32, every), ref, [utils.c(0, ir.IndexType.get())])

    put(x, ref)


def load_state(ref, shape):
    """[m,n] float32 from device memory; m is a multiple of 64.

    Pallas' own load forms its addresses from numbers that the loop after it then keeps in registers it needs itself.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=array_type(shape))
    def get(_, ref):
        p, index = Predicates(), ir.IndexType.get()
        row = arith.index_cast(index, arith.addi(arith.muli(p.warp, p.number(16)), p.row))
        column = arith.index_cast(index, p.column)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        registers = np.empty((shape[0] // 64, shape[1] // 8, 2), dtype=object)
        for m, octet, half in np.ndindex(*registers.shape):
            at = [arith.addi(row, utils.c(64 * m + 8 * half, index)), arith.addi(column, utils.c(8 * octet, index))]
            registers[m, octet, half] = vector.load(pair, ref, at)
        return like(registers, shape, ROWS.to_mgpu())

    return get(ref)
