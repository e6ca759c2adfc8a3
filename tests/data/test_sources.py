"""Documents come out whole, in order, from every kind of file; what is broken is named."""

import bz2
import dataclasses
import gzip
import json
import lzma
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linscale.config import ConfigError, Data
from linscale.data import sources
from linscale.data.sources import Invalid, open_source

TEXTS = ["one\n", "zwei — drei", "\r\nfour\x0c", "🙂" * 100]


def read(data: Data, **kw) -> list[str]:
    return list(open_source(data, **kw).documents())


def text_data(path, **kw) -> Data:
    return Data(source="text", path=str(path), **kw)


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_text_files_in_order_of_their_paths(tmp_path, suffix, opener):
    for number, text in enumerate(TEXTS):
        folder = tmp_path / f"d{number % 2}"
        folder.mkdir(exist_ok=True)
        with opener(folder / f"{number}.txt{suffix}", "wb") as file:
            file.write(text.encode())
    assert read(text_data(tmp_path / "**" / "*.txt*")) == [TEXTS[i] for i in (0, 2, 1, 3)]


@pytest.mark.parametrize("written, mark", [("\\0", "\0"), ("\0", "\0"), ("\\n\\n", "\n\n"), ("<end>", "<end>")])
def test_separator_splits_a_file(tmp_path, written, mark):
    texts = ["one", "zwei\n— drei", "four", "🙂" * 100]
    (tmp_path / "a.txt").write_bytes(mark.join([*texts, "", "  "]).encode())
    assert read(text_data(tmp_path / "a.txt", separator=written)) == texts


@given(
    st.lists(st.sampled_from(["a", "b", "é", "aab", "", "🙂" * 3]), max_size=12), st.sampled_from(["aa", "aba", "é"])
)
def test_separator_across_chunks(tmp_path_factory, pieces, mark):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    text = mark.join(pieces)
    path.write_bytes(text.encode())
    whole = [piece for piece in text.split(mark) if piece]
    original = sources._CHUNK
    try:
        for sources._CHUNK in (1, 2, 3, 7):
            assert list(sources._read_text(str(path), mark, Invalid())) == text.split(mark)
    finally:
        sources._CHUNK = original
    assert read(text_data(path, separator=mark)) == whole


def test_not_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9\0good\0\xff\xfe")
    (tmp_path / "good.txt").write_text("fine")
    invalid = Invalid()
    found = list(open_source(text_data(tmp_path / "*.txt", separator="\\0")).documents(invalid))
    assert found == ["caf�", "good", "��", "fine"]
    assert invalid.names == {str(tmp_path / "bad.txt"): 2} and invalid.documents == 2


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(json.dumps({"body": text, "n": 1}) for text in TEXTS) + '\n\n{"body": "\\ud800!"}\n')
    data = Data(source="jsonl", path=str(path), text_field="body")
    invalid = Invalid()
    assert list(open_source(data).documents(invalid)) == [*TEXTS, "�!"]
    assert invalid.documents == 1


@pytest.mark.parametrize(
    "line, said",
    [("{", "not valid JSON"), ("[1]", "no object"), ('{"a": "x"}', "it has a"), ('{"text": 3}', "text_field")],
)
def test_jsonl_names_the_line(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 2: .*{said}"):
        read(Data(source="jsonl", path=str(tmp_path / "a.jsonl")))


def test_parquet_over_row_groups(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [f"{text} {number}" for number in range(300) for text in TEXTS]
    for name, column in {
        "plain": pa.array(texts),
        "large": pa.array(texts, pa.large_string()),
        "dictionary": pa.array(texts).dictionary_encode(),
        "bytes": pa.array([text.encode() for text in texts]),
        "nulls": pa.array([*texts, None, ""]),
    }.items():
        pq.write_table(pa.table({"n": pa.nulls(len(column)), "body": column}), tmp_path / name, row_group_size=100)
        assert read(Data(source="parquet", path=str(tmp_path / name), text_field="body")) == texts, name
    with pytest.raises(ConfigError, match=r"no column 'text'; set config.data.text_field to one of n, body"):
        read(Data(source="parquet", path=str(tmp_path / "plain")))
    with pytest.raises(ConfigError, match="must name a text column"):
        read(Data(source="parquet", path=str(tmp_path / "plain"), text_field="n"))
    (tmp_path / "not").write_bytes(b"PAR1 is not enough")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        read(Data(source="parquet", path=str(tmp_path / "not")))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set of 20 and 5 texts, written by tfds itself as array_record, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "test": self._generate_examples(5)}

        def _generate_examples(self, count):
            for number in range(count):
                yield number, {"text": f"Text №{number} of {count}", "n": number}

    folder = tmp_path_factory.mktemp("tfds")
    TinyTexts(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds(tfds_folder):
    data = Data(source="tfds", path="tiny_texts", data_dir=tfds_folder, heldout_split="test")
    assert sorted(read(data)) == sorted(f"Text №{number} of 20" for number in range(20))
    assert read(data) == read(data)
    assert sorted(read(data, heldout=True)) == sorted(f"Text №{number} of 5" for number in range(5))
    head, tail = (read(dataclasses.replace(data, split=split)) for split in ("train[:50%]", "train[50%:]"))
    assert len(head) == 10 and [*head, *tail] == read(data)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"path": "not_there"}, "'not_there', split 'train', which cannot be opened"),
        ({"split": "dev"}, "split 'dev', which cannot be opened .* Unknown split"),
        ({"text_field": "n"}, "text_field is 'n', no text field .* it has .*text"),
        ({"text_field": "body"}, "text_field is 'body', no text field"),
    ],
)
def test_tfds_says_what_is_missing(tfds_folder, changes, said):
    data = Data(source="tfds", path="tiny_texts", data_dir=tfds_folder)
    with pytest.raises(ConfigError, match=said) as error:
        read(dataclasses.replace(data, **changes))
    assert "\n" not in str(error.value)


def test_stdlib_is_python_text_without_tests():
    source = open_source(Data())
    assert len(source.files) > 300
    names = [path.rsplit("/", 1)[-1] for path in source.files]
    assert {"argparse.py", "json"} & set(names) and all(name.endswith(".py") for name in names)
    assert not any(part in path for path in source.files for part in ("site-packages", "/test/", "/tests/"))
    first = next(source.documents())
    assert first == pathlib.Path(source.files[0]).read_bytes().decode()
    assert open_source(Data()).identity == source.identity


@pytest.mark.parametrize(
    "path, said",
    [
        ("none.txt", "none.txt', which does not exist"),
        ("*.none", "matches no file"),
        (".", "a folder; give a pattern"),
        ("a.zst", "an archive"),
        ("broken.gz", "broken.gz', which cannot be read"),
        ("short.bz2", "short.bz2', which cannot be read"),
    ],
)
def test_bad_paths(tmp_path, path, said):
    (tmp_path / "a.zst").write_bytes(b"x")
    (tmp_path / "broken.gz").write_bytes(b"this is no gzip")
    (tmp_path / "short.bz2").write_bytes(bz2.compress(b"x" * 1000)[:-10])
    with pytest.raises(ConfigError, match=f"^config.data.path.*{said}"):
        read(text_data(tmp_path / path))
    (tmp_path / "good").write_text("x")
    with pytest.raises(ConfigError, match=f"^config.data.heldout_path.*{said}"):
        read(text_data(tmp_path / "good", heldout_path=str(tmp_path / path)), heldout=True)


def test_identity_follows_content_not_place(tmp_path):
    def identity(folder, text):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_text(text)
        return open_source(text_data(tmp_path / folder / "*.txt")).identity

    assert identity("here", "abc") == identity("there", "abc") != identity("here", "abd")
