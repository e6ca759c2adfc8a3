import os

import jax
import pytest
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


@pytest.fixture(scope="session")
def ladder_folder(tmp_path_factory):
    return write_ladder(tmp_path_factory.mktemp("ladder") / "demo")
