"""Heads of more than 128 channels in blocks of 128, for the Hopper kernels of no decay or one decay per head.

Of out = S^T q each block of values sums what all blocks of keys give, and each pair of blocks keeps its own part of the
state, so that a pair is a walk of its own (`pallas_gpu_scalar.Heads`): head by head, block of keys by block of keys. Where
queries and values change places, as for the gradient of queries, the order of the two kinds of blocks does too.

Letters: B batch, T tokens, H heads, K channels of keys and of values, N spans, n blocks a head.
"""

import jax.numpy as jnp

WIDTH = 128
OUTER, INNER = 3, 4  # axes of the two kinds of blocks in what walks give, [B,T,H,n,n,.]


class Blocks:
    def __init__(self, channels):
        self.width = min(channels, WIDTH)
        self.number = channels // self.width

    def split(self, *arrays):
        """[B,T,H,K] -> [B,T,H n,width], a view."""
        return [x.reshape(*x.shape[:2], -1, self.width) for x in arrays]

    def join(self, x, over):
        """[B,T,walks,width] -> [B,T,H,K], the sum over one kind of blocks, in float32."""
        B, T, walks, width = x.shape
        n = self.number
        if n > 1:
            x = x.reshape(B, T, -1, n, n, width).astype(jnp.float32).sum(over).astype(x.dtype)
        return x.reshape(B, T, walks // n**2, n * width)

    def split_state(self, state):
        """[B,H,K,K] -> [B,walks,width,width]; None stays None."""
        if state is None or self.number == 1:
            return state
        n, width = self.number, self.width
        parts = state.reshape(*state.shape[:2], n, width, n, width)
        return jnp.swapaxes(parts, 3, 4).reshape(state.shape[0], -1, width, width)

    def join_state(self, state):
        n, width = self.number, self.width
        parts = state.reshape(state.shape[0], -1, n, n, width, width)
        return jnp.swapaxes(parts, 3, 4).reshape(*parts.shape[:2], n * width, n * width)

    def in_order(self, states):
        """[B,N,walks,.,.] of walks with the two kinds of blocks in the other order."""
        n = self.number
        parts = states.reshape(*states.shape[:2], -1, n, n, *states.shape[3:])
        return jnp.swapaxes(parts, 3, 4).reshape(states.shape)

    def turned(self, states):
        """States as the walks need them in which queries and values have changed places; None stays None."""
        return None if states is None else self.in_order(jnp.swapaxes(states, -1, -2))
