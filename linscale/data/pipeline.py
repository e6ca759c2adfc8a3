"""Batches from a token stream.

Row r of a stream is its tokens [r T, r T + T], T inputs and the T labels one further on. Packing is thus index
arithmetic over a memory map: rows are random access, the shuffle is grain's and exact at any size, and the place in
the data is one number. Each batch is a dict of [B, T] arrays:

    tokens int32 · labels int32 · segment_ids int32 (from 1, up by one at each separator; 0 is padding) · weights float32
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator

import numpy as np

from linscale.config import ConfigError
from linscale.data.corpus import Corpus, TokenStream


class Rows:
    """The full rows of a stream, as a grain random-access source. The last labels, fewer than T, are left out."""

    def __init__(self, stream: TokenStream, sequence: int):
        self._stream, self._sequence = stream, sequence

    def __len__(self) -> int:
        return self._stream.labels // self._sequence

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return row(self._stream, self._sequence, int(index))


def row(stream: TokenStream, sequence: int, index: int) -> dict[str, np.ndarray]:
    """Arrays [T] of one row; beyond the end of the stream weights and segment_ids are 0."""
    read = np.asarray(stream.tokens[index * sequence : (index + 1) * sequence + 1], np.int32)
    valid = max(len(read) - 1, 0)
    tokens, labels = np.zeros((2, sequence), np.int32)
    tokens[:valid], labels[:valid] = read[:-1], read[1:]
    starts = tokens == stream.separator_id
    starts[0] = True  # a row may begin inside a document
    segment_ids = np.cumsum(starts, dtype=np.int32)
    segment_ids[valid:] = 0
    weights = np.zeros(sequence, np.float32)
    weights[:valid] = 1
    return {"tokens": tokens, "labels": labels, "segment_ids": segment_ids, "weights": weights}


def train_batches(
    corpus: Corpus, *, batch: int, sequence: int, seed: int, workers: int = 0, host: int = 0, hosts: int = 1
):
    """An endless grain DatasetIterator (next, get_state, set_state, close) of shuffled training batches.

    batch: rows over all hosts; each host gets batch // hosts of them, every hosts-th from `host` on, so that global
    batch b has the same rows however many hosts there are. Each epoch has its own order and every full row once; a batch
    may span two epochs. workers: processes that read ahead; they change nothing but speed.
    Raises ConfigError: hosts that do not divide batch, less than one batch of training tokens.
    """
    import grain
    import grain.experimental

    rows = Rows(corpus.train, sequence)
    if batch % hosts:
        raise ConfigError(f"config.train.batch is {batch}, which the {hosts} hosts do not divide; make it a multiple.")
    check_batch(corpus, batch, sequence)
    shuffled = _shuffled(rows, seed)
    # grain reads 500 elements ahead by default, which would be gigabytes of batches.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    # drop_remainder: without it grain rounds the length of the endless data set in floating point, past what len() holds.
    batches = shuffled[host::hosts].batch(batch // hosts, drop_remainder=True).to_iter_dataset(options)
    if workers:
        _mark_flags_parsed()
        # Batches cross by pipe: in shared memory, grain's default, they outlive a killed trainer in /dev/shm.
        batches = grain.experimental.WithOptionsIterDataset(
            batches, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        )
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), worker_init_fn=_end_with_parent
        )
    return iter(batches)


def check_batch(corpus: Corpus, batch: int, sequence: int) -> None:
    """ConfigError if the training stream has less than one batch."""
    if corpus.train.labels // sequence < batch:
        raise ConfigError(
            f"config.train.batch {batch} times config.train.sequence {sequence} is {batch * sequence:,} tokens a step, "
            f"but the training stream has {corpus.train.labels:,}; make them smaller or the corpus larger."
        )


def _shuffled(rows, seed: int):
    import grain

    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def rows_of(corpus: Corpus, *, batch: int, sequence: int, seed: int, number: int) -> list[int]:
    """The rows of the stream that batch `number` (from 0) of `train_batches` holds, over all hosts, in order."""
    rows = _shuffled(range(len(Rows(corpus.train, sequence))), seed)
    return [int(rows[index]) for index in range(number * batch, (number + 1) * batch)]


def documents_of(corpus: Corpus, sequence: int, rows: list[int]) -> list[int]:
    """Ids of the documents, counted from 0 along the training stream, that these rows hold tokens or labels of."""
    starts, found = corpus.train.starts, set()
    for index in rows:
        first, last = np.searchsorted(starts, [index * sequence, (index + 1) * sequence], "right") - 1
        found |= set(range(int(first), int(last) + 1))
    return sorted(found)


def heldout_batches(
    corpus: Corpus, *, batch: int, sequence: int, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every label of the held-out stream once, in order; the last batch is filled up with rows of weight 0.

    batch and hosts as in `train_batches`; all hosts get equally many batches.
    """
    rows = -(-corpus.heldout.labels // sequence)
    for first in range(0, rows, batch):
        mine = [row(corpus.heldout, sequence, index) for index in range(first + host, first + batch, hosts)]
        yield {name: np.stack([one[name] for one in mine]) for name in mine[0]}


def _mark_flags_parsed() -> None:
    """grain reads absl flags when it starts workers, and refuses where absl's own main did not parse them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _end_with_parent(worker: int, workers: int) -> None:
    """A killed trainer cannot stop its workers, which would wait for ever on their full queues."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    del worker, workers
    threading.Thread(target=watch, daemon=True).start()
