"""The four architectures and the hybrid behind seven functions; see transformer.py. Imports jax at first use."""

__all__ = ["by_documents", "forward", "init", "init_cache", "logits", "loss", "validate"]


def __getattr__(name):
    if name in __all__:  # counting and the command line need linscale.models.sizes without jax
        from linscale.models import transformer

        return getattr(transformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
