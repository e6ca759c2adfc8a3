from linscale.kernels.rms_norm.api import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
