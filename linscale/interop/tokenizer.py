"""Tokenizers as tokenizer.json of the `tokenizers` library, which transformers loads, and back."""

import itertools
import json
import shutil
from pathlib import Path

from linscale.config import ConfigError
from linscale.data import tokenizers as ours


def write(tokenizer, folder: Path, spec: str, source: Path | None = None) -> None:
    """tokenizer.json and tokenizer_config.json of the tokenizer into `folder`. It adds no special tokens by itself.

    spec: config.data.tokenizer. source: the file behind a bpe or hf tokenizer. Raises ConfigError for sentencepiece.
    """
    if isinstance(tokenizer, ours.SentencePiece):
        raise ConfigError(
            f"config.data.tokenizer is {spec!r}; a sentencepiece model cannot be written as tokenizer.json without "
            "changing how it splits text; export with --no-tokenizer and copy the .model file yourself."
        )
    if isinstance(tokenizer, ours.HuggingFace):
        shutil.copyfile(source, folder / "tokenizer.json")
        separator = tokenizer.separator
    else:
        vocabulary, merges, pattern = _byte_pairs(tokenizer)
        text = _byte_level(vocabulary, merges, pattern, tokenizer.separator_id)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        separator = ours.SEPARATOR
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "pad_token": separator,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=1) + "\n")


def _byte_pairs(tokenizer) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]], str | None]:
    """(token -> id, merges in order, the pattern that splits text) of a byte-level tokenizer."""
    if isinstance(tokenizer, ours.Bytes):
        return {bytes([b]): b for b in range(256)}, [], None
    ranks = tokenizer.ranks
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            merges.append(_last_merge(token, rank, ranks))
    return ranks, merges, tokenizer.pattern


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins last to make `token`: its encoding by the ranks below its own."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[at] >= rank:
            raise ConfigError(f"the token {token!r} of the tiktoken file is no pair of earlier ones; it is no BPE.")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_level(vocabulary, merges, pattern: str | None, separator_id: int) -> str:
    """tokenizer.json of a byte-level BPE."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _letters()
    spell = lambda token: "".join(letters[b] for b in token)  # noqa: E731
    model = models.BPE(
        vocab={spell(token): i for token, i in vocabulary.items()}, merges=[(spell(a), spell(b)) for a, b in merges]
    )
    tokenizer = Tokenizer(model)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        to_bytes = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.pre_tokenizer = to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    # Ids of added tokens follow the vocabulary's size, so spare entries fill the ids up to the separator's.
    content = json.loads(tokenizer.to_str())
    separator = AddedToken(ours.SEPARATOR, special=True, normalized=False)
    content["model"]["vocab"][ours.SEPARATOR] = separator_id
    content["added_tokens"] = [
        {
            "id": separator_id,
            "content": ours.SEPARATOR,
            "single_word": separator.single_word,
            "lstrip": separator.lstrip,
            "rstrip": separator.rstrip,
            "normalized": separator.normalized,
            "special": True,
        }
    ]
    return json.dumps(content, ensure_ascii=False)


def _letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in byte-level tokenizers: itself where it prints, else from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    out = {b: chr(b) for b in printing}
    for b in range(256):
        if b not in out:
            out[b] = chr(0x100 + len(out) - len(printing))
    return out
