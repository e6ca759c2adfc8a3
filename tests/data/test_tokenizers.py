"""Every tokenizer gives ids below its size, keeps its separator to itself, and decodes to the text."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linscale.config import ConfigError
from linscale.data import tokenizers

TEXTS = [
    "The quick brown fox.\n\n  jumps\tover",
    "naïve 🙂 語 \r\n",
    "<|endoftext|></s><pad>",
    " leading and trailing  ",
    "x" * 3000,
]
WORDS = [f"The {word} of the {other}.\n" for word in ("cat", "dog", "law") for other in ("sea", "hill", "scale")] * 30


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small file of each kind."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizers.train_bpe(280, iter(WORDS), str(folder / "tokenizer.json"))
    (folder / "corpus").write_text("".join(WORDS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus"), model_prefix=str(folder / "sp"), vocab_size=300, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b"  ", b" the"]
    for name in ("tiny", "cl100k_base"):
        lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks))
        (folder / f"{name}.tiktoken").write_text("\n".join(lines) + "\n")
    return folder


def load(spec: str, files):
    spec = spec.replace("FOLDER", str(files))
    return tokenizers.load(spec, str(files / "tokenizer.json"))


SPECS = ["bytes", "bpe:280", "hf:FOLDER", "hf:FOLDER/tokenizer.json", "sentencepiece:FOLDER/sp.model"]
SPECS += ["tiktoken:FOLDER/tiny.tiktoken"]


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(spec, files):
    tokenizer = load(spec, files)
    encoded = tokenizer.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, encoded):
        assert np.array_equal(ids, tokenizer.encode(text)), "batches encode as single texts do"
        assert ids.dtype == np.uint32 and ids.max() < tokenizer.vocab_size
        assert tokenizer.separator_id not in ids
        noise = [tokenizer.separator_id, *ids, tokenizer.vocab_size + 5]
        assert tokenizer.decode(ids) == text == tokenizer.decode(noise)
    assert tokenizer.separator_id < tokenizer.vocab_size


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("spec", ["bytes", "bpe:280", "tiktoken:FOLDER/tiny.tiktoken"])
def test_byte_level_is_exact(spec, files, text):
    tokenizer = load(spec, files)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_golden_ids(files):
    assert load("bytes", files).encode("é\n").tolist() == [0xC3, 0xA9, 10]
    tiny = load("tiktoken:FOLDER/tiny.tiktoken", files)
    assert tiny.encode("the the").tolist() == [257, 259] and (tiny.separator_id, tiny.vocab_size) == (260, 261)
    assert load("tiktoken:FOLDER/cl100k_base.tiktoken", files).separator_id == 100_257
    bpe = load("bpe:280", files)
    assert bpe.vocab_size == 280 and len(bpe.encode("The cat of the sea.\n")) < 10
    assert load("sentencepiece:FOLDER/sp.model", files).separator_id == 2  # </s>


def test_bpe_is_deterministic_and_may_stay_smaller(files, tmp_path):
    tokenizers.train_bpe(280, iter(WORDS), str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_text() == (files / "tokenizer.json").read_text()
    tokenizers.train_bpe(100_000, iter(WORDS), str(tmp_path / "large.json"))
    large = tokenizers.load("bpe:100000", str(tmp_path / "large.json"))
    assert 257 < large.vocab_size < 1000 and large.decode(large.encode("ÿ")) == "ÿ"


def test_hugging_face_settings_in_the_file_do_not_reach_the_corpus(files, tmp_path):
    """Truncation, padding, and tokens added by a post-processor would change the text."""
    import tokenizers as library
    from tokenizers.processors import TemplateProcessing

    changed = library.Tokenizer.from_file(str(files / "tokenizer.json"))
    changed.add_special_tokens(["<eot>"])
    changed.enable_truncation(3)
    changed.enable_padding(length=50)
    eot = ("<eot>", changed.token_to_id("<eot>"))
    changed.post_processor = TemplateProcessing(single="<eot> $A <eot>", special_tokens=[eot])
    changed.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eot>"}}))
    plain, loaded = load("hf:FOLDER", files), tokenizers.load(f"hf:{tmp_path}")
    assert np.array_equal(loaded.encode(TEXTS[0]), plain.encode(TEXTS[0]))
    assert loaded.separator_id == eot[1] == loaded.vocab_size - 1
    assert tokenizers.identity(f"hf:{tmp_path}") != tokenizers.identity(f"hf:{files}")


@pytest.mark.parametrize("spec", ["hf:FOLDER/none", "sentencepiece:FOLDER/none", "tiktoken:FOLDER/none.tiktoken"])
def test_missing_file(spec, files):
    for act in (tokenizers.load, tokenizers.identity):
        with pytest.raises(ConfigError, match=r"^config.data.tokenizer names .*none.*, which is no file"):
            act(spec.replace("FOLDER", str(files)))


@pytest.mark.parametrize("kind", ["hf", "sentencepiece", "tiktoken"])
def test_wrong_file(kind, tmp_path):
    (tmp_path / "wrong").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match=r"^config.data.tokenizer names .*wrong.*, which is no "):
        tokenizers.load(f"{kind}:{tmp_path}/wrong")


def test_tiktoken_names(monkeypatch, tmp_path, files):
    with pytest.raises(ConfigError, match=r"the name must be one of .*cl100k_base"):
        tokenizers.load("tiktoken:cl200k")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # a port nobody listens on
    with pytest.raises(ConfigError, match=r"could not be downloaded .* or give tiktoken:FILE"):
        tokenizers.load("tiktoken:o200k_base")
    (tmp_path / "o200k_base.tiktoken").write_text((files / "tiny.tiktoken").read_text())
    with pytest.raises(ConfigError, match="another pattern"):
        tokenizers.load(f"tiktoken:{tmp_path}/o200k_base.tiktoken")


@pytest.mark.parametrize("spec", ["bpe:256", "bpe:0"])
def test_too_small_a_bpe(spec):
    with pytest.raises(ConfigError, match="at least 257 entries"):
        tokenizers.check_bpe(spec)
