"""Cross-entropy over a large vocabulary without the [tokens, vocabulary] array in memory.

A scan over slices of the token axis holds the logits of one slice at a time. The gradient is worked out in the same
sweep as the loss, while the logits are at hand, so that they are computed once: 6 B T D V FLOPs for loss and gradient.

Over a mesh every device sweeps its own tokens against its own part of the vocabulary. Of the logits only sums over the
vocabulary and the label's entry are communicated, a few numbers a token; then the gradients, summed once.

On Hopper GPUs a kernel goes from logits to losses and the gradient (`pallas_gpu`), unless devices share a vocabulary.

Letters: B batch, T tokens, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from linscale.kernels.axes import Axes, mesh_for, over_mesh
from linscale.kernels.hopper import choose, on_hopper

MAX_LOGITS = 2**27  # elements of float32 logits held at once: 512 MiB; on GPUs four times as many, for longer products
SHORTEST, LONGEST = 4096, 131_072  # vocabularies of the kernel for Hopper GPUs; timed up to 100,280


def cross_entropy(
    hidden: jax.Array, embedding: jax.Array, labels: jax.Array, weights: jax.Array, *, axes: Axes | None = None
) -> jax.Array:
    """Sum over tokens of weight times negative log-likelihood, in nats.

    Args:
      hidden: [B,T,D] float32 or bfloat16; logits are hidden @ embedding.T, multiplied in this dtype, summed in float32.
      embedding: [V,D] float32, the (tied) output embedding; its gradient is summed in float32.
      labels: [B,T] integers in [0, V).
      weights: [B,T] float32; 0 leaves a token out. Labels and weights are constants of the differentiation.
      axes: how the mesh in context (jax.set_mesh) splits batch, tokens and vocabulary. None, or no mesh: one device's
        work. The embedding may lie on the mesh in any way; each device gathers its part of the vocabulary.

    Returns:
      float32 scalar; divide by the sum of weights for nats per token.

    Raises:
      ValueError: shapes that do not fit; batch, tokens or vocabulary that do not divide over their mesh axes.
    """
    batch, tokens, width = hidden.shape
    for name, x, shape in (("labels", labels, (batch, tokens)), ("weights", weights, (batch, tokens))):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; it must be {shape}.")
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ValueError(f"embedding has shape {embedding.shape}; it must be (vocabulary, {width}).")
    return _loss(axes, hidden, embedding, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(axes, hidden, embedding, labels, weights):
    return _over_devices(axes, hidden, embedding, labels, weights, with_gradient=False)[0]


def _loss_forward(axes, hidden, embedding, labels, weights):
    return _over_devices(axes, hidden, embedding, labels, weights, with_gradient=True)


def _loss_backward(axes, gradients, d_loss):
    d_hidden, d_embedding = (g * d_loss.astype(g.dtype) for g in gradients)
    return d_hidden, d_embedding, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _over_devices(axes, hidden, embedding, labels, weights, with_gradient):
    """(loss, (d_hidden, d_embedding) or None), on one device or over the mesh."""
    low = embedding.astype(hidden.dtype)  # before it is gathered: half the bytes in bfloat16
    arrays = {"hidden": hidden, "embedding": low, "labels": labels, "weights": weights}
    mesh = mesh_for(axes)
    if mesh is None:
        loss, gradients = _sweep(**arrays, with_gradient=with_gradient)
    else:
        tokens_axes = (*axes.batch, axes.sequence)
        axis = axes.vocabulary if mesh.shape[axes.vocabulary] > 1 else None

        def on_device(arrays):
            loss, gradients = _sweep(**arrays, with_gradient=with_gradient, axis=axis)
            loss = jax.lax.psum(loss, tokens_axes)
            if not with_gradient:
                return loss, None
            d_hidden, d_embedding = gradients
            return loss, (jax.lax.psum(d_hidden, axes.vocabulary), jax.lax.psum(d_embedding, tokens_axes))

        dims = {"hidden": "BTD", "embedding": "VD", "labels": "BT", "weights": "BT"}
        results = ("", ("BTD", "VD") if with_gradient else None)
        loss, gradients = over_mesh(on_device, mesh, axes, arrays, dims, results)
    if with_gradient:
        gradients = gradients[0], gradients[1].astype(embedding.dtype)
    return loss, gradients


def _sweep(hidden, embedding, labels, weights, *, with_gradient, axis=None):
    """axis: the mesh axis that splits the vocabulary, inside jax.shard_map; the gradient of hidden is then in parts."""
    batch, tokens, _ = hidden.shape
    vocabulary = embedding.shape[0]
    at_once = MAX_LOGITS * (4 if jax.default_backend() == "gpu" else 1)
    slices = min(tokens, -(-batch * tokens * vocabulary // at_once))
    size = -(-tokens // slices)
    losses = functools.partial(_in_xla, dtype=hidden.dtype, axis=axis)
    if with_gradient:
        chosen = choose("cross-entropy", None, refusal(vocabulary, hidden.dtype, axis))
        losses = losses if chosen == "xla" else _on_hopper

    def to_slices(x):
        x = jnp.pad(x, [(0, 0), (0, slices * size - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, slices, size, *x.shape[2:]), 1, 0)

    precision = "highest" if hidden.dtype != jnp.bfloat16 else None

    def product(spec, a, b):
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def body(carry, x):
        loss, d_embedding = carry
        hidden_BTD, labels_BT, weights_BT = x
        logits_BTV = product("btd,vd->btv", hidden_BTD, embedding)
        losses_BT, d_logits_BTV = losses(logits_BTV, labels_BT, weights_BT)
        loss += jnp.sum(jnp.where(weights_BT != 0, weights_BT * losses_BT, 0))
        if not with_gradient:
            return (loss, None), None
        d_embedding += product("btv,btd->vd", d_logits_BTV, hidden_BTD)
        return (loss, d_embedding), product("btv,vd->btd", d_logits_BTV, embedding).astype(hidden.dtype)

    zero = jnp.zeros(embedding.shape, jnp.float32) if with_gradient else None
    xs = tuple(map(to_slices, (hidden, labels, weights)))
    (loss, d_embedding), d_hidden = jax.lax.scan(body, (jnp.float32(0), zero), xs)
    if not with_gradient:
        return loss, None
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(batch, slices * size, -1)[:, :tokens]
    return loss, (d_hidden, d_embedding)


def refusal(vocabulary: int, dtype, axis: str | None = None) -> str | None:
    """Why the kernel cannot serve, as a sentence without its stop; None if it can."""
    if not on_hopper():
        return "it needs a Hopper GPU (compute capability 9.0) and jax >= 0.11"
    if dtype != jnp.bfloat16:
        return f"hidden has dtype {dtype}, it takes bfloat16"
    if axis is not None:
        return f"the vocabulary is split over the mesh axis {axis!r}"
    if vocabulary % 8 or not SHORTEST <= vocabulary <= LONGEST:
        return f"it takes vocabularies in steps of 8 from {SHORTEST} to {LONGEST}, this one has {vocabulary}"
    return None


def _on_hopper(logits_BTV, labels_BT, weights_BT):
    """The losses of tokens [B,T], without their weights, and the gradient of the logits, with them."""
    from linscale.kernels.cross_entropy.pallas_gpu import losses

    vocabulary = logits_BTV.shape[-1]
    labels_BT = jnp.clip(labels_BT, 0, vocabulary - 1).astype(jnp.int32)  # each is an address to read
    flat = logits_BTV.reshape(-1, vocabulary), labels_BT.reshape(-1), weights_BT.reshape(-1)
    losses_N, d_logits_NV = losses(*flat)
    return losses_N.reshape(labels_BT.shape), d_logits_NV.reshape(logits_BTV.shape)


def _in_xla(logits_BTV, labels_BT, weights_BT, *, dtype, axis):
    """As `_on_hopper`; the gradient in `dtype`."""
    vocabulary = logits_BTV.shape[-1]
    entries = jnp.arange(vocabulary) + (0 if axis is None else vocabulary * jax.lax.axis_index(axis))
    is_label_BTV = entries == labels_BT[..., None]  # a gather would not know entries of other devices
    log_sum_BT, label_BT = _over_vocabulary(logits_BTV, is_label_BTV, axis)
    d_logits_BTV = (jnp.exp(logits_BTV - log_sum_BT[..., None]) - is_label_BTV) * weights_BT[..., None]
    return log_sum_BT - label_BT, d_logits_BTV.astype(dtype)


def _over_vocabulary(logits_BTV, is_label_BTV, axis):
    """The log of the sum of exponentials and the label's logit, both [B,T], of the vocabulary on all devices."""
    label_BTV = jnp.where(is_label_BTV, logits_BTV, 0)
    if jax.default_backend() == "gpu":
        greatest_BT, sum_BT, label_BT = _in_one_pass(logits_BTV, label_BTV)
    else:
        greatest_BT, label_BT = jnp.max(logits_BTV, axis=-1), jnp.sum(label_BTV, axis=-1)
        sum_BT = jnp.sum(jnp.exp(logits_BTV - greatest_BT[..., None]), axis=-1)
    if axis is not None:
        own_BT, greatest_BT = greatest_BT, jax.lax.pmax(greatest_BT, axis)
        sum_BT, label_BT = jax.lax.psum((sum_BT * jnp.exp(own_BT - greatest_BT), label_BT), axis)
    return greatest_BT + jnp.log(sum_BT), label_BT


def _in_one_pass(logits_BTV, label_BTV):
    """(greatest logit, sum of exponentials relative to it, sum of the label's array): a GPU would otherwise read the
    logits twice."""

    def merge(a, b):
        greatest = jnp.maximum(a[0], b[0])
        return greatest, a[1] * jnp.exp(a[0] - greatest) + b[1] * jnp.exp(b[0] - greatest), a[2] + b[2]

    nothing = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0), jnp.float32(0)
    return jax.lax.reduce((logits_BTV, jnp.ones_like(logits_BTV), label_BTV), nothing, merge, (2,))
