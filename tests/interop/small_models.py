"""Runs of small random models, to be exported."""

import dataclasses
import functools
from pathlib import Path

import jax

from linscale import models
from linscale.config import Config, Data, Model, Train
from linscale.interop import importing

SMALL = {"layers": 3, "width": 32, "heads": 2, "ffn": 48, "vocab_size": 264, "init_std": 0.15}
MODELS = {
    "llama": Model(arch="llama", **SMALL),
    "llama-untied": Model(arch="llama", tied=False, norm_epsilon=1e-5, rope_base=5e5, **SMALL),
    "hgrn2": Model(arch="hgrn2", ffn_activation="silu", **SMALL),
    "hgrn2-paper": Model(arch="hgrn2", **SMALL),
    "tnl": Model(arch="tnl", value_activation="silu", **SMALL),
    "cosformer2": Model(arch="cosformer2", **SMALL),
    "hybrid": Model(arch="hybrid", softmax_every=2, **SMALL),
}


@functools.cache
def _parameters(model: Model, seed: int) -> dict:
    """Random ones. Norms' scales and HGRN2's bounds are moved off their first values."""
    params = jax.device_get(jax.jit(lambda: models.init(model, seed))())
    keys = iter(jax.random.split(jax.random.key(seed), 100))

    def moved(path, x):
        if path[-1].key in ("scale", "lower_bound", "theta"):
            return jax.device_get(x + 0.3 * jax.random.normal(next(keys), x.shape) * x)
        return x

    return jax.tree_util.tree_map_with_path(moved, params)


def make_run(folder: Path, model: Model, seed: int = 5, sequence: int = 64, tokenizer: str = "bytes") -> Path:
    """A run of random parameters at step 0."""
    config = Config(
        name=folder.name,
        output=str(folder.parent),
        model=model,
        data=Data(tokenizer=tokenizer),
        train=Train(sequence=sequence),
    )
    folder.mkdir(parents=True)
    importing._write_run(folder, folder, config, _parameters(model, seed), {})
    return folder


def replaced(name: str, **fields) -> Model:
    return dataclasses.replace(MODELS[name], **fields)
