import dataclasses
import json
import textwrap
from pathlib import Path

import pytest

from linscale.config import Data, Init, base, resolve
from linscale.training import loop, metrics

RECIPE = '''
"""A run of seconds, for tests."""
from linscale.config import base

RUNGS = ("llama", "tnl", "hgrn2", "cosformer2")


def get_config(rung):
    config = base()
    config.name, config.model.arch = rung, rung
    config.model.width, config.model.heads, config.model.ffn = 32, 2, 48
    config.train.batch, config.train.sequence, config.train.steps = 4, 32, 40
    config.train.log_every, config.train.checkpoint_every, config.train.eval_count = 2, 7, 4
    config.optimizer.learning_rate, config.optimizer.warmup_tokens = 1e-2, 512
    config.data.source, config.data.heldout_tokens = "text", 1000
    config.data.heldout_share = 0.2
    config.log.tensorboard = False
    return config
'''


PROGRAMS = {}


@pytest.fixture(autouse=True)
def programs_shared(monkeypatch):
    """Runs of this process that differ only in folders, data and where they begin are traced once."""
    compile_programs = loop.compile_programs

    def shared(config, abstract, mesh):
        key = dataclasses.replace(config, name="", output="", data=Data(), init=Init()), mesh
        if key not in PROGRAMS:
            PROGRAMS[key] = compile_programs(config, abstract, mesh)
        return PROGRAMS[key]

    monkeypatch.setattr(loop, "compile_programs", shared)


@pytest.fixture
def recipe(tmp_path):
    """Path of a recipe with a rung for each architecture. Its data and output lie in tmp_path, see `options`."""
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def options(tmp_path):
    """Command-line overrides that keep a run inside tmp_path: many short documents, so that rows are packed."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        words = " ".join(str((i * 37 + j * j) % 101) for j in range(20 + 7 * (i % 11)))
        (texts / f"{i:02}.txt").write_text(textwrap.fill(f"document {i}: {words}", 60))
    return [
        f"--config.data.path={texts}/*.txt",
        f"--config.data.cache={tmp_path / 'cache'}",
        f"--config.output={tmp_path / 'runs'}",
    ]


@pytest.fixture
def make(recipe, options):
    """make("tnl", **{"train.steps": 5}) -> Config of that rung with these changes."""
    from linscale.training import recipes

    def build(rung="tnl", **changes):
        overrides = recipes.split(options, "train") + [(field, str(value)) for field, value in changes.items()]
        return recipes.load_run(f"{recipe}:{rung}", overrides)

    return build


@pytest.fixture
def plain():
    """plain(**{"optimizer.schedule": "wsd"}) -> Config without a recipe or data."""

    def build(**changes):
        config = base()
        config.update_from_flattened_dict(changes)
        return resolve(config)

    return build


@pytest.fixture
def exact():
    """exact(run folder) -> metrics.jsonl without timing fields: what two runs of one config share bit for bit."""

    def read(folder: Path) -> list[dict]:
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in metrics.TIMING} for line in lines]

    return read
