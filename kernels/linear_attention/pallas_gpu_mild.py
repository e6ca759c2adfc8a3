"""Mild chunks of the kernels for one decay per token and channel: all pairs of tokens in one product.

A chunk is mild if its log decays sum to at least FLOOR in every channel that a block of threads works on. Then the
product of gates from the chunk's start to a token, exp(sum), is a number with an inverse like any other: queries are
weighted with exp(sum), keys with exp(-sum), and one product with a causal mask gives all scores. The anchor at the start
keeps queries' weights at most 1 and keys' at most e^60, so that rounding stays relative, as it does in the halving
(`pallas_gpu_gates`), which serves every other chunk: stronger gates, closed ones (-inf) and NaN. Which a chunk is, it
finds out on chip. So results are as exact for any gate; their time depends on the gates.

The tensor cores sum the log decays, which must be bfloat16 for that: float32 log decays have every chunk halved. So has a
chunk in which a document begins, at whichever token: its first token's mark is far below FLOOR (`pallas_gpu_gates.mark`).
"""

import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from linscale.kernels.linear_attention import pallas_gpu_rows as rows
from linscale.kernels.linear_attention import pallas_gpu_scores as on_scores
from linscale.kernels.linear_attention.pallas_gpu_gates import gates
from linscale.kernels.linear_attention.pallas_gpu_scalar import BF, F32, ROWS, C, load

FLOOR = -60.0
LOG2E = math.log2(math.e)


def tells_mild(log_decay):
    """Whether the kernels tell mild chunks from others at all."""
    return log_decay.dtype == BF


def sums(g_s, channels, upto=None):
    """Sums of a chunk's log decays in g_s [C,channels]: up to each token, itself included, and of all, in every row.

    upto: their mask, where it lies in shared memory already.
    """

    def form(to_token, whole):
        plgpu.wgmma(to_token, on_scores.order_masks("upto") if upto is None else upto, g_s)
        plgpu.wgmma(whole, _ones(), g_s)
        return to_token[...], whole[...]

    to_token, whole = pl.run_scoped(form, plgpu.ACC((C, channels), F32), plgpu.ACC((C, channels), F32))
    return to_token, rows.alike(whole)


def tell(g_s, channels, mild_s):
    """Writes to mild_s [1] whether the chunk is mild in these channels."""

    def form(whole):
        plgpu.wgmma(whole, _ones(), g_s)
        return whole[...]

    _put(rows.alike(pl.run_scoped(form, plgpu.ACC((C, channels), F32))), mild_s)


def read(g_s, k_s, channels, upto, mild_s):
    """(*sums, keys), float32 [C,channels]; writes to mild_s [1] whether the chunk is mild. k_s None: tied keys."""
    to_token, whole = sums(g_s, channels, upto)
    k = gates(load(g_s).astype(F32), False, True, short=True)[1] if k_s is None else load(k_s).astype(F32)
    _put(whole, mild_s)
    return to_token, whole, k


def weights(to_token, whole):
    """(weights of queries, of keys, product of all gates) of a mild chunk from its `sums`.

    A key's weight times the product of all is the product of the gates behind it.
    """
    exponent = to_token * LOG2E
    whole = jnp.exp2(whole * LOG2E)
    return jnp.exp2(exponent), jnp.exp2(-exponent), whole


def product(total):
    """The product of gates whose log decays sum to `total`."""
    return jnp.exp2(total * LOG2E)


def _put(whole, mild_s):
    rows.put_whether(whole, FLOOR, mild_s)
    plgpu.commit_smem()


def _ones():
    return plgpu.layout_cast(jnp.full((C, C), 1.0, BF), ROWS)
