"""The schema of a run: frozen dataclasses, and the ml-collections ConfigDict that recipes edit.

The dataclasses below are the one place that names a field, its type, its default and its unit. `base()` turns them
into a locked, typed `ConfigDict` for recipes and for `--config.section.field=value`; `resolve()` turns an edited
ConfigDict back into a checked `Config`. Everything after the command line sees only `Config`.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"  # of runs: a folder inside config.output, on any file system
ARCHITECTURES = ("llama", "tnl", "hgrn2", "cosformer2", "hybrid")


class ConfigError(ValueError):
    """A value the user gave that cannot work. The message is one sentence; the command line exits with code 2."""


class Restart(Exception):
    """Training ended before the end of its run, through no fault of the config; the same command continues it."""

    code = 75  # exit code: EX_TEMPFAIL of sysexits.h, on which schedulers start a job again


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes and the choices the paper leaves open. Sizes of the paper: linscale/models/sizes.py."""

    arch: str = "tnl"  # llama | tnl | hgrn2 | cosformer2 | hybrid
    layers: int = 2
    width: int = 64  # d
    heads: int = 4  # h; head dim = d / h
    ffn: int = 192  # g, inner width of the gated linear unit
    vocab_size: int = 264  # at least the tokenizer's
    tied: bool = True  # one matrix for input embedding and output head, as the paper; False: two
    dtype: str = "auto"  # auto | float32 | bfloat16: compute; auto is float32 on CPU, bfloat16 elsewhere
    remat: str = "auto"  # auto | none | full | dots: what the backward pass recomputes; auto is dots on GPUs, else none
    unroll: int = 0  # layers per step of the loop over layers; 0: on GPUs all of them, in training; else 1
    attention: str = "auto"  # auto | scan | chunked | pallas_tpu | pallas_gpu: linear attention implementation
    init_std: float = 0.02  # normal initialisation of matrices and embedding
    tnl_decay: str = "alibi"  # alibi (released code) | exponential (TNL paper, eq. 10)
    value_activation: str = "none"  # none (paper) | silu (2024 TNL code): on v of tnl and cosformer2
    hgrn2_query_activation: str = "silu"  # silu (released code) | none (paper's printed equation)
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6  # added to the mean square in the norms of the residual stream
    hgrn2_norm_epsilon: float = 1e-6  # the same in the norm of HGRN2's outputs
    ffn_activation: str = "paper"  # paper (silu for llama's blocks, none for the others) | silu | none
    softmax_every: int = 8  # hybrid only: each n-th layer is softmax attention, the others are TNL


@dataclasses.dataclass(frozen=True)
class Data:
    """Where tokens come from. Tokenised once into a cache; see linscale/data."""

    source: str = "stdlib"  # stdlib | text | jsonl | parquet | tfds
    path: str = ""  # glob for text, jsonl, parquet; data set name (name/config:version) for tfds
    heldout_path: str = ""  # like path; empty: a fixed share of the documents is held out
    heldout_share: float = 0.02  # of the documents, chosen by a hash of their order; used if heldout_path is empty
    split: str = "train"  # tfds only
    heldout_split: str = ""  # tfds only; empty: heldout_share of split
    data_dir: str = ""  # tfds only: where the array_record files lie; empty is the library's default
    text_field: str = "text"  # jsonl, parquet, tfds
    separator: str = ""  # text only: splits a file into documents; empty: one document a file. "\\0" is NUL
    tokenizer: str = "bytes"  # bytes | bpe:ENTRIES | hf:FILE | sentencepiece:FILE | tiktoken:NAME-or-FILE
    cache: str = ""  # folder of tokenised corpora; empty: LINSCALE_CACHE or ~/.cache/linscale
    max_tokens: int = 0  # stop tokenising after this many training tokens; 0: all
    heldout_tokens: int = 65_536  # size of the fixed held-out set, in whole documents
    workers: int = 0  # grain worker processes


@dataclasses.dataclass(frozen=True)
class Train:
    tokens: int = 500_000  # to train on; rounded up to whole steps; ignored if steps is set
    steps: int = 0  # optimizer steps; 0: from tokens
    batch: int = 8  # sequences a step, over all hosts
    sequence: int = 256  # tokens a sequence
    accumulation: int = 1  # micro-batches a step; divides batch
    log_every: int = 10  # steps
    eval_count: int = 8  # held-out evaluations of a run, spaced evenly in log(step); the last is at the end
    checkpoint_every: int = 200  # steps
    checkpoint_keep: int = 2  # newest checkpoints kept
    checkpoint_keep_every: int = 0  # steps; checkpoints of its multiples are kept for good; 0: none
    checkpoint_chinchilla: str = ""  # multiples of 20 tokens a parameter saved and kept for good, as "0.5,1,2"
    spike_sigma: float = 6.0  # skip a step whose gradient norm is so many sigma over the last 128; 0: only non-finite
    skip_limit: int = 10  # skipped steps in a row after which training stops
    stop_seconds: float = 25.0  # from SIGTERM to exit, saving included; clouds and schedulers mostly give 30
    hang_seconds: float = 1800.0  # a step, evaluation or save that takes longer ends the process; 0: never
    deterministic: bool = False  # GPU: only operations that give the same bits each time, somewhat slower


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam with decoupled weight decay, as the paper: 3e-4, constant after the warm-up, decay 0.1, clip 1.0."""

    learning_rate: float = 3e-4
    schedule: str = "constant"  # constant | cosine | wsd (warm-up, stable, decay)
    warmup_tokens: int = 20_000
    decay_share: float = 0.2  # wsd: share of the steps in the final linear decay
    final_share: float = 0.1  # cosine, wsd: final learning rate over the peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices and embedding
    clip: float = 1.0  # global norm of the gradient
    theta_share: float = 1.0  # cosFormer2's angles: the unit they are learned in; 0: kept, no gradient
    offload: bool = False  # keep Adam's moments, 8 bytes a parameter, in the host's memory between updates


@dataclasses.dataclass(frozen=True)
class Init:
    """How a run begins where it has no checkpoint of its own; see linscale/training/start.py."""

    from_run: str = ""  # folder of another run; empty: random parameters
    step: int = 0  # its checkpoint to take; 0: the newest
    weights_only: bool = False  # true: parameters alone, at step 0; false: go on from its step, optimizer and data


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 (one axis at most) is what the others leave of them. See linscale/sharding.py."""

    data: int = -1  # copies of the parameters, each with its own rows of the batch
    fsdp: int = 1  # parts of the parameters and the optimizer's moments, each with its own rows too
    sequence: int = 1  # parts of every row (context parallelism)
    tensor: int = 1  # parts of heads, of the gated linear unit and of the vocabulary


@dataclasses.dataclass(frozen=True)
class Log:
    tensorboard: bool = True
    wandb_project: str = ""  # empty: off


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "run"  # folder of the run inside output
    output: str = "runs"  # folder of runs
    seed: int = 0
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    init: Init = Init()
    mesh: Mesh = Mesh()
    log: Log = Log()

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch * self.train.sequence

    @property
    def steps(self) -> int:
        return self.train.steps or math.ceil(self.train.tokens / self.tokens_per_step)


def base():
    """All fields with their defaults, as a locked `ml_collections.ConfigDict` for a recipe to edit."""
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def resolve(config: Any) -> Config:
    """ConfigDict or dict -> checked Config. Raises ConfigError: unknown field, wrong type, value that cannot work."""
    resolved = build(config)
    _check(resolved)
    return resolved


def build(config: Any) -> Config:
    """`resolve` without looking at the values, so that what an override will still change may be wrong."""
    tree = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(tree, Mapping):
        raise ConfigError(f"a config must be a ConfigDict or a dict, but it is {tree!r:.200}.")
    return _build(Config, tree, "")


def _build(cls, tree: dict, prefix: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(map(str, set(tree) - set(fields))):
        raise ConfigError(f"config.{prefix}{unknown[0]} is not a field; {prefix or 'the top level '}has {_names(cls)}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        kind, where = hints[name], f"config.{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where} is {value!r}; it must be a section with {_names(kind)}.")
            values[name] = _build(kind, dict(value), f"{prefix}{name}.")
            continue
        if kind is float and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{where} is {value!r}, a {type(value).__name__}; it must be a {kind.__name__}.")
        values[name] = value
    return cls(**values)


def _names(cls) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _check(c: Config) -> None:
    def one_of(where, value, allowed):
        if value not in allowed:
            raise ConfigError(f"config.{where} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")

    def at_least(where, value, low):
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"config.{where} is {value}; it must be at least {low}.")

    def within(where, value, low, high):
        if not low <= value <= high:
            raise ConfigError(f"config.{where} is {value}; it must lie between {low} and {high}.")

    _check_texts(c, "")
    if not re.fullmatch(NAME, c.name):
        raise ConfigError(
            f"config.name is {c.name!r}; it must be letters, digits, '.', '_' and '-', starting with a letter or "
            "digit, at most 200."
        )
    if not c.output:
        raise ConfigError("config.output is empty; it must name a folder.")
    within("seed", c.seed, 0, 2**31 - 1)
    m, d, t, o = c.model, c.data, c.train, c.optimizer
    one_of("model.arch", m.arch, ARCHITECTURES)
    one_of("model.dtype", m.dtype, ("auto", "float32", "bfloat16"))
    one_of("model.remat", m.remat, ("auto", "none", "full", "dots"))
    one_of("model.attention", m.attention, ("auto", "scan", "chunked", "pallas_tpu", "pallas_gpu"))
    one_of("model.tnl_decay", m.tnl_decay, ("alibi", "exponential"))
    one_of("model.value_activation", m.value_activation, ("none", "silu"))
    one_of("model.hgrn2_query_activation", m.hgrn2_query_activation, ("none", "silu"))
    one_of("model.ffn_activation", m.ffn_activation, ("paper", "silu", "none"))
    within("model.norm_epsilon", m.norm_epsilon, 0.0, 1.0)
    within("model.hgrn2_norm_epsilon", m.hgrn2_norm_epsilon, 0.0, 1.0)
    for field, most in (
        ("layers", 10_000),
        ("width", 2**20),
        ("heads", 2**20),
        ("ffn", 2**22),
        ("vocab_size", 2**24),
    ):
        within(f"model.{field}", getattr(m, field), 1, most)
    within("model.unroll", m.unroll, 0, 10_000)
    within("model.rope_base", m.rope_base, 1.0, 1e12)
    at_least("model.init_std", m.init_std, 0)
    at_least("model.softmax_every", m.softmax_every, 2)
    if m.width % m.heads:
        raise ConfigError(
            f"config.model.heads is {m.heads}, which does not divide config.model.width {m.width}; choose a divisor of it."
        )
    if m.arch in ("llama", "hybrid") and (m.width // m.heads) % 2:
        raise ConfigError(
            f"config.model.heads is {m.heads}, a head dim of {m.width // m.heads}; rotary embedding needs an even head dim."
        )

    one_of("data.source", d.source, ("stdlib", "text", "jsonl", "parquet", "tfds"))
    if d.source != "stdlib" and not d.path:
        raise ConfigError(
            f"config.data.path is empty; config.data.source={d.source!r} needs a file pattern or data set name."
        )
    if not re.fullmatch(r"bytes|bpe:[0-9]+|(hf|sentencepiece|tiktoken):.+", d.tokenizer):
        raise ConfigError(
            f"config.data.tokenizer is {d.tokenizer!r}; it must be bytes, bpe:ENTRIES, hf:FILE, sentencepiece:FILE or tiktoken:NAME."
        )
    within("data.heldout_share", d.heldout_share, 0.0, 0.5)
    at_least("data.max_tokens", d.max_tokens, 0)
    within("data.workers", d.workers, 0, 1024)
    at_least("data.heldout_tokens", d.heldout_tokens, 1)

    for field in (
        "batch",
        "sequence",
        "accumulation",
        "log_every",
        "checkpoint_every",
        "checkpoint_keep",
        "skip_limit",
    ):
        at_least(f"train.{field}", getattr(t, field), 1)
    within("train.eval_count", t.eval_count, 1, 100_000)
    for field in ("spike_sigma", "checkpoint_keep_every"):
        at_least(f"train.{field}", getattr(t, field), 0)
    for field in ("stop_seconds", "hang_seconds"):
        within(f"train.{field}", getattr(t, field), 0.0, 1e6)
    if not re.fullmatch(r"( *\d+(\.\d+)? *(, *\d+(\.\d+)? *)*)?", t.checkpoint_chinchilla):
        raise ConfigError(
            f"config.train.checkpoint_chinchilla is {t.checkpoint_chinchilla!r}; it must be numbers with commas between, "
            "as '0.5,1,2', or empty."
        )
    if any(float(multiple) == 0 for multiple in t.checkpoint_chinchilla.split(",") if multiple.strip()):
        raise ConfigError(
            f"config.train.checkpoint_chinchilla is {t.checkpoint_chinchilla!r}; its numbers must be above 0."
        )
    at_least("init.step", c.init.step, 0)
    if (c.init.step or c.init.weights_only) and not c.init.from_run:
        raise ConfigError("config.init.from_run is empty, but config.init.step or weights_only is set; name a run.")
    within("train.steps", t.steps, 0, 2**31 - 1)
    at_least("train.tokens", t.tokens, 0 if t.steps else 1)
    if c.steps >= 2**31:  # steps are counted in int32
        raise ConfigError(
            f"config.train.tokens is {t.tokens}, which makes {c.steps} steps of {c.tokens_per_step} tokens; there must "
            f"be fewer than {2**31}."
        )
    if t.batch % t.accumulation:
        raise ConfigError(
            f"config.train.accumulation is {t.accumulation}, which does not divide config.train.batch {t.batch}."
        )

    one_of("optimizer.schedule", o.schedule, ("constant", "cosine", "wsd"))
    for field in ("learning_rate", "eps", "weight_decay", "clip", "warmup_tokens"):
        at_least(f"optimizer.{field}", getattr(o, field), 0)
    for field in ("decay_share", "final_share", "theta_share"):
        within(f"optimizer.{field}", getattr(o, field), 0.0, 1.0)
    _check_mesh(c.mesh)
    for field in ("beta1", "beta2"):  # the correction of the bias divides by 1 - beta
        if not 0 <= getattr(o, field) < 1:
            raise ConfigError(f"config.optimizer.{field} is {getattr(o, field)}; it must be at least 0 and below 1.")


def _check_mesh(mesh: Mesh) -> None:
    sizes = dataclasses.asdict(mesh)
    for name, size in sizes.items():
        if size != -1 and not 1 <= size <= 2**20:
            raise ConfigError(f"config.mesh.{name} is {size}; it must be a number of devices, or -1 for the rest.")
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(
            f"config.mesh has -1 for {', '.join(n for n in sizes if sizes[n] == -1)}; one axis may have it."
        )


def _check_texts(section: Any, prefix: str) -> None:
    """No text, except separators of documents, may hold what no path and no terminal should be given."""
    for field in dataclasses.fields(section):
        value, where = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            _check_texts(value, f"{where}.")
        if not isinstance(value, str) or where == "data.separator":
            continue
        if len(value) > 4096:
            raise ConfigError(f"config.{where} has {len(value)} characters; it must have at most 4096.")
        if not value.isprintable():
            raise ConfigError(f"config.{where} is {value!r}; it must hold no control characters or broken Unicode.")
