"""Where a run begins: resumed, forked from another run, from another run's weights, or from nothing; in this order.

resume    its own newest checkpoint, whatever config.init says
fork      config.init.from_run: that run's parameters, optimizer, step and place in the data, as for a cooldown with
          another learning-rate schedule. Steps, tokens and FLOPs go on from there; the same batches follow.
weights   config.init.weights_only: that run's parameters alone, at step 0 of its own data
nothing   random parameters from config.seed
"""

import dataclasses
import json
from pathlib import Path

from linscale.config import Config, ConfigError
from linscale.training import checkpoint
from linscale.training.step import TrainState

# Fields of the model that change how it is computed, not what it is.
_HOW = ("dtype", "remat", "unroll", "attention")
# Fields that decide which tokens step n sees: a fork must have them too.
_ORDER = ("seed", "train.batch", "train.sequence")


def check(config: Config, fingerprint: str | None = None) -> None:
    """ConfigError if config.init.from_run cannot serve this config; fingerprint: of the corpus, once it is known."""
    if not config.init.from_run:
        return
    field, folder = f"config.init.from_run is {config.init.from_run!r}", Path(config.init.from_run)
    try:
        description = json.loads((folder / "config.json").read_text())
        theirs, data = description["config"], description["data"]["fingerprint"]
        model = theirs["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{field}, which is no run folder: its config.json cannot be read ({error}).") from error
    for name, value in dataclasses.asdict(config.model).items():
        if name not in _HOW and model.get(name) != value:
            raise ConfigError(f"{field}, whose config.model.{name} is {model.get(name)!r}; here it is {value!r}.")
    steps = checkpoint.steps_in(folder / "checkpoints")
    if not steps or config.init.step not in (0, *steps):
        have = ", ".join(map(str, steps)) or "no checkpoint at all"
        raise ConfigError(f"{field} and config.init.step {config.init.step}; that run has {have}.")
    if config.init.weights_only:
        return
    if "imported" in description:
        raise ConfigError(f"{field}, imported without an optimizer's state; set config.init.weights_only=true.")
    for name in _ORDER:
        section, _, key = name.rpartition(".")
        was = theirs.get(section, {}).get(key) if section else theirs.get(key)
        now = getattr(getattr(config, section), key) if section else getattr(config, key)
        if was != now:
            raise ConfigError(
                f"{field}, whose config.{name} is {was!r}; a fork sees the data in the same order, so it must not be "
                f"{now!r}. For other data set config.init.weights_only=true."
            )
    if (config.init.step or steps[-1]) >= config.steps:
        raise ConfigError(
            f"{field} at step {config.init.step or steps[-1]}, but this run ends at step {config.steps}; "
            "set config.train.steps or tokens, which count from the beginning of that run."
        )
    if fingerprint not in (None, data):
        raise ConfigError(
            f"{field}, trained on data with fingerprint {data}, but config.data gives {fingerprint}; a fork goes on in "
            "the same data. For other data set config.init.weights_only=true."
        )


def first(
    config: Config, series: checkpoint.Series, abstract: TrainState, from_nothing
) -> tuple[int, TrainState, dict | None, str]:
    """(steps done, state, place in the data or None for its beginning, a sentence on how the run begins).

    from_nothing: () -> the state before the first step.
    """
    if restored := checkpoint.restore(series, abstract):
        step, state, position = restored
        return step, state, position, f"continues after step {step}"
    if not config.init.from_run:
        return 0, from_nothing(), None, ""
    folder = Path(config.init.from_run) / "checkpoints"
    steps = [config.init.step] if config.init.step else checkpoint.steps_in(folder)
    if config.init.weights_only:
        step, tree, _, _ = checkpoint.read_newest(folder, steps, {"params": abstract.params})
        state = dataclasses.replace(from_nothing(), params=tree["params"])
        return 0, state, None, f"begins with the weights of {config.init.from_run} after step {step}"
    step, state, position, _ = checkpoint.read_newest(folder, steps, abstract)
    return step, state, position, f"forks from {config.init.from_run} after step {step}"
