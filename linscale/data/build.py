"""Building a corpus: which documents are held out, training a BPE, writing the two streams."""

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from linscale.config import ConfigError, Data
from linscale.data import cache, tokenizers
from linscale.data.sources import Invalid, Source

FORMAT = 1  # of the corpus folder and of the rules in this file; part of the fingerprint
BPE_CHARACTERS = 256 << 20  # of training text, from the start, that a bpe is trained on
_BATCH_CHARACTERS = 1 << 20  # encoded at once
_CUT = 2  # a held-out document may carry the stream to this many times heldout_tokens before it is cut
_LOG_EVERY = 5.0  # seconds


def fingerprint(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_vocabulary(model: int | None, needed: int, spec: str) -> None:
    """Raises ConfigError if the model's vocabulary cannot hold the tokenizer's."""
    if model is not None and model < needed:
        raise ConfigError(
            f"config.model.vocab_size is {model}, smaller than the vocabulary of config.data.tokenizer={spec!r}; "
            f"it must be at least {needed}."
        )


def build(data: Data, source: Source, separate: Source | None, vocab_size: int | None, draft: str, log) -> dict:
    """Writes the streams, and tokenizer.json of a bpe, into the folder `draft`. Returns the manifest.

    separate: the held-out source, None to hold out a share of `source`.
    """
    began = time.monotonic()
    trained = data.tokenizer.startswith("bpe:")
    if not trained:  # before any reading, as it may fail
        tokenizer = tokenizers.load(data.tokenizer)
        check_vocabulary(vocab_size, tokenizer.vocab_size, data.tokenizer)
    rule = None if separate else heldout_rule(source, data.heldout_share)
    if trained:
        file = os.path.join(draft, "tokenizer.json")
        shutil.copyfile(_trained_bpe(data, source, rule, os.path.dirname(draft), log), file)
        tokenizer = tokenizers.load(data.tokenizer, file)
        check_vocabulary(vocab_size, tokenizer.vocab_size, data.tokenizer)

    log(f"tokenising {source.what} with the tokenizer {data.tokenizer}")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    invalid = Invalid(), Invalid()
    heldout = _write(
        os.path.join(draft, "heldout"),
        _side(separate or source, rule, True, invalid[1]),
        tokenizer,
        dtype,
        enough=data.heldout_tokens,
        most=_CUT * data.heldout_tokens,
        log=log,
    )
    if not heldout["documents"]:
        raise ConfigError(f"{separate.what} holds no text, so nothing is held out; choose other files.")
    if heldout["size"] < 2:
        raise ConfigError(f"config.data.heldout_tokens is {data.heldout_tokens}, too few to hold a token of text.")
    limit = data.max_tokens or float("inf")
    train = _write(
        os.path.join(draft, "train"),
        _side(source, rule, False, invalid[0]),
        tokenizer,
        dtype,
        enough=limit,
        most=limit,
        log=log,
    )
    if not train["documents"]:
        raise ConfigError(f"{source.what} holds no text: every document is empty; choose other files.")
    names = invalid[1].names | invalid[0].names
    if names:
        log(invalid_sentence(names))
    log(f"tokenised {train['size'] + heldout['size']:,} tokens in {time.monotonic() - began:.1f} s")
    return {
        "what": source.what,
        "files": len(source.files) + (len(separate.files) if separate else 0),
        "invalid": names,
        "tokenizer": data.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "separator_id": tokenizer.separator_id,
        "dtype": dtype,
        "train": train,
        "heldout": heldout,
    }


def heldout_rule(source: Source, share: float) -> Callable[[int], bool]:
    """Document number -> held out? A hash of the number decides, so that no stretch of the corpus is left out.

    A corpus so small that one side would stay empty holds out the one document with the smallest hash. Reads only as
    far as the first document of each side. Raises ConfigError: no document, or only one.
    """

    def chosen(index: int) -> bool:
        return _hash(index) < share * 2**32

    sides, count = set(), 0
    for _ in source.documents():
        sides.add(chosen(count))
        count += 1
        if len(sides) == 2:
            return chosen
    if count == 0:
        raise ConfigError(f"{source.what} holds no text: every document is empty; choose other files.")
    if count == 1:
        raise ConfigError(
            f"{source.what} holds one document, too few to hold any out; set config.data.heldout_path, or "
            "config.data.separator to split a text file into documents."
        )
    least = min(range(count), key=_hash)
    return lambda index: index == least


def _hash(index: int) -> int:
    return zlib.crc32(str(index).encode())


def _side(source: Source, rule, heldout: bool, invalid: Invalid | None = None) -> Iterator[str]:
    for index, text in enumerate(source.documents(invalid)):
        if rule is None or rule(index) == heldout:
            yield text


def _trained_bpe(data: Data, source: Source, rule, folder: str, log) -> str:
    """The file of the BPE trained on the training documents; kept in the cache, as it depends on less than a corpus."""
    parts = (FORMAT, BPE_CHARACTERS, data.tokenizer, source.identity, None if rule is None else data.heldout_share)
    file = os.path.join(folder, f"bpe-{fingerprint(*parts)}.json")
    if not os.path.isfile(file):
        log(f"training the tokenizer {data.tokenizer} on {source.what}")
        with cache.writing(file) as draft:
            tokenizers.train_bpe(tokenizers.check_bpe(data.tokenizer), _first(_side(source, rule, False)), draft)
    return file


def _first(documents: Iterator[str]) -> Iterator[str]:
    taken = 0
    for text in documents:
        yield text
        taken += len(text)
        if taken >= BPE_CHARACTERS:
            return


def _write(path: str, documents: Iterator[str], tokenizer, dtype: str, *, enough: float, most: float, log) -> dict:
    """Whole documents until there are `enough` tokens; one that would carry the stream past `most` is cut to `enough`.

    Returns size, documents and bytes as TokenStream has them.
    """
    separator = np.array([tokenizer.separator_id], dtype).tobytes()
    size = count = text_bytes = 0
    cut = False
    said = time.monotonic()
    with open(f"{path}.tokens", "wb") as tokens, open(f"{path}.starts", "wb") as starts:
        for texts in _batches(documents, enough):
            for text, ids in zip(texts, tokenizer.encode_batch(texts)):
                if size >= enough:
                    break
                if size + 1 + len(ids) > most:
                    text, ids = _cut(tokenizer, text, ids, int(enough) - size - 1)
                    cut = True
                starts.write(np.uint64(size).tobytes())
                tokens.write(separator + ids.astype(dtype).tobytes())
                size, count, text_bytes = size + 1 + len(ids), count + 1, text_bytes + len(text.encode())
            if time.monotonic() - said > _LOG_EVERY:
                said = time.monotonic()
                log(f"  {os.path.basename(path)}: {count:,} documents, {size:,} tokens, {text_bytes / 1e6:,.0f} MB")
            if cut or size >= enough:
                break
        if not cut:
            tokens.write(separator)
            size += 1
    return {"size": size, "documents": count, "bytes": text_bytes}


def _batches(documents: Iterator[str], enough: float) -> Iterator[list[str]]:
    """Documents in lists of about a million characters; smaller ones where fewer tokens are asked for."""
    most = min(_BATCH_CHARACTERS, enough)
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= most:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _cut(tokenizer, text: str, ids: np.ndarray, room: int) -> tuple[str, np.ndarray]:
    """The start of `text` that encodes to at most `room` tokens. Cuts text, not tokens, so that its bytes are known."""
    while len(ids) > room:
        text = text[: len(text) * room // len(ids)]
        ids = tokenizer.encode(text)
    return text, ids


def invalid_sentence(names: dict[str, int]) -> str:
    shown = ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
    count, total = len(names), sum(names.values())
    return f"not UTF-8: {total} documents in {count} files (bad bytes are read as U+FFFD): {shown}"
