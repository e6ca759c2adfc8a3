"""Corpora that cannot be read or do not hold what the config says, in every format; also tokenizer files."""

import bz2
import functools
import gzip
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from judging import Case, train

DOCUMENTS = [f"document {i}: " + " ".join(str((i * 37 + j * j) % 101) for j in range(40)) for i in range(30)]
TEXT = "\n\n".join(DOCUMENTS).encode()
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


@functools.cache
def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": DOCUMENTS, "id": list(range(len(DOCUMENTS)))})
    pq.write_table(
        table, buffer := pa.BufferOutputStream(), row_group_size=10, compression="none", write_page_checksum=True
    )
    return buffer.getvalue().to_pybytes()


@functools.cache
def tfds_folder() -> Path:
    """A data set of array_record files, made by tfds itself; copied for each case."""
    import atexit

    import numpy as np
    import tensorflow_datasets as tfds

    class MalformedTexts(
        tfds.core.GeneratorBasedBuilder, skip_registration=True
    ):  # read as data that came from elsewhere
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"text": text, "n": i}) for i, text in enumerate(DOCUMENTS))

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    MalformedTexts(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def own(folder: Path, source: str, files: dict[str, bytes], pattern: str, *options: str) -> list[str]:
    """A run on files in folder/own."""
    (folder / "own").mkdir()
    for name, content in files.items():
        path = folder / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    place = (f"--config.data.source={source}", f"--config.data.path={folder / 'own' / pattern}")
    return train(folder, *place, *options, texts=False)


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


# source, files, pattern, options -> what the sentence must hold
FILES = {
    "text: empty file": ("text", {"a.txt": b""}, "a.txt", (), ("config.data.path", "empty")),
    "text: only whitespace": ("text", {"a.txt": b" \n\t\n"}, "*.txt", (), ("config.data.path", "empty")),
    "text: one document": ("text", {"a.txt": TEXT}, "a.txt", (), ("one document", "config.data.separator")),
    "text: absent": ("text", {}, "none.txt", (), ("config.data.path", "none.txt", "does not exist")),
    "text: pattern without a match": ("text", {"a.txt": TEXT}, "*.md", (), ("config.data.path", "*.md", "no file")),
    "text: a folder": ("text", {"a/a.txt": TEXT}, "a", (), ("config.data.path", "a folder")),
    "text: a folder of folders": ("text", {"a/b/a.txt": TEXT}, "*", (), ("config.data.path", "matches no file")),
    "text: truncated gz": ("text", {"a.gz": gzip.compress(TEXT)[:-20]}, "a.gz", (), ("config.data.path", "a.gz")),
    "text: gz cut in its header": ("text", {"a.gz": gzip.compress(TEXT)[:6]}, "*.gz", (), ("a.gz", "cannot be read")),
    "text: gz without content": ("text", {"a.gz": b""}, "*.gz", (), ("a.gz",)),
    "text: flipped gz": ("text", {"a.gz": flip(gzip.compress(TEXT), 200)}, "*.gz", (), ("a.gz", "cannot be read")),
    "text: gz with a wrong sum": ("text", {"a.gz": flip(gzip.compress(TEXT), -7)}, "*.gz", (), ("a.gz", "CRC")),
    "text: rubbish after gz": ("text", {"a.gz": gzip.compress(TEXT) + b"xyz"}, "*.gz", (), ("a.gz", "cannot be read")),
    "text: not gz": ("text", {"a.gz": TEXT}, "*.gz", (), ("a.gz", "cannot be read")),
    "text: truncated bz2": ("text", {"a.bz2": bz2.compress(TEXT)[:-20]}, "*", (), ("a.bz2", "cannot be read")),
    "text: flipped bz2": ("text", {"a.bz2": flip(bz2.compress(TEXT), 100)}, "*", (), ("a.bz2", "cannot be read")),
    "text: truncated xz": ("text", {"a.xz": lzma.compress(TEXT)[:-20]}, "*", (), ("a.xz", "cannot be read")),
    "text: flipped xz": ("text", {"a.xz": flip(lzma.compress(TEXT), 100)}, "*", (), ("a.xz", "cannot be read")),
    "text: zst": ("text", {"a.txt.zst": b"\x28\xb5\x2f\xfd" + TEXT}, "*", (), ("a.txt.zst", ".gz, .bz2 or .xz")),
    "text: zip": ("text", {"a.zip": b"PK\3\4" + TEXT}, "*", (), ("a.zip", "archive")),
    "text: tar": ("text", {"a.tar": TEXT}, "*", (), ("a.tar", "archive")),
    "text: tar.gz": ("text", {"a.tar.gz": gzip.compress(TEXT)}, "*", (), ("a.tar.gz", "archive")),
    "text: held-out files are training files": (
        "text", {"a.txt": TEXT, "b.txt": TEXT}, "*.txt", ("--config.data.heldout_path=../own/b.txt",),
        ("config.data.heldout_path", "b.txt"),
    ),
    "text: held-out files absent": (
        "text", {"a.txt": TEXT}, "*.txt", ("--config.data.heldout_path=../own/b.txt",),
        ("config.data.heldout_path", "b.txt", "does not exist"),
    ),
    "text: held-out files empty": (
        "text", {"a.txt": TEXT, "b.md": b"\n"}, "*.txt", ("--config.data.heldout_path=../own/b.md",),
        ("config.data.heldout_path", "b.md", "no text"),
    ),
    "text: too short for a batch": (
        "text", {"a.txt": b"one", "b.txt": b"two"}, "*.txt", (), ("config.train.batch", "tokens a step"),
    ),
    "text: separator that leaves one document": (
        "text", {"a.txt": TEXT}, "a.txt", ("--config.data.separator=@@",), ("one document",),
    ),
    "jsonl: empty": ("jsonl", {"a.jsonl": b""}, "*", (), ("config.data.path", "empty")),
    "jsonl: not JSON": ("jsonl", {"a.jsonl": JSONL + b"{text: 1}\n"}, "*", (), ("a.jsonl", "line 31", "JSON")),
    "jsonl: truncated": ("jsonl", {"a.jsonl": JSONL[:-9]}, "*", (), ("a.jsonl", "line 30", "JSON")),
    "jsonl: field absent": (
        "jsonl", {"a.jsonl": JSONL + b'{"body": "x"}\n'}, "*", (), ("a.jsonl", "line 31", "'text'", "body")
    ),
    "jsonl: field of another name": (
        "jsonl", {"a.jsonl": JSONL}, "*", ("--config.data.text_field=body",), ("line 1", "'body'", "id, text")
    ),
    "jsonl: field null": ("jsonl", {"a.jsonl": b'{"text": null}\n'}, "*", (), ("line 1", "'text'")),
    "jsonl: field a number": ("jsonl", {"a.jsonl": b'{"text": 3}\n'}, "*", (), ("line 1", "'text'")),
    "jsonl: field a list": ("jsonl", {"a.jsonl": b'{"text": ["a"]}\n'}, "*", (), ("line 1", "'text'")),
    "jsonl: no object": ("jsonl", {"a.jsonl": b'["text"]\n'}, "*", (), ("line 1", "no object")),
    "jsonl: a number": ("jsonl", {"a.jsonl": b"3\n"}, "*", (), ("line 1", "no object")),
    "jsonl: nested too deep": ("jsonl", {"a.jsonl": b"[" * 100_000}, "*", (), ("a.jsonl", "line 1", "JSON")),
    "jsonl: a number of 9000 digits": ("jsonl", {"a.jsonl": b'{"n": ' + b"9" * 9000 + b"}"}, "*", (), ("line 1",)),
    "jsonl: a whole array": ("jsonl", {"a.jsonl": b'[{"text": "a"},\n{"text": "b"}]\n'}, "*", (), ("line 1", "JSON")),
    "jsonl: pretty-printed": ("jsonl", {"a.jsonl": b'{\n "text": "a"\n}\n'}, "*", (), ("line 1", "JSON")),
    "jsonl: binary": ("jsonl", {"a.jsonl": bytes(range(256))}, "*", (), ("line 1", "JSON")),
    "jsonl: UTF-16": ("jsonl", {"a.jsonl": JSONL.decode().encode("utf-16")}, "*", (), ("line 1", "JSON")),
    "jsonl: truncated gz": ("jsonl", {"a.jsonl.gz": gzip.compress(JSONL)[:-9]}, "*", (), ("a.jsonl.gz",)),
    "jsonl: zst": ("jsonl", {"a.jsonl.zst": b"\x28\xb5\x2f\xfd"}, "*", (), ("a.jsonl.zst", ".gz")),
    "jsonl: a field with brackets": (
        "jsonl", {"a.jsonl": b'{"x\\u001b[31m": 1}\n'}, "*", (), ("line 1", "'text'")
    ),
    "parquet: empty file": ("parquet", {"a.parquet": b""}, "*", (), ("a.parquet", "parquet")),
    "parquet: text": ("parquet", {"a.parquet": TEXT}, "*", (), ("a.parquet", "parquet")),
    "parquet: truncated": ("parquet", {"a.parquet": lambda: parquet()[:-100]}, "*", (), ("a.parquet", "parquet")),
    "parquet: only the end": ("parquet", {"a.parquet": lambda: parquet()[-300:]}, "*", (), ("a.parquet", "parquet")),
    "parquet: flipped page": (
        "parquet", {"a.parquet": lambda: flip(parquet(), 500)}, "*", (), ("a.parquet", "parquet", "checksum")
    ),
    "parquet: zeros inside": (
        "parquet", {"a.parquet": lambda: parquet()[:100] + bytes(2000) + parquet()[2100:]}, "*", (), ("a.parquet",)
    ),
    "parquet: one good file, one broken": (
        "parquet", {"a.parquet": parquet, "b.parquet": lambda: parquet()[:900]}, "*", (), ("b.parquet", "parquet")
    ),
    "parquet: no such column": (
        "parquet", {"a.parquet": parquet}, "*", ("--config.data.text_field=body",), ("'body'", "text, id")
    ),
    "parquet: column of numbers": (
        "parquet", {"a.parquet": parquet}, "*", ("--config.data.text_field=id",), ("'id'", "int64")
    ),
}  # fmt: skip


def _tfds(damage: Callable[[Path], None], *options: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        shutil.copytree(tfds_folder(), folder / "data")
        damage(folder / "data" / "malformed_texts" / "1.0.0")
        named = (
            "--config.data.source=tfds",
            "--config.data.path=malformed_texts",
            f"--config.data.data_dir={folder}/data",
        )
        return train(folder, *named, *options, texts=False)

    return make


def _record(folder: Path) -> Path:
    return next(folder.glob("*.array_record*"))


def _cut(folder: Path) -> None:
    os.truncate(_record(folder), _record(folder).stat().st_size // 2)


def _flipped(folder: Path) -> None:
    content = _record(folder).read_bytes()
    _record(folder).write_bytes(flip(content, 3000))  # its records end at 5941, the rest is padding


def _features(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "features.json").write_text(text)


FOREIGN = json.dumps({"pythonClassName": "foreign_module.Thing", "text": {}})
LEGACY = json.dumps({"type": "foreign_module.Thing", "content": {}})
TFDS = {
    "truncated array_record": (_tfds(_cut), ("malformed_texts", "0 records instead of 30")),
    "flipped array_record": (_tfds(_flipped), ("malformed_texts",)),
    "empty array_record": (_tfds(lambda folder: os.truncate(_record(folder), 0)), ("malformed_texts",)),
    "array_record absent": (_tfds(lambda folder: _record(folder).unlink()), ("malformed_texts",)),
    "dataset_info.json absent": (_tfds(lambda f: (f / "dataset_info.json").unlink()), ("malformed_texts",)),
    "dataset_info.json broken": (_tfds(lambda f: (f / "dataset_info.json").write_text("{")), ("malformed_texts",)),
    "features.json absent": (_tfds(lambda f: (f / "features.json").unlink()), ("malformed_texts",)),
    "features.json broken": (_tfds(_features("{")), ("malformed_texts", "line 1")),
    "features.json that names other code": (_tfds(_features(FOREIGN)), ("features.json", "foreign_module.Thing")),
    "features.json that names other code, older form": (_tfds(_features(LEGACY)), ("foreign_module.Thing",)),
    "no such split": (_tfds(lambda f: None, "--config.data.split=dev"), ("malformed_texts", "'dev'")),
    "no such field": (_tfds(lambda f: None, "--config.data.text_field=body"), ("config.data.text_field", "'body'")),
    "field of numbers": (_tfds(lambda f: None, "--config.data.text_field=n"), ("config.data.text_field", "'n'")),
    "no such data set": (_tfds(lambda f: None, "--config.data.path=not_there"), ("config.data.path", "'not_there'")),
    "name with a namespace": (_tfds(lambda f: None, "--config.data.path=huggingface:glue"), ("config.data.path",)),
    "name that is a path": (_tfds(lambda f: None, "--config.data.path=../../etc"), ("config.data.path", "../../etc")),
    "data_dir absent": (_tfds(lambda f: None, "--config.data.data_dir=/nowhere/at/all"), ("/nowhere/at/all",)),
}


def _loop(folder: Path) -> list[str]:
    argv = own(folder, "text", {"a.txt": TEXT}, "*.txt")
    (folder / "own" / "b.txt").symlink_to("b.txt")
    return argv


def _dangling(folder: Path) -> list[str]:
    argv = own(folder, "text", {"a.txt": TEXT}, "*.txt")
    (folder / "own" / "b.txt").symlink_to("gone.txt")
    return argv


def _pipe(folder: Path) -> list[str]:
    argv = own(folder, "text", {"a.txt": TEXT}, "*.txt")
    os.mkfifo(folder / "own" / "b.txt")
    return argv


def _through_a_file(folder: Path) -> list[str]:
    return own(folder, "text", {"a.txt": TEXT}, "a.txt/b.txt")


def _cache_is_a_file(folder: Path) -> list[str]:
    (folder / "cache").write_text("mine")
    return train(folder)


def _output_is_a_file(folder: Path) -> list[str]:
    (folder / "runs").write_text("mine")
    return train(folder)


PLACES = {
    "text: a link to itself": (_loop, ("config.data.path", "b.txt")),
    "text: a link to nothing": (_dangling, ("config.data.path", "b.txt")),
    "text: a pipe": (_pipe, ("config.data.path", "b.txt")),
    "text: a path through a file": (_through_a_file, ("config.data.path", "a.txt/b.txt")),
    "cache: a file where the folder should be": (_cache_is_a_file, ("config.data.cache", "cache")),
    "output: a file where the folder should be": (_output_is_a_file, ("config.output", "runs")),
}

HF = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}).encode()
RANKS = [b"%s %d" % (__import__("base64").b64encode(bytes([i])), i) for i in range(256)]
# tokenizer, files -> what the sentence must hold beside config.data.tokenizer
TOKENIZERS = {
    "hf: absent": ("hf:none.json", {}, ("none.json", "no file")),
    "hf: a folder without one": ("hf:folder", {"folder/x": b""}, ("tokenizer.json", "no file")),
    "hf: empty": ("hf:t.json", {"t.json": b""}, ("t.json", "no tokenizer.json")),
    "hf: not JSON": ("hf:t.json", {"t.json": b"{"}, ("t.json", "no tokenizer.json")),
    "hf: another JSON": ("hf:t.json", {"t.json": b'{"a": 1}'}, ("t.json", "no tokenizer.json")),
    "hf: truncated": ("hf:t.json", {"t.json": HF[:-9]}, ("t.json", "no tokenizer.json")),
    "hf: binary": ("hf:t.json", {"t.json": bytes(range(256))}, ("t.json", "no tokenizer.json")),
    "hf: no separator": ("hf:t.json", {"t.json": HF}, ("t.json", "no token to separate", "</s>")),
    "hf: broken tokenizer_config": ("hf:t.json", {"t.json": HF, "tokenizer_config.json": b"["}, ("tokenizer_config",)),
    "hf: tokenizer_config a list": ("hf:t.json", {"t.json": HF, "tokenizer_config.json": b"[]"}, ("tokenizer_config",)),
    "hf: eos_token a number": (
        "hf:t.json", {"t.json": HF, "tokenizer_config.json": b'{"eos_token": 3}'}, ("tokenizer_config", "eos_token"),
    ),
    "hf: eos_token a list": (
        "hf:t.json", {"t.json": HF, "tokenizer_config.json": b'{"eos_token": []}'}, ("tokenizer_config", "eos_token"),
    ),
    "sentencepiece: absent": ("sentencepiece:none.model", {}, ("none.model", "no file")),
    "sentencepiece: a folder": ("sentencepiece:folder", {"folder/x": b""}, ("folder", "no file")),
    "sentencepiece: empty": ("sentencepiece:t.model", {"t.model": b""}, ("t.model", "no sentencepiece model")),
    "sentencepiece: text": ("sentencepiece:t.model", {"t.model": TEXT}, ("t.model", "no sentencepiece model")),
    "sentencepiece: binary": ("sentencepiece:t.model", {"t.model": bytes(range(256))}, ("t.model", "no sentencepiece")),
    "tiktoken: unknown name": ("tiktoken:gpt9", {}, ("gpt9", "cl100k_base")),
    "tiktoken: absent": ("tiktoken:none.tiktoken", {}, ("none.tiktoken", "no file")),
    "tiktoken: empty": ("tiktoken:t.tiktoken", {"t.tiktoken": b""}, ("t.tiktoken", "no rank")),
    "tiktoken: text": ("tiktoken:t.tiktoken", {"t.tiktoken": TEXT}, ("t.tiktoken", "no tiktoken rank file")),
    "tiktoken: a byte without a rank": (
        "tiktoken:t.tiktoken", {"t.tiktoken": b"\n".join(RANKS[1:])}, ("t.tiktoken", "byte 0 has no rank"),
    ),
    "tiktoken: a rank twice": (
        "tiktoken:t.tiktoken", {"t.tiktoken": b"\n".join([*RANKS, b"YWI= 7"])}, ("t.tiktoken", "rank 7"),
    ),
    "tiktoken: a negative rank": (
        "tiktoken:t.tiktoken", {"t.tiktoken": b"\n".join([*RANKS, b"YWI= -7"])}, ("t.tiktoken", "-7"),
    ),
    "tiktoken: an enormous rank": (
        "tiktoken:t.tiktoken", {"t.tiktoken": b"\n".join([*RANKS, b"YWI= 99999999999999"])}, ("t.tiktoken", "99999999999999"),
    ),
}  # fmt: skip


def _tokenizer(spec: str, files: dict[str, bytes]):
    def make(folder: Path) -> list[str]:
        (folder / "own").mkdir()
        for name, content in files.items():
            (folder / "own" / name).parent.mkdir(exist_ok=True)
            (folder / "own" / name).write_bytes(content)
        kind, _, name = spec.partition(":")
        path = name if name == "gpt9" else folder / "own" / name
        return train(folder, f"--config.data.tokenizer={kind}:{path}")

    return make


def _files(source, files, pattern, options):
    return lambda folder: own(
        folder, source, {name: c() if callable(c) else c for name, c in files.items()}, pattern, *options
    )


def cases() -> list[Case]:
    found = [
        Case("corpus", name, _files(source, files, pattern, options), says)
        for name, (source, files, pattern, options, says) in FILES.items()
    ]
    found += [Case("corpus", f"tfds: {name}", make, says) for name, (make, says) in TFDS.items()]
    found += [Case("corpus", name, make, says) for name, (make, says) in PLACES.items()]
    found += [
        Case("tokenizer", name, _tokenizer(spec, files), ("config.data.tokenizer", *says))
        for name, (spec, files, says) in TOKENIZERS.items()
    ]
    return found
