"""What the TPU kernels of linear attention share: matrix products, and the one or two heads of a column of 128 lanes.

Letters: C tokens of a chunk.
"""

import functools
import operator

import jax.numpy as jnp
from jax import lax

F32 = jnp.float32
LANES = 128
NN, NT, TN = (1, 0), (1, 1), (0, 0)  # which dimension of each operand a matrix product sums over


def dot(a, b, sums):
    """Matrix product in float32; float32 operands are multiplied at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == F32 else None
    dimensions = (((sums[0],), (sums[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=F32)


def dots(a, b, sums):
    """Sum of the products of two lists of parts, each with each."""
    return functools.reduce(operator.add, [dot(x, y, sums) for x in a for y in b])


def times(a, b):
    """Product of two of which either may be None, meaning one."""
    return b if a is None else a if b is None else a * b


def scale(x, weight):
    """x in its own dtype, times a float32 weight."""
    return x if weight is None else (x.astype(F32) * weight).astype(x.dtype)


def parts_of(x, dtype, exact):
    """x float32 as arrays in dtype that are summed: one, or with `exact` two, which leave 2^-16 of x."""
    high = x.astype(dtype)
    return [high, (x - high.astype(F32)).astype(dtype)] if exact and dtype != F32 else [high]


def lane_heads(shape, dimension, heads):
    """Which head of a column a lane (or row of the state) belongs to."""
    return lax.broadcasted_iota(jnp.int32, shape, dimension) // (LANES // heads)


def only(x, head, heads):
    """x [C,128] with the lanes of the column's other heads set to zero."""
    if heads == 1:
        return x
    kept = (lane_heads((1, LANES), 1, heads) == head).astype(F32)
    return (x.astype(F32) * kept).astype(x.dtype)


def own_blocks(state, heads):
    """[128,128]: keeps what a head's keys and the same head's values make."""
    if heads == 1:
        return state
    return jnp.where(lane_heads(state.shape, 0, heads) == lane_heads(state.shape, 1, heads), state, 0.0)


def by_head(parts, heads):
    """One [C,128] from one per head, each right in that head's lanes only."""
    if heads == 1:
        return parts[0]
    return jnp.where(lane_heads(parts[0].shape, 1, heads) == 0, *parts)
