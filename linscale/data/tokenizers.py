"""Tokenizers behind one small face: bytes, BPE trained on the corpus, Hugging Face, sentencepiece, tiktoken.

Every tokenizer here has

    vocab_size    int, one more than its largest id
    separator_id  int, the id that stands before each document and never comes out of `encode`
    encode(text) -> uint32 [n];  encode_batch(texts) -> list of those, in parallel where the library can
    decode(ids) -> str; ids that are no text (the separator, padding of the vocabulary) are left out

`bytes`, `bpe` and `tiktoken` are byte-level, so decode(encode(text)) == text; the others normalise as their files say.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator

import numpy as np

from linscale.config import ConfigError

SEPARATOR = "<|endoftext|>"
_SEPARATORS = (SEPARATOR, "</s>", "<eos>", "<|end_of_text|>")  # looked for in a Hugging Face file, in this order
_FIELD = "config.data.tokenizer"
# cl100k_base, from tiktoken_ext/openai_public.py; rank files carry no pattern of their own.
_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"


class Bytes:
    """UTF-8 bytes as ids 0..255, separator 256."""

    vocab_size = 257
    separator_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class HuggingFace:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, file: str, separator: str | None = None):
        """`separator`: the token to use; None looks for one of the usual names."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(file)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{_FIELD} names {file!r}, which is no tokenizer.json: {error}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" written in a text is text, not a separator
        entries = self._tokenizer.get_vocab(with_added_tokens=True)
        name = next((token for token in (separator, *_SEPARATORS) if token in entries), None)
        if name is None:
            raise ConfigError(
                f"{_FIELD} names {file!r}, which has no token to separate documents; it must have one of "
                f"{', '.join(_SEPARATORS)}, or an eos_token in a tokenizer_config.json beside it."
            )
        self.vocab_size = max(entries.values()) + 1
        self.separator, self.separator_id = name, entries[name]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i < self.vocab_size and i != self.separator_id])


class SentencePiece:
    def __init__(self, file: str):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=file)
        except Exception as error:  # RuntimeError or OSError, by version
            raise ConfigError(f"{_FIELD} names {file!r}, which is no sentencepiece model: {error}.") from error
        self.vocab_size = self._processor.vocab_size()
        self.separator_id = self._processor.eos_id() if self._processor.eos_id() >= 0 else self._processor.bos_id()
        if self.separator_id < 0:
            raise ConfigError(f"{_FIELD} names {file!r}, which has neither </s> nor <s> to separate documents.")

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text, out_type=int), np.uint32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self._processor.encode(texts, out_type=int)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size and i != self.separator_id])


class Tiktoken:
    def __init__(self, name: str):
        self._encoding = _rank_file(name) if _is_file(name) else _named_encoding(name)
        self.vocab_size = self._encoding.n_vocab
        self.separator_id = self._encoding.eot_token

    @property
    def ranks(self) -> dict[bytes, int]:
        """Token -> id, without the special ones; a lower id was merged earlier."""
        return self._encoding._mergeable_ranks

    @property
    def pattern(self) -> str:
        """The regular expression whose matches are encoded on their own."""
        return self._encoding._pat_str

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.uint32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self._encoding.encode_ordinary_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        pieces = []
        for i in map(int, ids):
            with contextlib.suppress(KeyError):  # ids between and above the special tokens stand for nothing
                pieces.append(b"" if i == self.separator_id else self._encoding.decode_single_token_bytes(i))
        return b"".join(pieces).decode(errors="replace")


def load(spec: str, trained: str | None = None):
    """The tokenizer that config.data.tokenizer names; `trained` is the file of a bpe. Raises ConfigError."""
    kind, _, rest = spec.partition(":")
    rest = os.path.expanduser(rest)
    if kind == "bytes":
        return Bytes()
    try:
        if kind == "bpe":
            return HuggingFace(trained, SEPARATOR)
        if kind == "hf":
            return HuggingFace(*_hugging_face_files(rest))
        if kind == "sentencepiece":
            return SentencePiece(_existing(rest))
        return Tiktoken(rest)
    except ImportError as error:
        raise ConfigError(f"{_FIELD} is {spec!r}, which needs the package {error.name}; pip install it.") from error


def identity(spec: str) -> str:
    """A short string, equal when the tokenizers are: the content of files, the name of what is known by name."""
    kind, _, rest = spec.partition(":")
    rest = os.path.expanduser(rest)
    if kind == "hf":
        file, separator = _hugging_face_files(rest)
        return f"hf {_digest(file)} {separator}"
    if kind == "sentencepiece":
        return f"sentencepiece {_digest(_existing(rest))}"
    if kind == "tiktoken" and _is_file(rest):
        return f"tiktoken {os.path.basename(rest)} {_digest(_existing(rest))}"
    return spec


def train_bpe(entries: int, documents: Iterator[str], file: str) -> None:
    """Byte-level BPE with at most `entries` tokens, the separator included, written to `file`. Deterministic."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes, met in training or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    with open(file, "w", encoding="utf-8") as opened:  # the library's own save hides a full disk in a bare Exception
        opened.write(tokenizer.to_str())


def check_bpe(spec: str) -> int:
    """ENTRIES of bpe:ENTRIES. Raises ConfigError below 257, the bytes and the separator."""
    entries = int(spec.partition(":")[2])
    if not 257 <= entries <= 2**31:
        raise ConfigError(
            f"{_FIELD} is {spec!r}; a byte-level BPE has at least 257 entries, 256 bytes and a separator."
        )
    return entries


def _existing(file: str) -> str:
    if not os.path.isfile(file):
        raise ConfigError(f"{_FIELD} names {file!r}, which is no file (from {os.getcwd()}); correct the path.")
    return file


def _digest(file: str) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.sha256(opened.read()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{_FIELD} names {file!r}, which cannot be read: {error.strerror}.") from error


def _hugging_face_files(path: str) -> tuple[str, str | None]:
    """(tokenizer.json, the eos_token that a tokenizer_config.json beside it names)."""
    file = _existing(os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path)
    config = os.path.join(os.path.dirname(file), "tokenizer_config.json")
    if not os.path.isfile(config):
        return file, None
    try:
        with open(config, encoding="utf-8") as opened:
            token = json.load(opened).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{config!r}, beside the file that {_FIELD} names, is no JSON object: {error}.") from error
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise ConfigError(f"{config!r}, beside the file that {_FIELD} names, has eos_token {token!r}; it must be text.")
    return file, token


def _is_file(name: str) -> bool:
    return name.endswith(".tiktoken") or os.sep in name or os.path.isfile(name)


def _rank_file(file: str):
    """A local .tiktoken file: lines of a base64 token and its rank. Split by cl100k_base's pattern."""
    import tiktoken

    stem = os.path.basename(file).removesuffix(".tiktoken")
    if stem != "cl100k_base" and stem in tiktoken.list_encoding_names():
        raise ConfigError(
            f"{_FIELD} names {file!r}, but {stem} splits text by another pattern than cl100k_base; use tiktoken:{stem}."
        )
    try:
        with open(_existing(file), "rb") as opened:
            pairs = [line.split() for line in opened if line.strip()]
        ranks, seen = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}, set()
        for _, rank in pairs:  # the library ends in a panic on these
            if int(rank) in seen or not 0 <= int(rank) < 2**31:
                raise ValueError(f"rank {int(rank)} occurs twice or does not lie between 0 and {2**31 - 1}")
            seen.add(int(rank))
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"byte {missing[0]} has no rank")
        # cl100k_base leaves the id after its ranks unused.
        separator = 100_257 if stem == "cl100k_base" else max(ranks.values()) + 1
        return tiktoken.Encoding(stem, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={SEPARATOR: separator})
    except (ValueError, binascii.Error, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{_FIELD} names {file!r}, which is no tiktoken rank file: {error}.") from error


def _named_encoding(name: str):
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise ConfigError(
            f"{_FIELD} is 'tiktoken:{name}'; the name must be one of {', '.join(tiktoken.list_encoding_names())}, "
            "or a .tiktoken file."
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests' exceptions; ValueError for a wrong checksum
        raise ConfigError(
            f"{_FIELD} is 'tiktoken:{name}', whose ranks could not be downloaded ({type(error).__name__}); "
            "connect once, set TIKTOKEN_CACHE_DIR to a folder that has them, or give tiktoken:FILE."
        ) from error
