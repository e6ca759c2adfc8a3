"""linscale: train, evaluate and fit scaling laws for linear-complexity language models in JAX."""

__version__ = "0.1.0"
