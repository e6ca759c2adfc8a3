"""Cross-entropy over a large vocabulary without the [tokens, vocabulary] array in memory.

A scan over slices of the token axis holds the logits of one slice at a time. The gradient is worked out in the same
sweep as the loss, while the logits are at hand, so that they are computed once: 6 B T D V FLOPs for loss and gradient.

Letters: B batch, T tokens, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp

MAX_LOGITS = 2**27  # elements of float32 logits held at once: 512 MiB


def cross_entropy(hidden: jax.Array, embedding: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over tokens of weight times negative log-likelihood, in nats.

    Args:
      hidden: [B,T,D] float32 or bfloat16; logits are hidden @ embedding.T, multiplied in this dtype, summed in float32.
      embedding: [V,D] float32, the (tied) output embedding; its gradient is summed in float32.
      labels: [B,T] integers in [0, V).
      weights: [B,T] float32; 0 leaves a token out. Labels and weights are constants of the differentiation.

    Returns:
      float32 scalar; divide by the sum of weights for nats per token.

    Raises:
      ValueError: shapes that do not fit.
    """
    batch, tokens, width = hidden.shape
    for name, x, shape in (("labels", labels, (batch, tokens)), ("weights", weights, (batch, tokens))):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; it must be {shape}.")
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ValueError(f"embedding has shape {embedding.shape}; it must be (vocabulary, {width}).")
    return _loss(hidden, embedding, labels, weights)


@jax.custom_vjp
def _loss(hidden, embedding, labels, weights):
    return _sweep(hidden, embedding, labels, weights, with_gradient=False)[0]


def _loss_forward(hidden, embedding, labels, weights):
    return _sweep(hidden, embedding, labels, weights, with_gradient=True)


def _loss_backward(gradients, d_loss):
    d_hidden, d_embedding = (g * d_loss.astype(g.dtype) for g in gradients)
    return d_hidden, d_embedding, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _sweep(hidden, embedding, labels, weights, with_gradient):
    batch, tokens, _ = hidden.shape
    vocabulary = embedding.shape[0]
    slices = min(tokens, -(-batch * tokens * vocabulary // MAX_LOGITS))
    size = -(-tokens // slices)

    def to_slices(x):
        x = jnp.pad(x, [(0, 0), (0, slices * size - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, slices, size, *x.shape[2:]), 1, 0)

    low = embedding.astype(hidden.dtype)
    precision = "highest" if hidden.dtype != jnp.bfloat16 else None

    def product(spec, a, b):
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def body(carry, x):
        loss, d_embedding = carry
        hidden_BTD, labels_BT, weights_BT = x
        logits_BTV = product("btd,vd->btv", hidden_BTD, low)
        log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        # A comparison rather than a gather: it stays local when the vocabulary is sharded.
        is_label_BTV = jnp.arange(vocabulary) == labels_BT[..., None]
        nll_BT = log_sum_BT - jnp.sum(jnp.where(is_label_BTV, logits_BTV, 0), axis=-1)
        loss += jnp.sum(jnp.where(weights_BT != 0, weights_BT * nll_BT, 0))
        if not with_gradient:
            return (loss, None), None
        d_logits_BTV = (jnp.exp(logits_BTV - log_sum_BT[..., None]) - is_label_BTV) * weights_BT[..., None]
        d_logits_BTV = d_logits_BTV.astype(hidden.dtype)
        d_embedding += product("btv,btd->vd", d_logits_BTV, hidden_BTD)
        return (loss, d_embedding), product("btv,vd->btd", d_logits_BTV, low).astype(hidden.dtype)

    zero = jnp.zeros(embedding.shape, jnp.float32) if with_gradient else None
    xs = tuple(map(to_slices, (hidden, labels, weights)))
    (loss, d_embedding), d_hidden = jax.lax.scan(body, (jnp.float32(0), zero), xs)
    if not with_gradient:
        return loss, None
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(batch, slices * size, -1)[:, :tokens]
    return loss, (d_hidden, d_embedding.astype(embedding.dtype))
