"""Log-likelihoods of continuations given contexts, and of whole documents.

A score is a function of its request alone: padding reaches no layer, and which requests share a batch, in which order,
changes only rounding. A context that several continuations share is read once: its state (linear models) or its keys
and values (softmax models) branch into the continuations. Per-token scores are summed on the host in float64.

Letters: B rows, C continuations of a context, T tokens, K tokens scored, N tokens, D width, V vocabulary.
"""

import collections
import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from linscale import models
from linscale.config import ConfigError, Model
from linscale.evaluation.batching import (
    batches,
    branches_at_once,
    class_of,
    classes_of_pairs,
    length_classes,
    pad,
    round_up,
)

LOGITS = 2**24  # elements of float32 logits held at once: 64 MiB
STREAM = 2048  # tokens of a document read in one call, the state carried to the next


class Score(typing.NamedTuple):
    log_likelihood: float  # nats, of the continuation given the context
    greedy: bool  # whether greedy decoding would have produced it


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores with one set of parameters.

    context: tokens a softmax model may look back on; None: no limit (linear models). batch_tokens: tokens of a batch,
    padding included; 0: 4,096 on a CPU, 65,536 elsewhere. sharding: of a batch's rows, or None; parameters carry their
    own. row_multiple: rows of a batch are a multiple of it (devices over which rows are spread).
    """

    model: Model
    params: typing.Any
    context: int | None = None
    batch_tokens: int = 0
    sharding: typing.Any = None
    row_multiple: int = 1

    @property
    def budget(self) -> int:
        return self.batch_tokens or (4096 if jax.default_backend() == "cpu" else 65_536)

    def score(self, requests: list[tuple[typing.Sequence[int], typing.Sequence[int]]]) -> list[Score]:
        """Scores of (context ids, continuation ids), neither of them empty, in the order given.

        Where both together pass a softmax model's context by more than one token, the context loses tokens on its left,
        as in lm-evaluation-harness. Raises ConfigError: an empty part, a continuation longer than the context, an id
        outside the vocabulary.
        """
        groups = collections.defaultdict(list)
        for at, (context, continuation) in enumerate(requests):
            context, continuation = self._checked(context, continuation)
            groups[context].append((at, continuation))
        out: list = [None] * len(requests)
        alone = [(at, c, k) for c, members in groups.items() if len(members) == 1 for at, k in members]
        shared = [(c, members) for c, members in groups.items() if len(members) > 1]
        for at, scores, greedy in [*self._score_rows(alone), *self._score_branches(shared)]:
            out[at] = Score(float(np.sum(scores, dtype=np.float64)), bool(greedy.all()))
        return out

    def rolling(self, documents: list[typing.Sequence[int]], prefix: int) -> list[float]:
        """Log-likelihood in nats of each document after the token `prefix`: every token is scored once.

        Linear models read a document in one pass whatever its length, softmax models in windows of their context: the
        windows of lm-evaluation-harness, disjoint but for the last, which looks back as far as it can.
        """
        return [float(np.sum(scores, dtype=np.float64)) for scores in self.token_scores(documents, prefix)]

    def token_scores(self, documents: list[typing.Sequence[int]], prefix: int) -> list[np.ndarray]:
        """The same, token by token: float32 [len(document)] each."""
        if self.context is None:
            return self._stream(documents, prefix)
        rows, owners = [], []
        for n, document in enumerate(documents):
            for context, continuation in windows(list(document), prefix, self.context):
                rows.append((len(rows), *self._checked(context, continuation)))
                owners.append(n)
        parts = sorted(self._score_rows(rows), key=lambda part: part[0])
        out = [[np.zeros(0, np.float32)] for _ in documents]
        for at, scores, _ in parts:
            out[owners[at]].append(scores)
        return [np.concatenate(pieces) for pieces in out]

    def _checked(self, context, continuation) -> tuple[tuple, tuple]:
        context, continuation = tuple(map(int, context)), tuple(map(int, continuation))
        if not context or not continuation:
            raise ConfigError("a context or continuation to score is empty; each must have at least one token.")
        if self.context is not None:
            if len(continuation) > self.context:
                raise ConfigError(
                    f"a continuation has {len(continuation)} tokens, more than the {self.context} the model was trained "
                    "to read; softmax models cannot score it, linear ones can."
                )
            context = context[-(self.context + 1 - len(continuation)) :]
        if not 0 <= min(*context, *continuation, 0) <= max(*context, *continuation, 0) < self.model.vocab_size:
            raise ConfigError(f"a token to score is outside the model's vocabulary of {self.model.vocab_size}.")
        return context, continuation

    def _rows(self, tokens: int) -> int:
        return max(1, self.budget // tokens)

    def _count(self, rows: int) -> int:
        return -(-rows // self.row_multiple) * self.row_multiple

    def _put(self, x: np.ndarray):
        return jnp.asarray(x) if self.sharding is None else jax.device_put(x, self.sharding)

    def _score_rows(self, requests):
        """Yields (place, scores [K], greedy [K]) of requests (place, context, continuation), one row each."""
        if not requests:
            return
        length = {at: len(context) + len(continuation) - 1 for at, context, continuation in requests}
        classes = length_classes(list(length.values()), 4)
        for tokens in classes:
            members = [r for r in requests if class_of(length[r[0]], classes) == tokens]
            scored = min(tokens, round_up(max(len(k) for _, _, k in members), 8))
            members.sort(key=lambda r: length[r[0]])
            cut = batches(members, self._rows(tokens))
            count = self._count(len(cut[0]))
            for batch in cut:
                rows = pad([(*c, *k)[:-1] for _, c, k in batch], tokens, count)
                first = np.zeros(count, np.int32)
                first[: len(batch)] = [len(c) - 1 for _, c, _ in batch]
                targets = pad([k for _, _, k in batch], scored, count)
                scores, greedy = _score_rows(self.model, self.params, *map(self._put, (rows, first, targets)))
                yield from _unpad([(at, len(k)) for at, _, k in batch], scores, greedy)

    def _score_branches(self, groups):
        """The same of groups (context, [(place, continuation), ...]), the context read once."""
        if not groups:
            return
        most = branches_at_once([len(members) for _, members in groups])
        groups = [(c, members[i : i + most]) for c, members in groups for i in range(0, len(members), most)]
        longest = [max(len(k) for _, k in members) for _, members in groups]
        contexts, ends = classes_of_pairs([len(c) for c, _ in groups], longest, most)
        kinds = collections.defaultdict(list)
        for group, length in zip(groups, longest):
            kinds[class_of(len(group[0]), contexts), class_of(length, ends)].append(group)
        for (tokens, scored), members in sorted(kinds.items()):
            members.sort(key=lambda group: len(group[0]))
            cut = batches(members, self._rows(tokens + most * scored))
            count = self._count(len(cut[0]))
            for batch in cut:
                rows = pad([c for c, _ in batch], tokens, count, left=True)
                start = np.zeros(count, np.int32)
                start[: len(batch)] = [tokens - len(c) for c, _ in batch]
                targets = np.zeros((count, most, scored), np.int32)
                for b, (_, continuations) in enumerate(batch):
                    targets[b] = pad([k for _, k in continuations], scored, most)
                scores, greedy = _score_branches(self.model, self.params, *map(self._put, (rows, start, targets)))
                for b, (_, continuations) in enumerate(batch):
                    yield from _unpad([(at, len(k)) for at, k in continuations], scores[b], greedy[b])

    def _stream(self, documents, prefix: int) -> list[np.ndarray]:
        out = [np.zeros(len(document), np.float32) for document in documents]
        order = sorted((n for n in range(len(documents)) if len(documents[n])), key=lambda n: len(documents[n]))
        if not order:
            return out
        classes = length_classes([min(STREAM, len(documents[n])) for n in order], 3)
        for tokens in classes:
            members = [n for n in order if class_of(min(STREAM, len(documents[n])), classes) == tokens]
            cut = batches(members, self._rows(tokens))
            count = self._count(len(cut[0]))
            for batch in cut:
                cache = models.init_cache(self.model, count)
                longest = max(len(documents[n]) for n in batch)
                for at in range(0, longest, tokens):
                    labels = [documents[n][at : at + tokens] for n in batch]
                    before = [
                        ([prefix] if at == 0 else [documents[n][at - 1]]) if len(k) else []
                        for n, k in zip(batch, labels)
                    ]
                    inputs = [[*b, *k[:-1]] for b, k in zip(before, labels)]
                    placed = map(self._put, (pad(inputs, tokens, count), pad(labels, tokens, count)))
                    cache, scores = _score_stream(self.model, self.params, cache, *placed)
                    for n, part, row in zip(batch, labels, np.asarray(scores)):
                        out[n][at : at + len(part)] = row[: len(part)]
        return out


def windows(document: list[int], prefix: int, context: int):
    """(context, continuation) pairs that score each token once with at most `context` tokens read.

    Disjoint, each after one token of the window before (the first after `prefix`); the last reads a full context.
    """
    stream = [prefix, *document]
    for begin in range(0, len(document), context):
        end = min(begin + context, len(document))
        first = max(0, end - context)  # the last window looks back further
        yield stream[first : begin + 1], stream[begin + 1 : end + 1]


def _unpad(places, scores, greedy):
    scores, greedy = np.asarray(scores), np.asarray(greedy)
    for (at, length), row, same in zip(places, scores, greedy):
        yield at, row[:length], same[:length]


@functools.partial(jax.jit, static_argnums=0)
def _score_rows(model, params, tokens_BT, first_B, targets_BK):
    """Scores of targets [B,K], the first of which follows token first[B] of its row."""
    hidden_BTD, _ = models.forward(model, params, tokens_BT)
    at_BK = jnp.minimum(first_B[:, None] + jnp.arange(targets_BK.shape[1]), tokens_BT.shape[1] - 1)
    hidden_BKD = jnp.take_along_axis(hidden_BTD, at_BK[..., None], axis=1)
    return _token_scores(model, params, hidden_BKD, targets_BK)


@functools.partial(jax.jit, static_argnums=0)
def _score_branches(model, params, contexts_BT, start_B, targets_BCK):
    """Scores of targets [B,C,K] after each context, which is padded on its left up to start[B]."""
    batch, tokens = contexts_BT.shape
    _, branches, scored = targets_BCK.shape
    cache = models.init_cache(model, batch, tokens + scored, start=start_B)
    hidden_BTD, cache = models.forward(model, params, contexts_BT, None, cache)
    hidden = jnp.repeat(hidden_BTD[:, -1:], branches, axis=0)  # predicts the first token of every branch
    targets = targets_BCK.reshape(batch * branches, scored)
    if scored > 1:
        rest, _ = models.forward(model, params, targets[:, :-1], None, fan_out(cache, branches))
        hidden = jnp.concatenate([hidden, rest], axis=1)
    scores, greedy = _token_scores(model, params, hidden, targets)
    return scores.reshape(targets_BCK.shape), greedy.reshape(targets_BCK.shape)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score_stream(model, params, cache, tokens_BT, targets_BT):
    hidden_BTD, cache = models.forward(model, params, tokens_BT, None, cache)
    return cache, _token_scores(model, params, hidden_BTD, targets_BT)[0]


def fan_out(cache: dict, branches: int) -> dict:
    """The cache with every row `branches` times, side by side."""
    rows = functools.partial(jnp.repeat, repeats=branches)
    out = cache | {"layers": jax.tree.map(lambda x: rows(x, axis=1), cache["layers"])}
    for name in ("tpe", "start"):
        if name in cache:
            out[name] = rows(cache[name], axis=0)
    return out


def _token_scores(model, params, hidden, targets):
    """(log-likelihood float32, whether it is the likeliest token) of targets [...] from hidden [...,D]."""
    shape = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    size = max(1, min(len(targets), LOGITS // model.vocab_size))
    slices = -(-len(targets) // size)
    size = -(-len(targets) // slices)
    spare = slices * size - len(targets)

    def one_slice(_, x):
        hidden_ND, targets_N = x
        logits_NV = models.logits(model, params, hidden_ND)
        scores_N = jnp.take_along_axis(jax.nn.log_softmax(logits_NV), targets_N[:, None], axis=-1)[:, 0]
        return None, (scores_N, jnp.argmax(logits_NV, axis=-1) == targets_N)

    hidden = jnp.pad(hidden, ((0, spare), (0, 0))).reshape(slices, size, -1)
    targets = jnp.pad(targets, (0, spare)).reshape(slices, size)
    _, (scores, greedy) = jax.lax.scan(one_slice, None, (hidden, targets))
    return tuple(x.reshape(-1)[: np.prod(shape)].reshape(shape) for x in (scores, greedy))
