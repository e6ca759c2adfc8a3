"""A run directory opened for reading: its config, its tokenizer, the parameters of any of its checkpoints.

A ladder is a folder of such directories.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

from linscale.config import Config, ConfigError, resolve


@dataclasses.dataclass(frozen=True)
class Run:
    """`folder` holds config.json and checkpoints/, as `linscale train` and `linscale import` write them."""

    folder: Path
    content: dict  # of config.json
    config: Config

    @property
    def name(self) -> str:
        return self.content.get("name", self.folder.name)

    @property
    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        folder = self.folder / "checkpoints"
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    @property
    def context(self) -> int | None:
        """The longest sequence a model with softmax layers was trained on, in tokens; None where there is no limit."""
        return self.config.train.sequence if self.config.model.arch in ("llama", "hybrid") else None

    @functools.cached_property
    def tokenizer(self):
        """See linscale/data/tokenizers.py. Raises ConfigError."""
        from linscale.data import tokenizers

        spec = self.config.data.tokenizer
        if spec == "bytes" or spec.startswith("tiktoken:"):
            return tokenizers.load(spec)
        beside = self.folder / "tokenizer"
        if spec.startswith("hf:") and beside.is_dir():  # an imported run carries its own
            return tokenizers.load(f"hf:{beside}")
        return tokenizers.load(spec, str(self._trained_tokenizer()) if spec.startswith("bpe:") else None)

    @property
    def tokenizer_file(self) -> Path | None:
        """tokenizer.json behind a bpe or hf tokenizer; None for the other kinds."""
        spec = self.config.data.tokenizer
        if spec.startswith("bpe:"):
            return self._trained_tokenizer()
        if not spec.startswith("hf:"):
            return None
        beside = self.folder / "tokenizer"
        path = beside if beside.is_dir() else Path(spec.removeprefix("hf:")).expanduser()
        return path / "tokenizer.json" if path.is_dir() else path

    def _trained_tokenizer(self) -> Path:
        """tokenizer.json of a BPE trained on the run's corpus: in the run, in the corpus cache, or built again."""
        own = self.folder / "tokenizer.json"
        if own.is_file():
            return own
        data = self.config.data
        root = Path(data.cache or os.environ.get("LINSCALE_CACHE") or "~/.cache/linscale").expanduser()
        fingerprint = self.content.get("data", {}).get("fingerprint")
        cached = root / f"corpus-{fingerprint}" / "tokenizer.json"
        if cached.is_file():
            return cached
        from linscale.data import prepare

        corpus = prepare(data, self.config.model.vocab_size, log=lambda message: None)
        if corpus.fingerprint != fingerprint:
            raise ConfigError(
                f"{self.folder} was trained with a tokenizer made from data of fingerprint {fingerprint}, which is "
                f"neither in {own} nor in {cached}, and the data now have {corpus.fingerprint}; restore one of them."
            )
        return Path(corpus.folder) / "tokenizer.json"

    def step(self, wanted: int | None) -> int:
        """The wanted step, or the newest. Raises ConfigError where there is none."""
        steps = self.steps
        if not steps:
            raise ConfigError(f"{self.folder / 'checkpoints'} holds no checkpoint; train the run first.")
        if wanted is not None and wanted not in steps:
            raise ConfigError(f"{self.folder} has no checkpoint of step {wanted}; it has {', '.join(map(str, steps))}.")
        return steps[-1] if wanted is None else wanted

    def params(self, step: int | None = None, sharding=None) -> dict:
        """Parameters of one checkpoint, without the optimizer's state. sharding: for all arrays, or a tree of them.

        Raises ConfigError: no such checkpoint, arrays of other names or shapes than the model's.
        """
        import jax

        from linscale import models
        from linscale.training import checkpoint

        path = self.folder / "checkpoints" / str(self.step(step))
        shapes = jax.eval_shape(functools.partial(models.init, self.config.model), 0)
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if isinstance(sharding, jax.sharding.Sharding):
            sharding = jax.tree.map(lambda _: sharding, shapes)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding)
        try:
            return checkpoint.read(path, {"params": abstract})[0]["params"]
        except ConfigError:
            raise
        except Exception as error:  # what storage libraries raise on damaged files is open-ended
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"{path} cannot be read ({reason}); choose another step with --step.") from error

    def cost(self, step: int) -> dict:
        """Tokens and FLOPs up to `step`, and the nearest held-out loss at or before it; None for what is not known."""
        tokens = step * self.config.tokens_per_step
        per_token = self.content.get("flops_per_token")
        cost = {"tokens": tokens, "flops": per_token * tokens if per_token else None}
        cost |= {"heldout_loss": None, "heldout_bpb": None}
        path = self.folder / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else []:
            entry = json.loads(line)
            if "heldout_loss" in entry and entry["step"] <= step:
                cost |= {"heldout_loss": entry["heldout_loss"], "heldout_bpb": entry["heldout_bpb"]}
        return cost


def open_run(folder: str | Path) -> Run:
    """Raises ConfigError if the folder is no run directory."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run directory: it has no config.json; name one that linscale train wrote.")
    try:
        content = json.loads(path.read_text())
        tree = content["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it.") from error
    return Run(folder, content, resolve(tree))


def open_runs(folder: str | Path) -> list[Run]:
    """The run of a run directory, or all runs of a ladder, in its order. Raises ConfigError if it is neither."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return [open_run(folder)]
    ladder = folder / "ladder.json"
    if ladder.is_file():
        names = json.loads(ladder.read_text())["runs"]
        found = [folder / name for name in names if (folder / name / "config.json").is_file()]
    else:
        found = sorted(path.parent for path in folder.glob("*/config.json"))
    if not found:
        raise ConfigError(f"{folder} holds neither a run (config.json) nor runs in folders of their own.")
    return [open_run(path) for path in found]
