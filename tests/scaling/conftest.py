import os

import jax
import pytest
from synthetic_ladder import write_ladder

from linscale.scaling import minimise


@pytest.fixture(scope="session", autouse=True)
def quicker_fits():
    """At this level of XLA fits take less than half the time of level 0, and more than compiling then costs."""
    with pytest.MonkeyPatch.context() as patch:
        if "optimization_level=0" in os.environ.get("XLA_FLAGS", ""):
            options = {"xla_backend_optimization_level": 1}
            steps = jax.jit(minimise._steps.__wrapped__, static_argnums=(0, 1), compiler_options=options)
            patch.setattr(minimise, "_steps", steps)
        yield


@pytest.fixture(scope="session")
def ladder_folder(tmp_path_factory):
    return write_ladder(tmp_path_factory.mktemp("ladder") / "demo")
