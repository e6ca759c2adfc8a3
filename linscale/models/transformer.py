"""The one skeleton: embedding, stacked pre-norm blocks scanned over depth, final norm, output head.

  x = embed(tokens); x = tpe(x) (cosFormer2 only); per layer x += mixer(norm(x)), x += glu(norm(x)); logits = norm(x) E^T

E is the embedding, or with `model.tied` false a matrix of its own, `head`.

Parameters of equal layers are stacked on axis 0 and the layers run in a `lax.scan`, so that compile time does not
depend on depth. The hybrid (arXiv 2501.08313) has two kinds of layers, scanned period by period.

Everything outside this package uses the functions: parameters are a nested dict of float32 arrays.

Letters: B batch, T tokens, D width, V vocabulary, L layers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from linscale import sharding
from linscale.config import ConfigError, Model
from linscale.kernels import cross_entropy, documents_fit
from linscale.kernels.remat import KEPT
from linscale.models import cosformer2, hgrn2, llama, tnl
from linscale.models.layers import GatedLinearUnit, LayerCache, compute_dtype, matrices_in
from linscale.models.tpe import Tpe

_MIXERS = {"llama": llama.Mixer, "tnl": tnl.Mixer, "hgrn2": hgrn2.Mixer, "cosformer2": cosformer2.Mixer}


def period(model: Model) -> list[tuple[str, int]]:
    """The layers' kinds as runs (kind, how many) that repeat over the depth."""
    if model.arch == "hybrid":
        return [("tnl", model.softmax_every - 1), ("llama", 1)]
    return [(model.arch, 1)]


def layer_indices(model: Model) -> dict[str, list[int]]:
    """Kind -> the positions in the depth of its layers."""
    pattern = [kind for kind, count in period(model) for _ in range(count)]
    kinds = [pattern[i % len(pattern)] for i in range(model.layers)]
    return {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}


class Block(nnx.Module):
    def __init__(self, model: Model, kind: str, rngs: nnx.Rngs):
        mixer = _MIXERS[kind]
        self.mixer_norm = mixer.norm(model)
        self.mixer = mixer(model, rngs)
        self.ffn_norm = mixer.norm(model)
        chosen = model.ffn_activation
        self.ffn = GatedLinearUnit(model, mixer.ffn_activation if chosen == "paper" else chosen, rngs)

    def __call__(self, x_BTD, **context):
        normed, x_BTD = self.mixer_norm(x_BTD, uses=self.mixer.products)
        mixed_BTD, caches = self.mixer(normed, **context)
        normed, x_BTD = self.ffn_norm(x_BTD, mixed_BTD, uses=self.ffn.products)
        return x_BTD + self.ffn(normed), caches


class Transformer(nnx.Module):
    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.model = model
        # The final norm has unit RMS, so logits start with sd sqrt(D) std; bounded, the first loss stays near ln V.
        std = min(model.init_std, 0.45 / model.width**0.5)
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (model.vocab_size, model.width)))
        if not model.tied:
            self.head = nnx.Param(std * jax.random.normal(rngs.params(), (model.vocab_size, model.width)))
        self.tpe = Tpe(model, rngs) if model.arch == "cosformer2" else None
        self.layers = nnx.Dict(
            {kind: _stack(model, kind, len(at), rngs) for kind, at in layer_indices(model).items()},
        )
        self.final_norm = _MIXERS["tnl" if model.arch == "hybrid" else model.arch].norm(model)

    def __call__(self, tokens_BT, segment_ids_BT, cache, softmax):
        # Rows are cast after they are looked up: the gradient of a row is a sum over all places of its token, and in
        # bfloat16 that sum would stall; on GPUs it would also be slow, as frequent tokens wait for each other.
        rows_BTD = sharding.gather({"embedding": self.embedding[...]})["embedding"][tokens_BT]
        x_BTD = sharding.constrain(rows_BTD.astype(compute_dtype(self.model)), "batch", "sequence", None)
        if cache is not None and "start" in cache and tokens_BT.shape[1] > 1:
            segment_ids_BT, cache = _forget_left_padding(cache, tokens_BT.shape[1])
        new_cache = None if cache is None else cache | {"position": cache["position"] + tokens_BT.shape[1]}
        if self.tpe is not None:
            x_BTD, tpe = self.tpe(x_BTD, segment_ids=segment_ids_BT, cache=None if cache is None else cache["tpe"])
            if cache is not None:
                new_cache["tpe"] = tpe
        x_BTD, layers = self._run_layers(x_BTD, segment_ids_BT, cache, softmax)
        if cache is not None:
            new_cache["layers"] = layers
        (hidden_BTD,), _ = self.final_norm(x_BTD)
        return hidden_BTD, new_cache

    def _run_layers(self, x_BTD, segment_ids_BT, cache, softmax):
        position = 0 if cache is None else cache["position"]
        start = None if cache is None else cache.get("start")
        unroll = _unroll(self.model, cache is not None, x_BTD.shape[1], softmax)
        layer_of, stacks, caches = {}, {}, {}
        for kind, at in layer_indices(self.model).items():
            graphdef, params = nnx.split(self.layers[kind])
            params = nnx.to_pure_dict(params)
            params = matrices_in(compute_dtype(self.model), params)
            if hasattr(_MIXERS[kind], "across_layers"):
                params["mixer"] = _MIXERS[kind].across_layers(params["mixer"])
            caches[kind] = None if cache is None else cache["layers"][kind]
            stacks[kind] = (params, jnp.asarray(at), None if cache is None else jnp.arange(len(at)))

            context = {"position": position, "segment_ids": segment_ids_BT}
            if kind == "llama":
                context["softmax"] = softmax
                if start is not None:  # its keys are masked instead
                    context |= {"segment_ids": None, "start": start}

            # Caches are carried, not scanned over: so they are changed in place, where results of a scan are new arrays.
            def one_layer(carry, xs, graphdef=graphdef, context=context):
                x_BTD, caches = carry
                params, layer, row = xs
                block = nnx.merge(graphdef, sharding.gather(params))
                cache = None if caches is None else LayerCache(caches, row)
                x_BTD, caches = block(x_BTD, layer=layer, cache=cache, **context)
                return (sharding.constrain(x_BTD, "batch", "sequence", None), caches), None

            layer_of[kind] = _remat(one_layer, self.model.remat, unroll >= len(at))

        def run(kind, x_BTD, caches, xs):
            at_once = min(unroll, xs[1].shape[0])
            (x_BTD, new), _ = jax.lax.scan(layer_of[kind], (x_BTD, caches[kind]), xs, unroll=at_once)
            return x_BTD, caches | {kind: new}

        runs = period(self.model)
        if len(runs) == 1:
            kind = runs[0][0]
            return run(kind, x_BTD, caches, stacks[kind])
        return _run_periods(run, runs, stacks, x_BTD, caches, self.model, unroll)


def _unroll(model: Model, cached: bool, tokens: int, softmax: str | None) -> int:
    """Layers in the body of the loop. Short programs stay: prompts, which come in many lengths, and softmax layers that
    choose by documents themselves, each choice of which is a program of its own."""
    if model.unroll:
        return model.unroll
    chosen = softmax == "packed" or model.arch not in ("llama", "hybrid")
    quick = tokens == 1 if cached else chosen
    return model.layers if quick and jax.default_backend() == "gpu" else 1


def _run_periods(run, runs, stacks, x_BTD, caches, model, unroll):
    """Whole periods in a scan, each run of equal layers in a scan of its own; the layers left over come last."""
    periods = model.layers // sum(count for _, count in runs)
    counts = dict(runs)
    whole = {
        kind: jax.tree.map(lambda a, n=counts[kind]: a[: periods * n].reshape(periods, n, *a.shape[1:]), xs)
        for kind, xs in stacks.items()
    }
    rest = {kind: jax.tree.map(lambda a, n=counts[kind]: a[periods * n :], xs) for kind, xs in stacks.items()}

    def one_period(carry, xs):
        for kind, _ in runs:
            carry = run(kind, *carry, xs[kind])
        return carry, None

    carry = x_BTD, caches
    if periods:
        carry, _ = jax.lax.scan(one_period, carry, whole, unroll=max(1, min(periods, unroll * periods // model.layers)))
    for kind, _ in runs:
        if kind in rest and rest[kind][1].shape[0]:
            carry = run(kind, *carry, rest[kind])
    return carry


def _forget_left_padding(cache, tokens):
    """(segment ids [B,T] that part a row's padding from its text, the cache without states of padding alone)."""
    position, start_B = cache["position"], cache["start"]
    segment_ids_BT = (position + jnp.arange(tokens) >= start_B[:, None]).astype(jnp.int32)
    reads_B = position > start_B

    def clear(state, axis):
        return jnp.where(reads_B.reshape((-1,) + (1,) * (state.ndim - axis - 1)), state, 0)

    layers = {
        kind: state if kind == "llama" else jax.tree.map(lambda s: clear(s, 1), state)
        for kind, state in cache["layers"].items()
    }
    cache = cache | {"layers": layers}
    if "tpe" in cache:
        cache["tpe"] = clear(cache["tpe"], 0)
    return segment_ids_BT, cache


def _stack(model, kind, layers, rngs):
    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return Block(model, kind, rngs)

    return make(rngs)


def _remat(one_layer, policy: str, unrolled: bool):
    if policy == "auto":
        policy = "dots" if jax.default_backend() == "gpu" else "none"
    if policy == "none":
        if not sharding.gathers():
            return one_layer
        # Gathered parameters are the one thing that is not kept: the backward pass gathers them again.
        return jax.checkpoint(
            one_layer, policy=lambda primitive, *_, **__: primitive.name != "sharding_constraint", prevent_cse=False
        )
    keep = _kept_by_dots if policy == "dots" else None
    # Inside a loop common subexpressions cannot undo the recomputation; unrolled, they could.
    return jax.checkpoint(one_layer, policy=keep, prevent_cse=unrolled)


def _kept_by_dots(primitive, *args, **params):
    """Products with weights and what attention kernels keep for their gradients; elementwise work is done again."""
    if primitive.name == "name":
        return params["name"] == KEPT
    if primitive.name.startswith("dot_product_attention_fwd"):  # cuDNN's: its softmax statistics have no name
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


@functools.cache
def _graphdef(model: Model):
    return nnx.split(nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0))))[0]


def init(model: Model, seed: int | jax.Array) -> dict:
    """Parameters: nested dict of float32 arrays, those of equal layers stacked on axis 0. Jit-able in seed."""
    return nnx.to_pure_dict(nnx.state(Transformer(model, nnx.Rngs(jax.random.key(seed))), nnx.Param))


def init_cache(model: Model, batch: int, slots: int = 0, start: jax.Array | None = None) -> dict:
    """An empty decoding cache.

    slots: the longest sequence, padding included, which softmax layers need and linear ones ignore.
    start: [B] integers: row b is padded on its left up to this position, and nothing of the padding reaches any layer.
      The padding must end in calls of more than one token (prefill).
    """
    layers = {}
    for kind, at in layer_indices(model).items():
        one = _MIXERS[kind].empty_cache(model, batch, slots)
        layers[kind] = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(at), *x.shape)), one)  # noqa: B023
    cache = {"position": jnp.int32(0), "layers": layers}
    if start is not None:
        cache["start"] = jnp.asarray(start, jnp.int32)
    if model.arch == "cosformer2":
        cache["tpe"] = Tpe.empty_cache(model, batch)
    return cache


def forward(
    model: Model, params: dict, tokens, segment_ids=None, cache=None, softmax: str | None = None
) -> tuple[jax.Array, dict | None]:
    """Hidden states after the final norm.

    Args:
      tokens: [B,T] integers in [0, V).
      segment_ids: [B,T] integers; a new document starts where the id changes, and no layer looks across. None: one
        document a row.
      cache: from `init_cache` or an earlier call: the tokens continue it. T may be 1 (decoding) or more (prefill).
        Not together with segment_ids in a model with softmax layers.
      softmax: the implementation of softmax layers, see linscale.kernels.softmax_attention; from `by_documents`.

    Returns:
      hidden [B,T,D] in the compute dtype, and the cache after the last token (None if none was given).
    """
    return nnx.merge(_graphdef(model), params)(tokens, segment_ids, cache, softmax)


def output_head(params: dict) -> jax.Array:
    """[V,D] float32: the embedding where it is tied."""
    return params.get("head", params["embedding"])


def logits(model: Model, params: dict, hidden: jax.Array) -> jax.Array:
    """[..., D] -> [..., V] float32."""
    head = output_head(params).astype(hidden.dtype)
    precision = "highest" if hidden.dtype == jnp.float32 else None
    return jnp.einsum("...d,vd->...v", hidden, head, precision=precision, preferred_element_type=jnp.float32)


def loss(model: Model, params: dict, batch: dict, softmax: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Sum of weighted negative log-likelihood in nats, and the sum of weights; float32 scalars.

    batch: tokens, labels, segment_ids [B,T] integers, weights [B,T] float32. softmax as for `forward`.
    """
    hidden, _ = forward(model, params, batch["tokens"], batch["segment_ids"], softmax=softmax)
    head = sharding.gather({"head": output_head(params)})["head"]
    nll = cross_entropy(hidden, head, batch["labels"], batch["weights"], axes=sharding.AXES)
    return nll, jnp.sum(batch["weights"])


def by_documents(model: Model, segment_ids, run):
    """run(softmax) with what serves the softmax layers best for these documents [B,T].

    On GPUs cuDNN has room for so many documents a row, and another program is needed where there are more. The choice
    is made here, around whole programs, gradients included, and not in every layer: there it would stand between XLA
    and its view of the model, and copy what it returns. Elsewhere there is none: run(None).
    """
    fit = None
    if "llama" in layer_indices(model):
        fit = documents_fit(segment_ids, model.heads, model.width // model.heads, compute_dtype(model), sharding.AXES)
    if fit is None:
        return run(None)
    return jax.lax.cond(fit, lambda: run("packed"), lambda: run("blockwise"))


def validate(model: Model) -> None:
    """Traces the model on two tokens. Raises ConfigError, before any compile, for what the operators refuse."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(lambda: init(model, 0))
    try:
        jax.eval_shape(functools.partial(forward, model), params, tokens)
    except ValueError as error:
        raise ConfigError(
            f"config.model.attention is {model.attention!r}, which cannot run this model: {error}"
        ) from error
