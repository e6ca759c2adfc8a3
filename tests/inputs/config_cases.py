"""Every field of a config: wrong type, out of range, unknown, contradictory; from the command line and from recipes."""

import dataclasses
import typing
from pathlib import Path

from judging import RECIPE, Case, train

from linscale.config import Config

# field=value -> what the sentence must hold beside the field
OUT_OF_RANGE = {
    "name=": "letters", "name=../escaped": "'../escaped'", "name=/tmp/escaped": "letters", "name=.hidden": "letters",
    "name=a/b": "'a/b'", "name=a b": "'a b'", "name=..": "letters", "name=x\\y": "letters", "name=-x": "letters",
    f"name={'n' * 300}": "200", "name=run\x1b[31m": "control characters", "name=run\n": "control characters",
    "output=": "folder", "output=a\x00b": "control characters", "output=a\nb": "control characters",
    "seed=-1": "-1", f"seed={2**31}": "2147483648",
    "model.arch=gpt": "'llama'", "model.arch=": "'llama'",
    "model.layers=0": "0", "model.layers=-3": "-3", "model.layers=1000000000": "1000000000",
    "model.width=0": "0", "model.width=33": "divide", "model.width=99999999999": "99999999999",
    "model.heads=0": "0", "model.heads=5": "divisor", "model.heads=64": "divisor",
    "model.ffn=0": "0", "model.vocab_size=0": "0", "model.vocab_size=100": "257",
    "model.vocab_size=9999999999999": "9999999999999",
    "model.dtype=float16": "'bfloat16'", "model.remat=some": "'full'", "model.unroll=-1": "-1",
    "model.attention=flash": "'chunked'", "model.init_std=-0.1": "-0.1", "model.init_std=nan": "nan",
    "model.init_std=inf": "inf", "model.tnl_decay=linear": "'alibi'", "model.value_activation=relu": "'silu'",
    "model.hgrn2_query_activation=relu": "'silu'", "model.rope_base=0": "0", "model.rope_base=-1": "-1",
    "model.rope_base=nan": "nan", "model.rope_base=inf": "inf", "model.norm_epsilon=-1": "-1",
    "model.hgrn2_norm_epsilon=nan": "nan", "model.ffn_activation=gelu": "'silu'", "model.softmax_every=1": "1",
    "data.source=csv": "'parquet'", "data.heldout_share=-0.1": "-0.1", "data.heldout_share=0.9": "0.9",
    "data.heldout_share=nan": "nan", "data.heldout_share=0": "0", "data.tokenizer=": "bpe:ENTRIES",
    "data.tokenizer=words": "'words'", "data.tokenizer=bpe:many": "bpe:ENTRIES", "data.tokenizer=bpe:10": "257",
    "data.tokenizer=bpe:99999999999999": "257", "data.tokenizer=hf:": "hf:FILE", "data.max_tokens=-1": "-1",
    "data.heldout_tokens=0": "0", "data.heldout_tokens=-5": "-5", "data.workers=-1": "-1",
    "data.workers=100000000": "100000000", "data.text_field=\x07": "control characters",
    "train.tokens=-1": "-1", "train.steps=-1": "-1", "train.steps=99999999999999": "99999999999999",
    "train.batch=0": "0", "train.batch=100000": "tokens a step", "train.sequence=0": "0",
    "train.sequence=10000000": "tokens a step", "train.accumulation=0": "0", "train.accumulation=3": "divide",
    "train.log_every=0": "0", "train.eval_count=0": "0", "train.eval_count=100000000000": "100000000000",
    "train.checkpoint_every=0": "0", "train.checkpoint_keep=0": "0", "train.checkpoint_keep=10000000000000": "GB",
    "train.checkpoint_keep_every=-1": "-1", "train.checkpoint_chinchilla=one": "'one'",
    "train.checkpoint_chinchilla=1,,2": "commas", "train.checkpoint_chinchilla=-1": "commas",
    "train.checkpoint_chinchilla=0": "above 0", "train.spike_sigma=-1": "-1", "train.spike_sigma=nan": "nan",
    "train.skip_limit=0": "0", "train.stop_seconds=-1": "-1", "train.stop_seconds=1e300": "1e+300",
    "train.hang_seconds=-1": "-1", "train.hang_seconds=inf": "inf", "train.hang_seconds=1e300": "1e+300",
    "optimizer.learning_rate=-1": "-1", "optimizer.learning_rate=inf": "inf", "optimizer.learning_rate=nan": "nan",
    "optimizer.schedule=linear": "'cosine'", "optimizer.warmup_tokens=-1": "-1", "optimizer.decay_share=1.5": "1.5",
    "optimizer.final_share=-0.1": "-0.1", "optimizer.theta_share=-0.1": "-0.1", "optimizer.theta_share=2": "2",
    "optimizer.beta1=1": "1", "optimizer.beta1=-0.1": "-0.1",
    "optimizer.beta2=1": "1", "optimizer.beta2=nan": "nan", "optimizer.eps=-1e-8": "-1e-08", "optimizer.eps=nan": "nan",
    "optimizer.weight_decay=-1": "-1", "optimizer.clip=-1": "-1", "optimizer.clip=inf": "inf",
    "init.step=-1": "-1", "init.from_run=nowhere": "nowhere", "log.wandb_project=bad\x1bname": "control characters",
}  # fmt: skip

# overrides that contradict each other, or name nothing -> what the sentence must hold
CONTRADICTIONS = {
    "model.width=30 model.heads=2|hybrid": ("config.model.heads", "even head dim"),
    "model.width=30 model.heads=2|llama": ("config.model.heads", "even head dim"),
    "train.steps=0 train.tokens=0": ("config.train.tokens", "at least 1"),
    "train.batch=6 train.accumulation=4": ("config.train.accumulation", "does not divide"),
    "train.steps=0 train.tokens=999999999999999999": ("config.train.tokens", "999999999999999999"),
    "init.step=5": ("config.init.from_run", "empty"),
    "init.weights_only=true": ("config.init.from_run", "empty"),
    "data.path=": ("config.data.path", "empty"),
    "data.source=stdlib": ("config.data.path", "stdlib"),
    "data.source=stdlib data.path= data.heldout_path=x": ("config.data.heldout_path", "stdlib"),
    "data.heldout_split=test": ("config.data.heldout_split", "'test'"),
    "data.source=tfds data.path=abc data.heldout_path=abc": ("config.data.heldout_split", "training split"),
    "model.attention=pallas_gpu": ("config.model.attention", "'pallas_gpu'"),
    "model.attention=pallas_tpu": ("config.model.attention", "'pallas_tpu'"),
    "model.layres=3": ("config.model.layres", "config.model.layers"),
    "modle.layers=3": ("config.modle.layers", "not a field"),
    "model=3": ("config.model", "not a field"),
    "train.optimizer.learning_rate=1": ("config.train.optimizer.learning_rate", "not a field"),
    "=3": ("config.", "not a field"),
    "model.__class__=3": ("config.model.__class__", "not a field"),
}

# body of get_config, after `config` was made -> what the sentence must hold
RECIPES = {
    "config.model.layers = 1.5": ("layers", "int"),
    "config.model.layers = None": ("layers", "None"),
    "config.model.arch = 3": ("arch", "str"),
    "config.train.layers = 3": ("layers", "does not exist"),
    "config = config.to_dict()": ("get_config", "dict"),
    "return None": ("get_config", "None"),
    "return 3": ("get_config", "int"),
    "return [('name', 'x')]": ("get_config", "list"),
    "config = config.unlock(); config.model = 5": ("'model'", "5"),
    "config = dict(config); config['model'] = 5": ("get_config", "dict"),
    "config = config.unlock(); config.modle = 5": ("config.modle", "not a field"),
    "config = config.unlock(); config.ignore_type = 1; config.train.steps = 'x'": ("steps",),
    "with config.ignore_type(): config.train.steps = 'x'": ("config.train.steps", "'x'", "int"),
    "with config.ignore_type(): config.train.steps = True": ("config.train.steps", "True", "int"),
    "with config.ignore_type(): config.log.tensorboard = 1": ("config.log.tensorboard", "bool"),
    "with config.ignore_type(): config.train.hang_seconds = 10**400": ("OverflowError",),
    "config.output = 'a\\0b'": ("config.output", "control characters"),
    "config.data.path = 'a\\0b'": ("config.data.path", "control characters"),
    "config.data.cache = 'a\\0b'": ("config.data.cache", "control characters"),
    "config.data.tokenizer = 'hf:a\\0b'": ("config.data.tokenizer", "control characters"),
    "config.init.from_run = 'a\\0b'": ("config.init.from_run", "control characters"),
    "config.output = '\\ud800'": ("config.output", "control characters"),
    "config.output = 'x' * 10000": ("config.output", "4096"),
    "raise SystemExit(0)": ("SystemExit",),
    "raise KeyboardInterrupt": ("KeyboardInterrupt",),
    "1 / 0": ("ZeroDivisionError",),
    "import no_such_module": ("no_such_module",),
    "raise ValueError('two\\nlines')": ("two lines",),
}

# the whole file -> what the sentence must hold
FILES = {
    b"": ("RUNGS",),
    b"RUNGS = ('tnl',)\n": ("get_config",),
    b"def get_config(rung): pass\n": ("RUNGS",),
    b"RUNGS = 3\ndef get_config(rung): pass\n": ("RUNGS", "3"),
    b"RUNGS = 'tnl'\ndef get_config(rung): pass\n": ("RUNGS", "'tnl'"),
    b"RUNGS = (1, 2)\ndef get_config(rung): pass\n": ("RUNGS", "1"),
    b"RUNGS = ()\ndef get_config(rung): pass\n": ("RUNGS", "empty"),
    b"RUNGS = ('tnl',)\nget_config = 3\n": ("get_config", "3"),
    b"def get_config(rung:\n": ("SyntaxError",),
    b"\xff\xfe\x00r\x00u\x00n": ("SyntaxError",),
    b"x = '\xe9'\n": ("SyntaxError",),
    b"a\0b": ("Error",),
    b"raise SystemExit('stopped')\n": ("SystemExit",),
    b"from linscale.config import base\nRUNGS = ('tnl',)\ndef get_config(): return base()\n": ("TypeError",),
}  # fmt: skip


def _override(text: str, rung: str = "tnl"):
    # spaces separate overrides only where a field follows
    words = [text] if " model." not in text and " train." not in text and " data." not in text else text.split(" ")
    return lambda folder: train(folder, *(f"--config.{word}" for word in words), rung=rung)


def _recipe(body: str):
    text = RECIPE.replace("    return config\n", f"    {body}\n    return config\n")
    assert text != RECIPE

    def make(folder: Path):
        (folder / "tiny.py").write_text(text)
        return train(folder)[:2]

    return make


def _file(content: bytes):
    def make(folder: Path):
        (folder / "own.py").write_bytes(content)
        return ["train", f"--config={folder / 'own.py'}:tnl"]

    return make


def _wrong_types() -> list[Case]:
    """Every field that is not text, given as text."""
    cases = []
    for section, kind in [("", Config), *((f.name, f.type) for f in dataclasses.fields(Config))]:
        kind = typing.get_type_hints(Config).get(section, kind)
        if not dataclasses.is_dataclass(kind):
            continue
        for field, of in typing.get_type_hints(kind).items():
            where = f"{section}.{field}" if section else field
            value = {int: "1.5", float: "fast", bool: "maybe"}.get(of)
            if value:
                says = (f"config.{where}", repr(value), "it must be")
                cases.append(Case("config: type", f"{where}={value}", _override(f"{where}={value}"), says))
    return cases


def cases() -> list[Case]:
    found = _wrong_types()
    for text, value in OUT_OF_RANGE.items():
        field = text.partition("=")[0]
        rung = {"hgrn2": "hgrn2", "softmax": "hybrid", "rope_b": "llama"}.get(field.removeprefix("model.")[:6], "tnl")
        says = ("config.train." if value == "tokens a step" else f"config.{field}", value)
        if value == "GB":
            says = ("checkpoint_keep", "GB")
        found.append(Case("config: range", text, _override(text, rung), says))
    for text, says in CONTRADICTIONS.items():
        words, _, rung = text.partition("|")
        found.append(Case("config: contradiction", text, _override(words, rung or "tnl"), says))
    found += [Case("config: recipe", body, _recipe(body), says) for body, says in RECIPES.items()]
    found += [Case("config: recipe file", repr(content[:40]), _file(content), says) for content, says in FILES.items()]
    return found
