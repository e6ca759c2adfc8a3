"""The four architectures and the hybrid behind six functions; see transformer.py."""

from linscale.models.transformer import forward, init, init_cache, logits, loss, validate

__all__ = ["forward", "init", "init_cache", "logits", "loss", "validate"]
