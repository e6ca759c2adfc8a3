import os
from pathlib import Path

import jax
import pytest
from matplotlib.figure import Figure
from synthetic_ladder import write_ladder

from linscale.scaling import minimise

AT_LEVEL_1 = jax.jit(
    minimise._steps.__wrapped__, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 1}
)


@pytest.fixture
def many_fits(monkeypatch):
    """For tests whose fits run for longer than they compile: so they take less than half the time of XLA's level 0."""
    if "optimization_level=0" in os.environ.get("XLA_FLAGS", ""):
        monkeypatch.setattr(minimise, "_steps", AT_LEVEL_1)


@pytest.fixture(autouse=True)
def vectors_alone(monkeypatch):
    """An empty file stands for a PNG, which draws what the SVG beside it draws; fixtures of modules draw theirs."""
    draw = Figure.savefig

    def savefig(figure, file, **options):
        return Path(file).touch() if str(file).endswith(".png") else draw(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture(scope="session")
def ladder_folder(tmp_path_factory):
    return write_ladder(tmp_path_factory.mktemp("ladder") / "demo")
