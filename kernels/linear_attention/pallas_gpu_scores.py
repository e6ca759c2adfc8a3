"""A chunk's scores [64,64] in registers, on Hopper GPUs: put together from products of tiles, and what of them counts.

Registers, warps and lanes as in pallas_gpu_rows.
"""

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from linscale.kernels.linear_attention.pallas_gpu_rows import ROWS, Predicates, array_type, like, place


def diagonal_tiles(x):
    """[64,64] -> [64,16]: from each 16-row tile the 16 columns of the same numbers."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=array_type((64, 16), x.dtype))
    def select(_, x):
        warp, _ = place()
        octets, chosen = x.registers.reshape(-1, 2), None
        for w in range(4):
            here = octets[2 * w : 2 * w + 2].flatten()
            if w:
                mine = arith.cmpi(arith.CmpIPredicate.eq, warp, utils.c(w, ir.IndexType.get()))
                here = [arith.select(mine, new, old) for new, old in zip(here, chosen)]
            chosen = here
        return like(chosen, (64, 16), x.layout)

    return select(x)


def select_levels(levels):
    """[64,16] from five products of tiles: for each pair of tokens that of the level at which their blocks are joined.

    levels: the products of each token with itself, then of queries and keys for blocks of 1, 2, 4 and 8 tokens.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS,) * 5, return_type=array_type((64, 16)))
    def select(_, *levels):
        same, one, two, four, eight = (x.registers.reshape(2, 2) for x in levels)  # octet of columns, of rows
        f32 = ir.F32Type.get()
        zero, p = utils.c(0.0, f32), Predicates()
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
        return like([r for octet in results for r in octet], (64, 16), ROWS.to_mgpu())

    return select(*levels)


def assemble_scores(tile, across16, across32):
    """[64,64] scores: `tile` [64,16] on the diagonal, products of neighbouring tiles and of halves below it, else 0."""

    @plgpu.inline_mgpu(arg_types=(ROWS,) * 3, return_type=array_type((64, 64)))
    def assemble(_, *arrays):
        own, near, far = (x.registers.reshape(-1, 2) for x in arrays)
        p, select = Predicates(), arith.select
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
        return like(results, (64, 64), ROWS.to_mgpu())

    return assemble(tile, across16, across32)


def across_tiles(forth, back, size):
    """[64,64]: where the blocks of `size` (16 or 32) of row and column are joined, forth below the diagonal and back above."""

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS), return_type=array_type((64, 64)))
    def choose(_, forth, back):
        p = Predicates()
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
        return like(results, (64, 64), ROWS.to_mgpu())

    return choose(forth, back)


def order_masks(what):
    """[64,64] bfloat16 of ones: columns from the row on ("above"), before it ("below"), or both in their half ("joined").

    "upto": columns to the row, itself included.
    "joined": in the upper half of the rows those from the row on, in the lower half those before, each in its half.
    """

    @plgpu.inline_mgpu(arg_types=(), return_type=array_type((64, 64), jnp.bfloat16))
    def make(_):
        p, select = Predicates(), arith.select
        bf16 = ir.BF16Type.get()
        pair = ir.VectorType.get((2,), bf16)
        zero, one = (utils.c(x, bf16) for x in (0.0, 1.0))
        zeros, ones = (vector.from_elements(pair, [x, x]) for x in (zero, one))
        behind = "ugt" if what == "upto" else "uge"
        after = [p.compare(behind, arith.addi(p.column, p.number(e)), p.row) for e in range(2)]
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
                results.append({"above": above, "below": below, "upto": below, "joined": joined}[what])
        return like(results, (64, 64), ROWS.to_mgpu())

    return make()


def causal(x, reverse=False):
    """x [64,64] where the column is not behind the row (`reverse`: not before it), else 0."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=array_type((64, 64)))
    def keep(_, x):
        p, select = Predicates(), arith.select
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
        return like(results, (64, 64), ROWS.to_mgpu())

    return keep(x)


def within(x, edge, reverse=False):
    """x [64,64] where the column is from the row's edge to the row (`reverse`: from the row to its edge), else 0.

    edge [64] float32, whole numbers. Columns are compared as numbers known when compiling: an array of them would be
    kept in registers for the whole loop over chunks.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS.reduce(1)), return_type=array_type((64, 64)))
    def keep(_, x, edge):
        p = Predicates()
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
        return like(results, (64, 64), ROWS.to_mgpu())

    return keep(x, edge)
