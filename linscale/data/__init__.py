"""Tokenised corpora and batches. Names load on first use, so that importing this costs nothing."""

import importlib

_HOMES = {"prepare": "corpus", "Corpus": "corpus"} | dict.fromkeys(
    ("check_batch", "train_batches", "heldout_batches", "rows_of", "documents_of"), "pipeline"
)
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
