"""Operators of linscale. They import jax and numpy and nothing else of the project."""

from linscale.kernels.axes import Axes
from linscale.kernels.cross_entropy import cross_entropy
from linscale.kernels.gated_unit import ACTIVATIONS, gated_unit
from linscale.kernels.linear_attention import linear_attention, linear_attention_step
from linscale.kernels.rms_norm import gated_rms_norm, rms_norm
from linscale.kernels.softmax_attention import documents_fit, softmax_attention

__all__ = [
    "ACTIVATIONS",
    "Axes",
    "cross_entropy",
    "documents_fit",
    "gated_rms_norm",
    "gated_unit",
    "linear_attention",
    "linear_attention_step",
    "rms_norm",
    "softmax_attention",
]
