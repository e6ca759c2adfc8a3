"""The two streams hold the documents exactly; what cannot work is said in one sentence."""

import dataclasses
import random
import time

import numpy as np
import pytest

from linscale.config import ConfigError, Data
from linscale.data import prepare
from linscale.data.build import heldout_rule
from linscale.data.sources import open_source


def quiet(message: str) -> None:
    del message


def write(folder, texts) -> Data:
    """A corpus with one file of documents separated by NUL."""
    (folder / "texts").write_bytes("\0".join(texts).encode())
    return Data(source="text", path=str(folder / "texts"), separator="\\0", cache=str(folder / "cache"))


def documents(corpus, stream) -> list[str]:
    tokens = np.asarray(stream.tokens)
    ends = [*stream.starts[1:], len(tokens)]
    return [corpus.tokenizer.decode(tokens[int(a) : int(b)]) for a, b in zip(stream.starts, ends)]


def some_texts(count=300, seed=0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abc dé🙂\n", k=rng.randint(1, 80))) + f"#{number}" for number in range(count)]


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_streams_hold_every_document_once(tmp_path, spec):
    texts = some_texts()
    data = dataclasses.replace(write(tmp_path, texts), tokenizer=spec, heldout_share=0.1)
    corpus = prepare(data, log=quiet)
    train, heldout = (documents(corpus, stream) for stream in (corpus.train, corpus.heldout))
    chosen = heldout_rule(open_source(data), 0.1)
    assert train == [text for number, text in enumerate(texts) if not chosen(number)]
    assert heldout == [text for number, text in enumerate(texts) if chosen(number)]
    assert 10 < len(heldout) < 60
    for stream in (corpus.train, corpus.heldout):
        tokens = np.asarray(stream.tokens)
        assert np.array_equal(np.flatnonzero(tokens == stream.separator_id)[:-1], stream.starts)
        assert tokens[-1] == stream.separator_id
        assert stream.size == len(tokens) == stream.labels + 1
    assert corpus.train.bytes == sum(len(text.encode()) for text in train)
    total = sum(len(text.encode()) for text in heldout)
    assert corpus.bytes_per_token == total / (len(corpus.heldout.tokens) - 1)
    if spec == "bytes":
        assert corpus.bytes_per_token == pytest.approx(total / (total + len(heldout)))
        assert (corpus.vocab_size, corpus.train.dtype) == (257, "uint16")


def test_heldout_takes_whole_documents(tmp_path):
    data = dataclasses.replace(write(tmp_path, ["x" * 99] * 1000), heldout_tokens=250, heldout_share=0.1)
    heldout = prepare(data, log=quiet).heldout
    assert (heldout.documents, heldout.size, heldout.bytes) == (3, 301, 297)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
@pytest.mark.parametrize("tokens", [250, 1000])
def test_a_far_too_long_document_is_cut_and_its_bytes_are_counted(tmp_path, spec, tokens):
    texts = ["é語 and " * 5000, "🙂 then " * 5000]
    data = dataclasses.replace(write(tmp_path, texts), tokenizer=spec, heldout_tokens=tokens)
    corpus = prepare(data, log=quiet)
    (text,) = documents(corpus, corpus.heldout)
    assert any(whole.startswith(text) and len(text) < len(whole) for whole in texts)
    assert corpus.heldout.bytes == len(text.encode())
    assert 0.9 * tokens - 5 < corpus.heldout.size <= tokens
    assert corpus.heldout.tokens[-1] != corpus.heldout.separator_id, "a cut document has no end"


def test_separate_heldout_files(tmp_path):
    data = write(tmp_path, some_texts())
    (tmp_path / "other").write_text("something else\0and more")
    corpus = prepare(dataclasses.replace(data, heldout_path=str(tmp_path / "other")), log=quiet)
    assert documents(corpus, corpus.train) == some_texts()
    assert documents(corpus, corpus.heldout) == ["something else", "and more"]


def test_max_tokens_stops_there(tmp_path):
    data = write(tmp_path, some_texts())
    whole, short = (prepare(dataclasses.replace(data, max_tokens=most), log=quiet) for most in (0, 500))
    assert 490 < short.train.size <= 500 < whole.train.size
    assert np.array_equal(short.train.tokens, whole.train.tokens[: short.train.size])
    assert np.array_equal(short.heldout.tokens, whole.heldout.tokens)
    assert short.fingerprint != whole.fingerprint


@pytest.mark.parametrize("count", [2, 3, 8, 20])
@pytest.mark.parametrize("share", [0.001, 0.5])
def test_small_corpora_fill_both_sides(tmp_path, count, share):
    data = dataclasses.replace(write(tmp_path, [f"document {n}" for n in range(count)]), heldout_share=share)
    corpus = prepare(data, log=quiet)
    train, heldout = (documents(corpus, stream) for stream in (corpus.train, corpus.heldout))
    assert train and heldout and sorted(train + heldout) == sorted(f"document {n}" for n in range(count))


def test_stdlib_default_is_split_by_file_and_cached(tmp_path):
    data = Data(cache=str(tmp_path))
    corpus = prepare(data, vocab_size=264, log=quiet)
    train, heldout = (documents(corpus, stream) for stream in (corpus.train, corpus.heldout))
    assert not set(train) & set(heldout)
    assert corpus.train.size > 5e6 and 65_536 <= corpus.heldout.size < 2 * 65_536
    assert any(text.startswith("# Author: Steven J. Bethard") for text in train + heldout), "argparse is there"
    messages = []
    began = time.perf_counter()
    again = prepare(data, vocab_size=264, log=messages.append)
    assert time.perf_counter() - began < 1 and messages == []
    assert (again.fingerprint, again.folder) == (corpus.fingerprint, corpus.folder)
    assert f"{corpus.train.size:,} tokens" in corpus.summary
    assert f"{corpus.manifest['files']:,} files" in corpus.summary


def test_fingerprint_follows_what_decides_the_content(tmp_path):
    data = write(tmp_path, some_texts())
    variants = [data] + [
        dataclasses.replace(data, **change)
        for change in ({"separator": "#"}, {"tokenizer": "bpe:300"}, {"heldout_tokens": 100}, {"heldout_share": 0.3})
    ]
    prints = [prepare(variant, log=quiet).fingerprint for variant in variants]
    assert len(set(prints)) == len(prints)
    assert prepare(dataclasses.replace(data, workers=2, cache=str(tmp_path / "c2")), log=quiet).fingerprint == prints[0]
    write(tmp_path, some_texts(seed=1))
    assert prepare(data, log=quiet).fingerprint not in prints


def test_not_utf8_is_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("fine")
    messages = []
    corpus = prepare(Data(source="text", path=str(tmp_path / "*.txt"), cache=str(tmp_path / "c")), log=messages.append)
    told = f"not UTF-8: 1 documents in 1 files (bad bytes are read as U+FFFD): {tmp_path / 'a.txt'}"
    assert told in messages and told in corpus.summary
    assert {*documents(corpus, corpus.train), *documents(corpus, corpus.heldout)} == {"caf�", "fine"}


def test_trained_bpe_never_sees_heldout_text(tmp_path):
    data = dataclasses.replace(write(tmp_path, [f"{number}" for number in range(100)]), tokenizer="bpe:400")
    chosen = heldout_rule(open_source(data), data.heldout_share)
    write(tmp_path, ["QQQQZZZZ" * 20 if chosen(number) else "common words" * 5 for number in range(100)])
    corpus = prepare(data, log=quiet)
    assert documents(corpus, corpus.heldout)[0].startswith("QQQQ")
    assert len(corpus.tokenizer.encode("QQQQZZZZ")) == 8 and len(corpus.tokenizer.encode("common words")) <= 2


@pytest.mark.parametrize(
    "content, changes, said",
    [
        (b"", {}, "^config.data.path=.* holds no text: every document is empty"),
        (b" \0\n", {}, "^config.data.path=.* holds no text: every document is empty"),
        (b"only one", {}, "holds one document, too few to hold any out; set config.data.heldout_path"),
        (b"a\0b", {"heldout_share": 0.0}, "config.data.heldout_share is 0"),
        (b"a\0b", {"heldout_path": "EMPTY"}, "^config.data.heldout_path=.*empty' holds no text, so nothing is held"),
        (b"", {"heldout_path": "OTHER"}, "^config.data.path=.* holds no text"),
        (b"a\0b", {"heldout_path": "SAME"}, "which config.data.path matches too"),
        (b"a\0b", {"heldout_split": "test"}, "config.data.heldout_split is 'test', but .* has no splits"),
        (b"a\0b", {"source": "stdlib", "heldout_path": "x"}, "config.data.heldout_path|config.data.path"),
        (b"a\0b", {"source": "tfds", "heldout_split": "train"}, "heldout_split is 'train', the training split itself"),
        (b"a\0b", {"tokenizer": "bpe:100"}, "at least 257"),
        ("語言\0語言".encode(), {"heldout_tokens": 3}, "config.data.heldout_tokens is 3, too few to hold a token"),
    ],
)
def test_bad_input(tmp_path, content, changes, said):
    (tmp_path / "texts").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "other").write_bytes(b"text")
    names = {"EMPTY": tmp_path / "empty", "OTHER": tmp_path / "other", "SAME": tmp_path / "texts"}
    changes = {field: str(names.get(value, value)) if value in names else value for field, value in changes.items()}
    data = Data(source="text", path=str(tmp_path / "texts"), separator="\\0", cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=said) as error:
        prepare(dataclasses.replace(data, **changes), log=quiet)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert not list(tmp_path.glob("cache/*")), "nothing half-done stays"


@pytest.mark.parametrize("spec, least", [("bytes", 257), ("bpe:300", 300)])
def test_vocabulary_smaller_than_the_tokenizers(tmp_path, spec, least):
    data = dataclasses.replace(write(tmp_path, some_texts()), tokenizer=spec)
    for _ in range(2):  # before tokenising, and on the cached corpus
        with pytest.raises(ConfigError, match=rf"^config.model.vocab_size is 256, .* must be at least {least}\.$"):
            prepare(data, vocab_size=256, log=quiet)
        prepare(data, vocab_size=least, log=quiet)
