"""Operations of traced programs, by hand."""

import jax
import jax.numpy as jnp
import pytest

from linscale.kernels import softmax_attention
from linscale.kernels.softmax_attention import splash
from linscale.launch.operations import matrix_flops


def test_loops_count_by_their_trips():
    x = jnp.zeros((4, 8))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ jnp.ones((8, 8)), None), x, length=5)[0]

    assert matrix_flops(jax.make_jaxpr(scanned)(x)) == 5 * 2 * 4 * 8 * 8


def test_splash_attention_counts_no_tiles_above_the_diagonal(monkeypatch):
    monkeypatch.setattr(splash, "INTERPRET", True)
    B, T, H, K = 3, 4 * splash.BLOCK, 2, 64
    x = jnp.zeros((B, T, H, K), jnp.bfloat16)
    attend = lambda q: softmax_attention(q, x, x, implementation="splash")  # noqa: E731
    product = 2 * B * H * T * T * K * 5 / 8  # 10 of 16 tiles
    forward = matrix_flops(jax.make_jaxpr(attend)(x))
    assert forward == pytest.approx(2 * product)
    both = matrix_flops(jax.make_jaxpr(jax.grad(lambda q: attend(q).astype(jnp.float32).sum()))(x))
    assert both == pytest.approx((2 + 5) * product, rel=1e-3)  # and o times its gradient, by rows
