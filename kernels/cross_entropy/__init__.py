from linscale.kernels.cross_entropy.chunked import cross_entropy

__all__ = ["cross_entropy"]
