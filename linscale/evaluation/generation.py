"""Generation: prefill in chunks, then decoding in a jitted loop whose memory, for linear models, does not grow.

Prompts of a batch are padded on their left, so that all of them end together; the padding reaches no layer. The loop
hands out a block of tokens at a time, so that stop strings are found and text streams. Every row draws from a random
stream of its own, made from the seed and its place alone.

Letters: B rows, T tokens, V vocabulary.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from linscale import models
from linscale.config import ConfigError, Model
from linscale.evaluation.batching import pad, round_up
from linscale.models.layers import compute_dtype

PREFILL = 512  # tokens read in one call
BLOCK = 16  # tokens decoded between two looks of the host


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from softmax(logits / temperature),
    cut to the top_k likeliest (0: all) and to the fewest tokens whose probabilities sum to top_p (1: all)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"the temperature is {self.temperature}; it must be 0 (greedy) or positive.")
        if self.top_k < 0:
            raise ConfigError(f"top-k is {self.top_k}; it must be 0 (all tokens) or positive.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p is {self.top_p}; it must lie above 0 and at most at 1 (all tokens).")


def check_prompts(prompts: list[typing.Sequence[int]], context: int | None) -> None:
    """Raises ConfigError: no prompt, an empty one, one that fills a softmax model's context."""
    if not prompts:
        raise ConfigError("there is no prompt; give at least one.")
    for n, prompt in enumerate(prompts, 1):
        which = f"prompt {n}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise ConfigError(f"{which} is empty; give at least one character, or begin with the separator token.")
        if context is not None and len(prompt) >= context:
            raise ConfigError(
                f"{which} has {len(prompt)} tokens, but a model with softmax attention reads at most the {context} it was "
                "trained on, generated ones included; shorten it, or use a linear model."
            )


@functools.partial(jax.jit, static_argnums=0)
def for_decoding(model: Model, params):
    """The parameters with every matrix, and the embedding, in the compute dtype, as each step would make it.

    A step reads all weights once; made from float32 at every step they would be read at twice the size and written too.
    Vectors, bounds and phases stay float32, for they are used in float32.
    """
    dtype = compute_dtype(model)

    def cast(path, x):
        return x.astype(dtype) if path[-1].key in ("kernel", "embedding", "head") else x

    return jax.tree_util.tree_map_with_path(cast, params)


def token_blocks(
    model: Model,
    params,
    prompts: list[typing.Sequence[int]],
    *,
    most: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    end: int | None = None,
    context: int | None = None,
    sharding=None,
):
    """Yields int32 [B,n] blocks of new tokens, at most `most` a row. A row that drew `end` goes on drawing it.

    context: of a softmax model; the loop stops where the longest prompt would pass it. sharding: of rows. Stops early
    when all rows have ended. Raises ConfigError: see check_prompts.
    """
    check_prompts(prompts, context)
    longest = max(map(len, prompts))
    if context is not None:
        most = min(most, context - longest)
    step = min(PREFILL, round_up(longest, 64))
    tokens = max(2, -(-longest // step) * step)  # one token alone would count as decoding
    step = min(step, tokens) if step > 1 else tokens
    start = np.array([tokens - len(prompt) for prompt in prompts], np.int32)
    rows = pad(prompts, tokens, len(prompts), left=True)
    put = jnp.asarray if sharding is None else functools.partial(jax.device_put, device=sharding)
    cache = models.init_cache(model, len(prompts), tokens + round_up(most, BLOCK), start=put(start))
    if compute_dtype(model) != jnp.float32:
        params = for_decoding(model, params)
    for at in range(0, tokens, step):
        cache, logits = _prefill(model, params, cache, put(rows[:, at : at + step]))
    if model.arch not in ("llama", "hybrid"):
        del cache["start"]  # read only while there is padding or a mask
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(len(prompts)))
    last = _choose(logits, keys, 0, sampling)
    ended = last == (-1 if end is None else end)
    given, block = 0, last[:, None]
    while True:
        out = np.asarray(block)[:, : most - given]
        given += out.shape[1]
        yield out
        if given >= most or bool(np.asarray(ended).all()):
            return
        stop = -1 if end is None else end
        cache, last, ended, block = _decode(model, params, cache, last, ended, keys, stop, given, sampling)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(model, params, cache, tokens_BT):
    """(cache, logits [B,V] after the last token)"""
    hidden_BTD, cache = models.forward(model, params, tokens_BT, None, cache)
    return cache, models.logits(model, params, hidden_BTD[:, -1])


@functools.partial(jax.jit, static_argnums=(0, 8), donate_argnums=2)
def _decode(model, params, cache, last_B, ended_B, keys_B, end, drawn, sampling):
    """BLOCK more tokens: (cache, last [B], ended [B], tokens [B,BLOCK])."""

    def one_token(carry, n):
        cache, last_B, ended_B = carry
        hidden_BTD, cache = models.forward(model, params, last_B[:, None], None, cache)
        next_B = _choose(models.logits(model, params, hidden_BTD[:, 0]), keys_B, drawn + n, sampling)
        next_B = jnp.where(ended_B, end, next_B)
        return (cache, next_B, ended_B | (next_B == end)), next_B

    (cache, last_B, ended_B), tokens = jax.lax.scan(one_token, (cache, last_B, ended_B), jnp.arange(BLOCK))
    return cache, last_B, ended_B, tokens.T


@functools.partial(jax.jit, static_argnums=3)
def _choose(logits_BV, keys_B, drawn, sampling):
    """The next token of each row, int32 [B]; `drawn` tokens came before."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[1]:
        least_B = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        falling = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        share = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(share, axis=-1) - share < sampling.top_p  # the likeliest always
        least_B = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B, -jnp.inf, logits_BV)
    now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, drawn)
    return jax.vmap(jax.random.categorical)(now_B, logits_BV).astype(jnp.int32)


def stream_text(tokenizer, blocks, rows: int, stop: list[str] = (), end: int | None = None):
    """Yields (row, piece of text) from token blocks until every row has met a stop string, its end, or the last block.

    Joined, the pieces of a row are its text, cut before the first stop string. Half a character, or what may become a
    stop string, is held back until it is clear.
    """
    ids: list[list[int]] = [[] for _ in range(rows)]
    given, open_rows = [""] * rows, set(range(rows))
    for block in blocks:
        for row in sorted(open_rows):
            ended = _take(ids[row], block[row], end)
            text = tokenizer.decode(ids[row])
            found = [at for s in stop if (at := text.find(s)) >= 0]
            if found:
                text = text[: min(found)]
            elif not ended:
                text = text[: len(text) - _uncertain(text, stop)]
            if found or ended:
                open_rows.discard(row)
            if text.startswith(given[row]) and len(text) > len(given[row]):
                yield row, text[len(given[row]) :]
                given[row] = text
        if not open_rows:
            return
    for row in sorted(open_rows):  # the last block is over: nothing more can complete what was held back
        text = tokenizer.decode(ids[row])
        if len(text) > len(given[row]):
            yield row, text[len(given[row]) :]


def generate(model, params, tokenizer, prompts, *, most, sampling=Sampling(), seed=0, stop=(), end=None, context=None):
    """The texts that follow the prompts (token ids), one a prompt; see token_blocks and stream_text."""
    blocks = token_blocks(model, params, prompts, most=most, sampling=sampling, seed=seed, end=end, context=context)
    out = [""] * len(prompts)
    for row, piece in stream_text(tokenizer, blocks, len(prompts), stop, end):
        out[row] += piece
    return out


def _take(ids: list[int], new, end) -> bool:
    """Adds the new ids up to `end`; whether it came."""
    for token in new.tolist():
        if token == end:
            return True
        ids.append(token)
    return False


def _uncertain(text: str, stop) -> int:
    """How many characters at the end may still change: a broken character, the beginning of a stop string."""
    broken = len(text) - len(text.rstrip("\ufffd"))
    partial = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return max([broken, *partial])
