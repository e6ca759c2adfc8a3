from linscale.kernels.gated_unit.api import ACTIVATIONS, gated_unit

__all__ = ["ACTIVATIONS", "gated_unit"]
