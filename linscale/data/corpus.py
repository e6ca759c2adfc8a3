"""A corpus tokenised once: two memory-mapped streams of tokens, train and held-out, in a cache folder.

A stream is `separator tokens separator tokens ... separator`: every document follows its separator, and a last one
closes the stream, so that the label of each document's last token is a separator. Where a limit cuts a document
(heldout_tokens, max_tokens), no separator follows it, as the document did not end there.

A corpus folder holds train.tokens, heldout.tokens (uint16, or uint32 above 65,536 entries), train.starts,
heldout.starts (uint64, where each document's separator stands), manifest.json, and tokenizer.json for a bpe. Its
name is a fingerprint of all that decides its content.
"""

import dataclasses
import errno
import functools
import os
from collections.abc import Callable

import numpy as np

from linscale.config import ConfigError, Data
from linscale.data import cache, tokenizers
from linscale.data.build import FORMAT, build, check_vocabulary, fingerprint, invalid_sentence
from linscale.data.sources import open_source


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """One stream on disk. Picklable: the memory maps are opened where they are used."""

    path: str  # without the suffixes .tokens and .starts
    dtype: str
    size: int  # tokens, separators included
    documents: int
    bytes: int  # of UTF-8 text in the documents, as far as the stream holds them
    separator_id: int

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """dtype [size], read-only."""
        return np.memmap(f"{self.path}.tokens", self.dtype, "r", shape=(self.size,))

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """uint64 [documents]: the index in `tokens` of each document's separator."""
        return np.memmap(f"{self.path}.starts", np.uint64, "r", shape=(self.documents,))

    @property
    def labels(self) -> int:
        """Tokens that are predicted: all but the first."""
        return self.size - 1

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Corpus:
    folder: str
    manifest: dict

    def _stream(self, name: str) -> TokenStream:
        m = self.manifest
        path = os.path.join(self.folder, name)
        return TokenStream(path, m["dtype"], separator_id=m["separator_id"], **m[name])

    @functools.cached_property
    def train(self) -> TokenStream:
        return self._stream("train")

    @functools.cached_property
    def heldout(self) -> TokenStream:
        return self._stream("heldout")

    @functools.cached_property
    def tokenizer(self):
        """See linscale/data/tokenizers.py."""
        return tokenizers.load(self.manifest["tokenizer"], os.path.join(self.folder, "tokenizer.json"))

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.manifest["vocab_size"]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text over predicted tokens of the held-out stream; turns nats a token into bits a byte."""
        return self.heldout.bytes / self.heldout.labels

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def summary(self) -> str:
        m, train, heldout = self.manifest, self.train, self.heldout
        invalid = f"; {invalid_sentence(m['invalid'])}" if m["invalid"] else ""
        return (
            f"{m['what']}: {m['files']:,} files; train {train.documents:,} documents, {train.size:,} tokens, "
            f"{train.bytes:,} bytes; held out {heldout.documents:,} documents, {heldout.size:,} tokens, "
            f"{heldout.bytes:,} bytes ({self.bytes_per_token:.3f} bytes a token); "
            f"tokenizer {m['tokenizer']}, {self.vocab_size:,} entries{invalid}"
        )


def prepare(data: Data, vocab_size: int | None = None, log: Callable[[str], None] = print) -> Corpus:
    """The corpus that `data` describes, from the cache or tokenised now.

    vocab_size: of the model, checked against the tokenizer's. log: gets one str a message.
    Raises ConfigError: missing, empty or broken data, nothing to hold out, a cache folder that cannot be written.
    """
    _check(data)
    source = open_source(data)
    separate = open_source(data, heldout=True) if data.heldout_path or data.heldout_split else None
    if separate and data.source != "tfds":
        training = set(map(os.path.realpath, source.files))
        if common := sorted(file for file in separate.files if os.path.realpath(file) in training):
            raise ConfigError(
                f"config.data.heldout_path matches {common[0]!r}, which config.data.path matches too; "
                "training and held-out files must differ."
            )
    heldout = separate.identity if separate else data.heldout_share
    name = fingerprint(
        FORMAT, tokenizers.identity(data.tokenizer), source.identity, heldout, data.max_tokens, data.heldout_tokens
    )
    root = os.path.expanduser(data.cache or os.environ.get("LINSCALE_CACHE") or "~/.cache/linscale")
    folder = os.path.join(os.path.abspath(root), f"corpus-{name}")
    manifest = cache.load_manifest(folder, name, log)
    if manifest is None:
        try:
            with cache.building(folder, name) as draft:
                manifest = build(data, source, separate, vocab_size, draft, log)
                cache.write_manifest(draft, manifest | {"fingerprint": name})
        except OSError as error:  # reading the sources raises ConfigError, so this is about writing
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise ConfigError(
                f"config.data.cache is {data.cache!r} (folder {root!r}), where the corpus cannot be written: "
                f"{error.strerror or error}; {'free some space or ' if full else ''}choose another folder with "
                "config.data.cache or LINSCALE_CACHE."
            ) from error
        manifest = cache.load_manifest(folder, name, log)
        if manifest is None:
            raise ConfigError(f"config.data.cache: {folder!r} was changed while it was written; run again.")
    check_vocabulary(vocab_size, manifest["vocab_size"], data.tokenizer)
    return Corpus(folder, manifest)


def _check(data: Data) -> None:
    """Fields of `data` that contradict each other."""
    if data.tokenizer.startswith("bpe:"):
        tokenizers.check_bpe(data.tokenizer)
    if data.source == "stdlib" and (data.path or data.heldout_path):
        field = "path" if data.path else "heldout_path"
        raise ConfigError(
            f"config.data.{field} is {getattr(data, field)!r}, but config.data.source='stdlib' reads its own files; "
            f"leave it empty, or set config.data.source='text'."
        )
    if data.heldout_split and data.source != "tfds":
        raise ConfigError(
            f"config.data.heldout_split is {data.heldout_split!r}, but config.data.source={data.source!r} has no "
            "splits; use config.data.heldout_path."
        )
    same_name = data.heldout_path in ("", data.path)
    same_split = data.heldout_split in ("", data.split)
    if data.source == "tfds" and same_name and same_split and (data.heldout_path or data.heldout_split):
        raise ConfigError(
            f"config.data.heldout_split is {data.heldout_split!r}, the training split itself; name another one, or "
            "leave it empty to hold out a share of the documents."
        )
    if not (data.heldout_path or data.heldout_split) and data.heldout_share <= 0:
        raise ConfigError(
            "config.data.heldout_share is 0 and config.data.heldout_path is empty, so nothing would be held out; "
            "set one of them."
        )
