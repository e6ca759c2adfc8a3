"""Batches: every label once an epoch, the same rows for any workers and hosts, exact resume."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linscale.config import ConfigError, Data
from linscale.data import heldout_batches, prepare, train_batches
from linscale.data.pipeline import Rows, row

T, B = 16, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 50 rows of 16 tokens, documents of 1 to 60 bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"{number}" * (1 + number * 7 % 20) for number in range(60)]
    (folder / "texts").write_text("|".join(texts))
    data = Data(source="text", path=str(folder / "texts"), separator="|", cache=str(folder / "cache"))
    return prepare(data, log=lambda message: None)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def rows_of(batches) -> list[bytes]:
    return [tokens.tobytes() + labels.tobytes() for b in batches for tokens, labels in zip(b["tokens"], b["labels"])]


def test_shapes_and_types(corpus):
    first = next(train_batches(corpus, batch=B, sequence=T, seed=0))
    held = next(heldout_batches(corpus, batch=B, sequence=T))
    for batch in (first, held):
        types = {"tokens": np.int32, "labels": np.int32, "segment_ids": np.int32, "weights": np.float32}
        assert {name: (array.shape, array.dtype.type) for name, array in batch.items()} == {
            name: ((B, T), kind) for name, kind in types.items()
        }
    assert (first["weights"] == 1).all() and (first["segment_ids"] >= 1).all()


def test_rows_tile_the_stream(corpus):
    stream = np.asarray(corpus.train.tokens, np.int32)
    rows = Rows(corpus.train, T)
    assert len(rows) == (len(stream) - 1) // T > 20
    tokens = np.concatenate([rows[index]["tokens"] for index in range(len(rows))])
    labels = np.concatenate([rows[index]["labels"] for index in range(len(rows))])
    assert np.array_equal(tokens, stream[: len(tokens)]) and np.array_equal(labels, stream[1 : len(tokens) + 1])
    assert len(stream) - 1 - len(labels) < T, "less than a row is left out"


def test_segments_begin_at_separators_and_their_last_label_is_one(corpus):
    separator = corpus.tokenizer.separator_id
    for index in range(len(Rows(corpus.train, T))):
        one = Rows(corpus.train, T)[index]
        expected, current = [], 0
        for position, token in enumerate(one["tokens"]):
            current += token == separator or position == 0
            expected.append(current)
        assert one["segment_ids"].tolist() == expected
        new = one["segment_ids"][1:] != one["segment_ids"][:-1]
        assert np.array_equal(new, one["labels"][:-1] == separator), "the label of a document's last token"


def test_every_row_once_an_epoch_in_another_order(corpus):
    rows = Rows(corpus.train, T)
    expected = sorted(
        rows_of([{name: array[None] for name, array in rows[index].items()} for index in range(len(rows))])
    )
    seen = rows_of(take(train_batches(corpus, batch=1, sequence=T, seed=3), 3 * len(rows)))
    epochs = [seen[n * len(rows) : (n + 1) * len(rows)] for n in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != expected


def test_seeds(corpus):
    runs = [rows_of(take(train_batches(corpus, batch=B, sequence=T, seed=seed), 8)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_global_batch(corpus, hosts):
    whole = take(train_batches(corpus, batch=B, sequence=T, seed=0), 40)  # into the third epoch
    parts = [take(train_batches(corpus, batch=B, sequence=T, seed=0, host=h, hosts=hosts), 40) for h in range(hosts)]
    for number, batch in enumerate(whole):
        for host in range(hosts):
            assert_same([parts[host][number]], [{name: array[host::hosts] for name, array in batch.items()}])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_and_workers_change_nothing(corpus, workers):
    per_epoch = len(Rows(corpus.train, T)) // B
    count = 3 * per_epoch
    undisturbed = take(train_batches(corpus, batch=B, sequence=T, seed=5), count)
    first = train_batches(corpus, batch=B, sequence=T, seed=5, workers=workers)
    states, batches = {0: first.get_state()}, []
    for number in range(1, count + 1):
        batches.append(next(first))
        states[number] = first.get_state()
    assert_same(batches, undisturbed)
    stops = (0, per_epoch // 2, per_epoch + per_epoch // 2) if workers else range(count)
    again = train_batches(corpus, batch=B, sequence=T, seed=5, workers=workers)
    for stop in stops:
        again.set_state(json.loads(json.dumps(states[stop])))
        assert_same(take(again, 3), undisturbed[stop : stop + 3] + take_more(undisturbed, stop, count, corpus))
    first.close(), again.close()


def take_more(undisturbed, stop, count, corpus):
    """What follows at the very end of the undisturbed run."""
    missing = max(0, stop + 3 - count)
    if not missing:
        return []
    return take(train_batches(corpus, batch=B, sequence=T, seed=5), count + missing)[count:]


def test_heldout_is_every_label_once_in_order(corpus):
    stream = np.asarray(corpus.heldout.tokens)
    batches = list(heldout_batches(corpus, batch=B, sequence=T))
    valid = [batch["weights"] == 1 for batch in batches]
    labels = np.concatenate([batch["labels"][v] for batch, v in zip(batches, valid)])
    assert np.array_equal(labels, stream[1:])
    assert sum(batch["weights"].sum() for batch in batches) == corpus.heldout.labels
    for batch in batches:
        assert np.array_equal(batch["segment_ids"] > 0, batch["weights"] == 1)
        assert set(np.unique(batch["weights"])) <= {0, 1} and batch["tokens"].shape == (B, T)
        assert (batch["labels"] >= 0).all() and (batch["tokens"] < corpus.vocab_size).all()
    assert_same(batches, list(heldout_batches(corpus, batch=B, sequence=T)))
    halves = [list(heldout_batches(corpus, batch=B, sequence=T, host=host, hosts=2)) for host in range(2)]
    assert_same(halves[1], [{name: array[1::2] for name, array in batch.items()} for batch in batches])


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(1, 9))
@settings(deadline=None)
def test_rows_of_any_stream(tmp_path_factory, ids, sequence):
    """Separators (3) anywhere, also two in a row: labels tile the stream, segments count separators."""
    from linscale.data.corpus import TokenStream

    path = tmp_path_factory.mktemp("stream") / "s"
    np.array(ids, np.uint16).tofile(f"{path}.tokens")
    stream = TokenStream(str(path), "uint16", len(ids), 1, 1, separator_id=3)
    rows = [row(stream, sequence, index) for index in range(-(-(len(ids) - 1) // sequence))]
    weights = np.concatenate([one["weights"] for one in rows]) == 1
    assert np.concatenate([one["labels"] for one in rows])[weights].tolist() == ids[1:]
    for one in rows:
        steps = np.diff(one["segment_ids"])[one["weights"][1:] == 1]
        assert np.array_equal(steps, (one["tokens"][1:] == 3)[one["weights"][1:] == 1])
        assert one["segment_ids"][0] == 1


def test_too_small_a_corpus_and_hosts_that_do_not_divide(corpus):
    with pytest.raises(ConfigError, match=r"config.train.batch 8 times config.train.sequence 1000 is 8,000 tokens"):
        train_batches(corpus, batch=8, sequence=1000, seed=0)
    with pytest.raises(ConfigError, match=r"config.train.batch is 4, which the 3 hosts do not divide"):
        train_batches(corpus, batch=4, sequence=T, seed=0, hosts=3)


def test_streams_travel_to_workers_by_path(corpus):
    assert corpus.train.tokens.size and len(pickle.dumps(Rows(corpus.train, T))) < 1000
    copy = pickle.loads(pickle.dumps(corpus.train))
    assert copy == corpus.train and np.array_equal(copy.tokens, corpus.train.tokens)


def test_importing_is_cheap():
    code = """
import sys, linscale.data
assert {"prepare", "Corpus", "train_batches", "heldout_batches"} <= set(linscale.data.__all__)
heavy = {"grain", "jax", "tensorflow_datasets", "pyarrow", "tokenizers", "numpy"} & set(sys.modules)
linscale.data.prepare
assert not heavy and not {"grain", "jax", "tensorflow_datasets", "pyarrow"} & set(sys.modules), heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds processes through /proc")
def test_workers_end_with_a_killed_trainer(corpus, tmp_path):
    """From a plain script, whose absl flags nobody parsed."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal, sys
from linscale.data import train_batches
from linscale.data.corpus import Corpus
if __name__ == "__main__":
    corpus = Corpus({corpus.folder!r}, {corpus.manifest!r})
    batches = train_batches(corpus, batch={B}, sequence={T}, seed=0, workers=2)
    for _ in range(4): next(batches)
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    mark = f"LINSCALE_TEST={tmp_path}"
    environment = os.environ | {"LINSCALE_TEST": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, timeout=100)
    assert done.stdout == "ready\n" and done.returncode == -signal.SIGKILL

    def left() -> list[int]:
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    found += [int(pid)] if mark.encode() in file.read() else []
            except OSError:
                continue
        return found

    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []
