from linscale.kernels.softmax_attention.api import softmax_attention
from linscale.kernels.softmax_attention.cudnn_packed import documents_fit

__all__ = ["documents_fit", "softmax_attention"]
