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
from jaxlib.mlir.dialects import arith, llvm, vector

F32 = jnp.float32
ROWS = plgpu.Layout.WGMMA


def _type(shape, dtype=F32):
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=ROWS)


def _like(registers, shape, layout):
    registers = np.asarray(registers, dtype=object).reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def partner_rows(x, distance):
    """Row i of the result is row i ^ distance of x; distance is 1, 2, 4 or 8."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=_type(x.shape))
    def exchange(_, x):
        registers = x.registers.reshape(-1, 2)
        if distance == 8:
            registers = registers[:, ::-1]
        else:
            registers = [utils.shfl_bfly(r, 4 * distance) for r in registers.flatten()]
        return _like(registers, x.shape, x.layout)

    return exchange(x)


def pick(size, upper, lower):
    """[64,n]: rows of `upper` where the row's block of `size` (1 to 32) rows has an odd number, else of `lower`.

    For blocks of 8 the choice is known when compiling: the lane's second row is the one in the upper block.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS), return_type=_type(upper.shape))
    def choose(_, upper, lower):
        pairs = list(zip(upper.registers.reshape(-1, 2), lower.registers.reshape(-1, 2)))
        if size == 8:
            return _like([r for (_, u), (low, _) in pairs for r in (low, u)], upper.shape, upper.layout)
        i32 = ir.IntegerType.get_signless(32)
        bit = arith.andi(utils.thread_idx(), utils.c(size * 4 if size < 8 else size * 2, i32))
        odd = arith.cmpi(arith.CmpIPredicate.ne, bit, utils.c(0, i32))
        registers = [arith.select(odd, u, low) for ups, lows in pairs for u, low in zip(ups, lows)]
        return _like(registers, upper.shape, upper.layout)

    return choose(upper, lower)


def tile_products(total, a, b):
    """total [64,16] + each 16-row tile of a times the transpose of the same tile of b; a and b [64,n] bfloat16."""

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS, ROWS), return_type=_type((64, 16)))
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
        return _like(pairs, (64, 16), total.layout)

    return product(total, a, b)


def tile_apply(total, a, x):
    """total [64,n] + each 16-row tile of a [64,16] times the same 16 rows of x [64,n]; a and x bfloat16.

    mma.sync wants x with tokens along its inner dimension, so each 8 by 8 block is transposed within the warp.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS, ROWS), return_type=_type(total.shape))
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
        return _like(results, total.shape, total.layout)

    return apply(total, a, x)


def diagonal_tiles(x):
    """[64,64] -> [64,16]: from each 16-row tile the 16 columns of the same numbers."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=_type((64, 16), x.dtype))
    def select(_, x):
        warp, _ = _place()
        octets, chosen = x.registers.reshape(-1, 2), None
        for w in range(4):
            here = octets[2 * w : 2 * w + 2].flatten()
            if w:
                mine = arith.cmpi(arith.CmpIPredicate.eq, warp, utils.c(w, ir.IndexType.get()))
                here = [arith.select(mine, new, old) for new, old in zip(here, chosen)]
            chosen = here
        return _like(chosen, (64, 16), x.layout)

    return select(x)


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


def _place():
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


class _Predicates:
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


def select_levels(levels):
    """[64,16] from five products of tiles: for each pair of tokens that of the level at which their blocks are joined.

    levels: the products of each token with itself, then of queries and keys for blocks of 1, 2, 4 and 8 tokens.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS,) * 5, return_type=_type((64, 16)))
    def select(_, *levels):
        same, one, two, four, eight = (x.registers.reshape(2, 2) for x in levels)  # octet of columns, of rows
        f32 = ir.F32Type.get()
        zero, p = utils.c(0.0, f32), _Predicates()
        chosen = []
        for e in range(2):
            column = arith.addi(p.column, p.number(e))
            apart = arith.xori(p.row, column)
            chosen.append(
                (
                    p.compare("eq", p.row, column),
                    p.compare("ugt", p.row, column),
                    p.compare("uge", apart, 2),
                    p.compare("uge", apart, 4),
                )
            )
        results = [[None, None], [None, None]]
        for block in range(2):
            parts = []
            for e, (equal, later, two_apart, four_apart) in enumerate(chosen):
                at = lambda x, e=e, block=block: vector.extract(x[block, block], [], [e])  # noqa: E731
                x = arith.select(four_apart, at(four), arith.select(two_apart, at(two), at(one)))
                parts.append(arith.select(equal, at(same), arith.select(later, x, zero)))
            results[block][block] = vector.from_elements(ir.VectorType.get((2,), f32), parts)
        results[0][1] = eight[0, 1]
        results[1][0] = vector.from_elements(ir.VectorType.get((2,), f32), [zero, zero])
        return _like([r for octet in results for r in octet], (64, 16), ROWS.to_mgpu())

    return select(*levels)


def assemble_scores(tile, across16, across32):
    """[64,64] scores: `tile` [64,16] on the diagonal, products of neighbouring tiles and of halves below it, else 0."""

    @plgpu.inline_mgpu(arg_types=(ROWS,) * 3, return_type=_type((64, 64)))
    def assemble(_, *arrays):
        own, near, far = (x.registers.reshape(-1, 2) for x in arrays)
        p, select = _Predicates(), arith.select
        warp = [p.compare("eq", p.warp, w) for w in range(4)]
        upper = p.compare("uge", p.warp, 2)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        zero = vector.from_elements(pair, [utils.c(0.0, ir.F32Type.get())] * 2)
        results = []
        for octet in range(8):
            for half in range(2):
                t, a, b = own[octet % 2, half], near[octet, half], far[octet, half]
                below = (
                    lambda a=a, b=b: select(warp[1], a, b),
                    lambda b=b: select(upper, b, zero),
                    lambda a=a: select(warp[3], a, zero),
                    lambda: zero,
                )[octet // 2]
                results.append(select(warp[octet // 2], t, below()))
        return _like(results, (64, 64), ROWS.to_mgpu())

    return assemble(tile, across16, across32)


def across_tiles(forth, back, size):
    """[64,64]: where the blocks of `size` (16 or 32) of row and column are joined, forth below the diagonal and back above."""

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS), return_type=_type((64, 64)))
    def choose(_, forth, back):
        p = _Predicates()
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        zero = vector.from_elements(pair, [utils.c(0.0, ir.F32Type.get())] * 2)
        if size == 16:
            here = [p.compare("eq", p.warp, tile ^ 1) for tile in range(4)]
            below = [tile % 2 == 0 for tile in range(4)]
        else:
            upper, lower = p.compare("uge", p.warp, 2), p.compare("ult", p.warp, 2)
            here, below = [upper, upper, lower, lower], [True, True, False, False]
        results = []
        for octet, (f, b) in enumerate(zip(forth.registers.reshape(-1, 2), back.registers.reshape(-1, 2))):
            source = f if below[octet // 2] else b
            results += [arith.select(here[octet // 2], r, zero) for r in source]
        return _like(results, (64, 64), ROWS.to_mgpu())

    return choose(forth, back)


def order_masks(what):
    """[64,64] bfloat16 of ones: columns from the row on ("above"), before it ("below"), or both in their half ("joined").

    "joined": in the upper half of the rows those from the row on, in the lower half those before, each in its half.
    """

    @plgpu.inline_mgpu(arg_types=(), return_type=_type((64, 64), jnp.bfloat16))
    def make(_):
        p, select = _Predicates(), arith.select
        bf16 = ir.BF16Type.get()
        pair = ir.VectorType.get((2,), bf16)
        zero, one = (utils.c(x, bf16) for x in (0.0, 1.0))
        zeros, ones = (vector.from_elements(pair, [x, x]) for x in (zero, one))
        after = [p.compare("uge", arith.addi(p.column, p.number(e)), p.row) for e in range(2)]
        on = vector.from_elements(pair, [select(a, one, zero) for a in after])
        off = vector.from_elements(pair, [select(a, zero, one) for a in after])
        upper = p.compare("uge", p.warp, 2)
        results = []
        for octet in range(8):
            tile, side = octet // 2, octet % 2
            mine, earlier = p.compare("eq", p.warp, tile), p.compare("ult", p.warp, tile)
            for half in range(2):
                in_tile = (zeros if side < half else ones) if side != half else on
                not_in_tile = (ones if side < half else zeros) if side != half else off
                above = select(mine, in_tile, select(earlier, ones, zeros))
                below = select(mine, not_in_tile, select(earlier, zeros, ones))
                joined = select(upper, zeros, below) if tile < 2 else select(upper, above, zeros)
                results.append({"above": above, "below": below, "joined": joined}[what])
        return _like(results, (64, 64), ROWS.to_mgpu())

    return make()


def causal(x, reverse=False):
    """x [64,64] where the column is not behind the row (`reverse`: not before it), else 0."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=_type((64, 64)))
    def keep(_, x):
        p, select = _Predicates(), arith.select
        f32 = ir.F32Type.get()
        pair = ir.VectorType.get((2,), f32)
        zero = utils.c(0.0, f32)
        zeros = vector.from_elements(pair, [zero, zero])
        behind = "ult" if reverse else "ugt"
        drop = [p.compare(behind, arith.addi(p.column, p.number(e)), p.row) for e in range(2)]
        results = []
        for octet, halves in enumerate(x.registers.reshape(-1, 2)):
            tile, side = octet // 2, octet % 2
            mine, outside = p.compare("eq", p.warp, tile), p.compare("ugt" if reverse else "ult", p.warp, tile)
            for half, r in enumerate(halves):
                if side == half:
                    parts = [vector.extract(r, [], [e]) for e in range(2)]
                    in_tile = vector.from_elements(pair, [select(d, zero, x) for d, x in zip(drop, parts)])
                else:
                    in_tile = r if (side < half) != reverse else zeros
                results.append(select(mine, in_tile, select(outside, zeros, r)))
        return _like(results, (64, 64), ROWS.to_mgpu())

    return keep(x)


def within(x, edge, reverse=False):
    """x [64,64] where the column is from the row's edge to the row (`reverse`: from the row to its edge), else 0.

    edge [64] float32, whole numbers. Columns are compared as numbers known when compiling: an array of them would be
    kept in registers for the whole loop over chunks.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS.reduce(1)), return_type=_type((64, 64)))
    def keep(_, x, edge):
        p = _Predicates()
        zero = utils.c(0.0, ir.F32Type.get())
        first, length = [], []  # of the two rows of a lane; columns counted from the lane's own
        for half, at in enumerate(edge.registers.flatten()):
            if isinstance(at.type, ir.VectorType):
                at = vector.extract(at, [], [0])
            at = arith.fptosi(p.i32, at)
            row = arith.addi(arith.addi(arith.muli(p.warp, p.number(16)), p.row), p.number(8 * half))
            low, high = (row, at) if reverse else (at, row)
            first.append(arith.subi(p.column, low))
            length.append(arith.subi(high, low))
        results = []
        for octet, halves in enumerate(x.registers.reshape(-1, 2)):
            for half, r in enumerate(halves):
                parts = []
                for e in range(2):
                    after = arith.addi(first[half], p.number(8 * octet + e))  # before the first a huge unsigned number
                    inside = p.compare("ule", after, length[half])
                    parts.append(arith.select(inside, vector.extract(r, [], [e]), zero))
                results.append(vector.from_elements(r.type, parts))
        return _like(results, (64, 64), ROWS.to_mgpu())

    return keep(x, edge)


def put_tile_rows(x, ref):
    """Writes one row of each 16-row tile of x [64,n], whose rows must be alike within a tile, to ref [4,n] float32."""

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()), return_type=None)
    def put(_, x, ref):
        warp, column = _place()
        for octet, registers in enumerate(x.registers.reshape(-1, 2)):
            at = arith.addi(column, utils.c(8 * octet, ir.IndexType.get()))
            vector.store(registers[0], ref, [warp, at])

    put(x, ref)


def get_tile_rows(ref, distance, n):
    """[64,n]: the row of ref [4,n] that the tile at this distance (exclusive or) wrote."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_type((64, n)))
    def get(_, ref):
        warp, column = _place()
        index = ir.IndexType.get()
        warp = arith.xori(warp, utils.c(distance, index))
        registers = []
        for octet in range(n // 8):
            at = arith.addi(column, utils.c(8 * octet, index))
            registers += [vector.load(ir.VectorType.get((2,), ir.F32Type.get()), ref, [warp, at])] * 2
        return _like(registers, (64, n), ROWS.to_mgpu())

    return get(ref)


def load_state(ref, shape):
    """[m,n] float32 from device memory; m is a multiple of 64.

    Pallas' own load forms its addresses from numbers that the loop after it then keeps in registers it needs itself.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_type(shape))
    def get(_, ref):
        p, index = _Predicates(), ir.IndexType.get()
        row = arith.index_cast(index, arith.addi(arith.muli(p.warp, p.number(16)), p.row))
        column = arith.index_cast(index, p.column)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        registers = np.empty((shape[0] // 64, shape[1] // 8, 2), dtype=object)
        for m, octet, half in np.ndindex(*registers.shape):
            at = [arith.addi(row, utils.c(64 * m + 8 * half, index)), arith.addi(column, utils.c(8 * octet, index))]
            registers[m, octet, half] = vector.load(pair, ref, at)
        return _like(registers, shape, ROWS.to_mgpu())

    return get(ref)
