"""What tests of the Hopper kernels share: where they can run, and the program a GPU would get."""

import jax
import pytest

from linscale.kernels.hopper import on_hopper

old = tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11)
lowers = pytest.mark.skipif(old, reason=f"jax {jax.__version__} lowers Mosaic GPU kernels of jax >= 0.11 only")
emulates = pytest.mark.skipif(old, reason=f"jax {jax.__version__} has no Mosaic GPU as of jax >= 0.11")
hopper = pytest.mark.skipif(not on_hopper(), reason="no Hopper GPU here")


def lowered(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
