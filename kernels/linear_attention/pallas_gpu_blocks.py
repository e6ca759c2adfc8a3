"""Heads of more than 128 channels in blocks of 128, for the Hopper kernels.

Of out = S^T q each block of values sums what all blocks of keys give, and each pair of blocks keeps its own part of the
state, so that a pair is a walk of its own, which reads its blocks in place: head by head, block of keys by block of keys.
Decays and phases belong to key channels. All gradients are sums over blocks too.

Letters: B batch, T tokens, H heads, K key channels, V value channels, N spans.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many blocks of keys and of values a head has, and their channels."""

    keys: int
    values: int
    width: int

    @classmethod
    def of(cls, K, V):
        """For so many channels, which are padded if they do not fill their blocks."""
        width = min(max(K, V), WIDTH)
        return cls(-(-K // width), -(-V // width), width)

    @property
    def number(self):
        return self.keys * self.values

    @property
    def swapped(self):
        """Of walks in which queries and keys have changed places with values, as for the gradient of queries."""
        return Blocks(self.values, self.keys, self.width)

    def places(self, walk):
        """The numbers of a walk's head, of its block of keys and of its block of values, each among all there are."""
        if self.number == 1:
            return walk, walk, walk
        keys, values = jnp.int32(self.keys), jnp.int32(self.values)
        key = lax.div(walk, values)
        head = lax.div(key, keys)
        return head, key, head * values + lax.rem(walk, values)

    def split(self, *arrays):
        """[B,T,H,K] -> [B,T,H keys,width], and values alike: a view. None stays None."""
        return [None if x is None else x.reshape(*x.shape[:2], -1, self.width) for x in arrays]

    def join_values(self, x):
        """[B,T,walks,width] -> [B,T,H,V], the sum over blocks of keys in float32."""
        return self._join(x, axis=3, number=self.keys)

    def join_keys(self, x):
        """[B,T,walks,width] -> [B,T,H,K], the sum over blocks of values in float32; None stays None."""
        return None if x is None else self._join(x, axis=4, number=self.values)

    def _join(self, x, axis, number):
        heads = x.shape[2] // self.number
        if number > 1:
            parts = x.reshape(*x.shape[:2], heads, self.keys, self.values, self.width)
            x = parts.astype(jnp.float32).sum(axis).astype(x.dtype)
        return x.reshape(*x.shape[:2], heads, -1)

    def split_state(self, state):
        """[B,H,K,V] -> [B,walks,width,width]; None stays None."""
        if state is None:
            return None
        parts = state.reshape(*state.shape[:2], self.keys, self.width, self.values, self.width)
        return jnp.swapaxes(parts, 3, 4).reshape(state.shape[0], -1, self.width, self.width)

    def join_state(self, state):
        """[B,walks,width,width] -> [B,H,K,V]."""
        parts = state.reshape(state.shape[0], -1, self.keys, self.values, self.width, self.width)
        return jnp.swapaxes(parts, 3, 4).reshape(*parts.shape[:2], self.keys * self.width, self.values * self.width)

    def in_order(self, states):
        """[B,N,walks,...] in the order of the walks of `swapped`."""
        parts = states.reshape(*states.shape[:2], -1, self.keys, self.values, *states.shape[3:])
        return jnp.swapaxes(parts, 3, 4).reshape(states.shape)

    def turned(self, states):
        """States [B,N,walks,...,K,V] as walks of `swapped` hold them, [B,N,walks,...,V,K]; None stays None."""
        return None if states is None else jnp.swapaxes(self.in_order(states), -1, -2)
