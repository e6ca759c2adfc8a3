"""What the TPU kernels of linear attention share: matrix products, and the one or two heads of a column of 128 lanes.

Letters: C tokens of a chunk.
"""

import functools
import operator

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

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


def lane_heads(shape, heads):
    """Which head of a column a lane belongs to."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) % LANES // (LANES // heads)


def only(x, head, heads):
    """x with the lanes of the column's other heads set to zero; by bits, which packed values need not be widened for."""
    bits = jnp.where(lane_heads((1, x.shape[1]), heads) == head, -1, 0)
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & bits, x.dtype)


def apart(x, heads):
    """[C,lanes] -> [heads * C,lanes]: the column's heads below one another, each in its own lanes, zero elsewhere.

    One product with it is what every head's own would be, side by side: blocks of a diagonal fill the matrix unit.
    """
    return x if heads == 1 else jnp.concatenate([only(x, g, heads) for g in range(heads)])


def across(x, y, heads):
    """Sum over the rows of x [C,heads * n] and y [C,lanes], head by head: [n,lanes], each head in its lanes of y."""
    if heads == 1:
        return dot(x, y, TN)
    if x.shape[1] == heads * LANES:
        turned = jnp.concatenate(jnp.split(x, heads, axis=1)).T
    else:
        below = [pltpu.bitcast(half, jnp.int32) for half in jnp.split(apart(x, heads).T, heads)]
        turned = pltpu.bitcast(functools.reduce(operator.or_, below), x.dtype)
    return dot(turned, apart(y, heads), NN)


def by_head(parts, heads):
    """One array from one per head, each right in that head's lanes only."""
    return parts[0] if heads == 1 else jnp.where(lane_heads(parts[0].shape, heads) == 0, *parts)
