"""Documents, one str at a time, from the standard library, text, jsonl and parquet files, and tfds.

`open_source` looks at what there is (names, sizes) and raises ConfigError before any work; `Source.read` then streams.
Nothing larger than one document (a parquet batch of 256) is held in memory. Bytes that are not UTF-8 become U+FFFD and
are counted by file in `Invalid`; they never stop a run.
"""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator

from linscale.config import ConfigError, Data

SMALL = 32 << 20  # bytes; up to this size files are identified by their content, above it by path, size and time
_CHUNK = 1 << 20  # bytes read at a time
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_NOT_TEXT = (".zst", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what the openers raise on missing or damaged files
_TFDS_NAME = r"\w+(/[\w.-]+)?(:(\d+|\*)\.(\d+|\*)\.(\d+|\*))?"
# Tests hold data rather than prose or code, some of it deliberately broken; the others are not the library's own text.
_STDLIB_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}


@dataclasses.dataclass
class Invalid:
    """Documents that are not UTF-8, met in one pass over a source."""

    documents: int = 0
    names: dict[str, int] = dataclasses.field(default_factory=dict)  # file: number of such documents

    def decode(self, raw: bytes, name: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._count(name)
            return raw.decode(errors="replace")

    def clean(self, text: str, name: str) -> str:
        """A str that UTF-8 can hold: JSON may carry lone surrogates."""
        try:
            text.encode()
            return text
        except UnicodeEncodeError:
            self._count(name)
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _count(self, name: str) -> None:
        self.documents += 1
        self.names[name] = self.names.get(name, 0) + 1


@dataclasses.dataclass(frozen=True)
class Source:
    what: str  # for messages, e.g. "config.data.path='*.txt'"
    identity: tuple  # JSON-able; equal when the documents are
    files: tuple[str, ...]
    read: Callable[[Invalid], Iterator[str]]

    def documents(self, invalid: Invalid | None = None) -> Iterator[str]:
        """Every document that is not just whitespace, in an order that never changes."""
        for text in self.read(invalid if invalid is not None else Invalid()):
            if text and not text.isspace():
                yield text


def open_source(data: Data, heldout: bool = False) -> Source:
    """The training (or the separate held-out) documents of `data`. Raises ConfigError: nothing there, unreadable."""
    if data.source == "tfds":
        return _tfds(data, heldout)
    if data.source == "stdlib":
        return _stdlib()
    field = "config.data.heldout_path" if heldout else "config.data.path"
    pattern = data.heldout_path if heldout else data.path
    files = _matches(field, pattern)
    what = f"{field}={pattern!r}"
    for path in files:
        if data.source != "parquet" and path.endswith(_NOT_TEXT):
            raise ConfigError(
                f"{what} matches {path!r}, which is an archive; unpack it, or pack it as .gz, .bz2 or .xz."
            )
    readers = {
        "text": lambda path, invalid: _read_text(path, data.separator, invalid),
        "jsonl": lambda path, invalid: _read_jsonl(path, data.text_field, invalid),
        "parquet": lambda path, invalid: _read_parquet(path, data.text_field, invalid),
    }

    def read(invalid: Invalid) -> Iterator[str]:
        for path in files:
            yield from _guarded(field, path, readers[data.source](path, invalid))

    settings = (data.separator,) if data.source == "text" else (data.text_field,)
    return Source(what, (data.source, *settings, _identity(field, files)), files, read)


def _guarded(field: str, path: str, documents: Iterator[str]) -> Iterator[str]:
    """Reading errors as ConfigErrors, so that an OSError further up can only come from writing the cache."""
    try:
        yield from documents
    except _BROKEN as error:
        raise ConfigError(f"{field} matches {path!r}, which cannot be read: {error}; repair or remove it.") from error


def _matches(field: str, pattern: str) -> tuple[str, ...]:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise ConfigError(f"{field} is {pattern!r}, a folder; give a pattern of files such as '{pattern}/**/*'.")
    _check_folders(field, pattern)
    found = sorted(glob.glob(pattern, recursive=True))
    files = tuple(path for path in found if os.path.isfile(path))
    if odd := [path for path in found if path not in set(files) and not os.path.isdir(path)]:
        raise ConfigError(
            f"{field} matches {odd[0]!r}, which is no file that can be read (a link to nothing, or a device); remove it, "
            "or choose a pattern without it."
        )
    if not files and not glob.has_magic(pattern):
        raise ConfigError(f"{field} is {pattern!r}, which does not exist (from {os.getcwd()}); correct the path.")
    if not files:
        raise ConfigError(
            f"{field} is {pattern!r}, which matches no file (from {os.getcwd()}); correct it ('**' goes into folders)."
        )
    return files


def _check_folders(field: str, pattern: str) -> None:
    """ConfigError for a folder that the pattern goes through and that cannot be listed: glob passes over it silently."""
    parts = pattern.split(os.sep)
    for i, part in enumerate(parts):
        if not glob.has_magic(part):
            continue
        before = os.sep.join(parts[:i])
        folders = glob.glob(before, recursive=True) if before else [os.sep if i else "."]
        if part == "**":
            folders += glob.glob(os.sep.join([*parts[:i], "**", ""]), recursive=True)
        for folder in folders:
            try:
                with os.scandir(folder):
                    pass
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise ConfigError(
                    f"{field} goes through {folder!r}, which cannot be read: {error.strerror}; give access, or choose a "
                    "pattern without it."
                ) from error


def _identity(field: str, files: tuple[str, ...]) -> list:
    """Suffix and content of small corpora, so that a copy or a fresh check-out is the same; stat of large ones."""
    path = ""
    try:
        stats = [os.stat(path := file) for file in files]
        if sum(stat.st_size for stat in stats) > SMALL:
            return [[os.path.abspath(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats)]
        digest = hashlib.sha256()
        for path, stat in zip(files, stats):
            digest.update(f"{os.path.splitext(path)[1]} {stat.st_size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read())
        return ["sha256", len(files), digest.hexdigest()]
    except OSError as error:
        raise ConfigError(f"{field} matches {path!r}, which cannot be read: {error.strerror}.") from error


def _stdlib() -> Source:
    """The .py files of the running Python's standard library, without tests and files made when Python was built."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _STDLIB_SKIP and not name.startswith("config-")]
        found += [
            os.path.join(folder, name)
            for name in files
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    files = tuple(sorted(found, key=lambda path: os.path.relpath(path, root).replace(os.sep, "/")))
    what = "config.data.source='stdlib'"
    if not files:
        raise ConfigError(
            f"{what} finds no .py file under {root!r}; use config.data.source='text' and a config.data.path."
        )

    def read(invalid: Invalid) -> Iterator[str]:
        for path in files:
            yield from _guarded("config.data.source='stdlib'", path, _read_text(path, "", invalid))

    version = ".".join(map(str, sys.version_info[:3]))
    return Source(what, ("stdlib", version, _identity(what, files)), files, read)


def _open(path: str):
    if path.endswith(tuple(_OPENERS)) and not os.path.getsize(path):
        raise EOFError("it has 0 bytes, and even nothing is some bytes when packed")
    return _OPENERS.get(os.path.splitext(path)[1], open)(path, "rb")


def _read_text(path: str, separator: str, invalid: Invalid) -> Iterator[str]:
    # Splitting bytes is splitting text: UTF-8 never hides one character inside another.
    mark = separator.replace("\\0", "\0").replace("\\n", "\n").encode()
    with _open(path) as file:
        if not mark:
            yield invalid.decode(file.read(), path)
            return
        parts, tail = [], b""  # chunks of the open document; bytes of the last chunk that may begin a mark
        while chunk := file.read(_CHUNK):
            *whole, rest = (tail + chunk).split(mark)
            for piece in whole:
                yield invalid.decode(b"".join([*parts, piece]), path)
                parts = []
            keep = min(len(mark) - 1, len(rest))
            parts.append(rest[: len(rest) - keep])
            tail = rest[len(rest) - keep :]
        yield invalid.decode(b"".join([*parts, tail]), path)


def _read_jsonl(path: str, field: str, invalid: Invalid) -> Iterator[str]:
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                record = json.loads(invalid.decode(raw, path).removeprefix("\ufeff"))
            except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
                raise ConfigError(f"{path}, line {number}: not valid JSON ({error}); each line must be one.") from error
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                has = f"it has {', '.join(record) or 'no fields'}" if isinstance(record, dict) else "it is no object"
                raise ConfigError(
                    f"{path}, line {number}: no text in the field {field!r} ({has}); set config.data.text_field."
                )
            yield invalid.clean(record[field], path)


def _read_parquet(path: str, field: str, invalid: Invalid) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("config.data.source is 'parquet', which needs pyarrow; pip install pyarrow.") from error
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if field not in file.schema_arrow.names:
                raise ConfigError(
                    f"{path}: no column {field!r}; set config.data.text_field to one of "
                    f"{', '.join(file.schema_arrow.names)}."
                )
            for batch in file.iter_batches(batch_size=256, columns=[field]):  # walks the row groups
                column = batch.column(0)
                column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
                if column.type not in (
                    pa.string(),
                    pa.large_string(),
                    pa.string_view(),
                    pa.binary(),
                    pa.large_binary(),
                ):
                    raise ConfigError(
                        f"{path}: column {field!r} holds {column.type}; config.data.text_field must name a text column."
                    )
                for raw in column.cast(pa.large_binary()).to_pylist():  # not as text: pyarrow raises on invalid UTF-8
                    if raw is not None:
                        yield invalid.decode(raw, path)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read as parquet: {reason}; config.data.path must match such.") from error


@contextlib.contextmanager
def _own_features(connector) -> Iterator[None]:
    """tfds imports whatever module features.json names a class of; within this, only modules of its own."""
    before = connector.__dict__["cls_from_name"]
    find = connector.cls_from_name

    def checked(name: str):
        if not name.startswith("tensorflow_datasets."):
            raise ValueError(f"features.json names the class {name!r}, and only classes of tfds itself are imported")
        return find(name)

    connector.cls_from_name = staticmethod(checked)
    try:
        yield
    finally:
        connector.cls_from_name = before


def _check_counts(info, paths: set[str]) -> None:
    """ValueError for a file without all its records: the reader gives empty ones for what a truncated file lacks."""
    from array_record.python import array_record_module

    for split in info.splits.values():
        for path, expected in zip(map(str, split.filepaths), split.shard_lengths):
            if path not in paths:
                continue
            found = array_record_module.ArrayRecordReader(path).num_records() if os.stat(path).st_size else 0
            if found != expected:
                raise ValueError(f"{path} has {found} records instead of {expected}")


def _tfds(data: Data, heldout: bool) -> Source:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ConfigError(
            "config.data.source is 'tfds', which needs tensorflow-datasets and array_record; pip install both."
        ) from error
    name = (heldout and data.heldout_path) or data.path
    split = (heldout and data.heldout_split) or data.split
    what = f"tfds data set {name!r}, split {split!r}"
    where = data.data_dir or "the library's default folder"
    if not re.fullmatch(_TFDS_NAME, name):
        raise ConfigError(
            f"config.data.path is {name!r}; for config.data.source='tfds' it must be NAME, NAME/CONFIG or "
            "NAME/CONFIG:1.0.0, without a namespace, as the code of a community's data set is not run here."
        )
    try:
        with _own_features(tfds.features.FeatureConnector):
            builder = tfds.builder(name, data_dir=os.path.expanduser(data.data_dir) or None)
            records = builder.as_data_source(split=split)
            info = builder.info.splits[split]
        paths = tuple(str(path) for path in info.filepaths)
        _check_counts(builder.info, set(paths))
    except Exception as error:  # tfds raises AssertionError, ValueError, NotImplementedError, ... for missing data
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"config.data.path names the {what}, which cannot be opened from config.data.data_dir ({where}) as "
            f"array_record files: {reason.rstrip('.')}; prepare it with tfds, file_format='array_record'."
        ) from error

    def read(invalid: Invalid) -> Iterator[str]:
        for index in range(len(records)):
            try:
                record = records[index]
            except Exception as error:  # RuntimeError, IndexError, DecodeError, ... for damaged files
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(
                    f"config.data.path names the {what}, whose record {index} cannot be read from array_record files in "
                    f"{os.path.dirname(paths[0])}: {reason.rstrip('.')}; prepare it again."
                ) from error
            value = record.get(data.text_field) if isinstance(record, dict) else None
            if not isinstance(value, str | bytes):
                has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ConfigError(
                    f"config.data.text_field is {data.text_field!r}, no text field of the {what}; it has {has}."
                )
            yield invalid.decode(value, what) if isinstance(value, bytes) else invalid.clean(value, what)

    files = _identity("config.data.path", paths)
    identity = ("tfds", builder.info.full_name, split, len(records), data.text_field, files)
    return Source(what, identity, paths, lambda invalid: _guarded("config.data.path", what, read(invalid)))
