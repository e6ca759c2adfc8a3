"""The model sizes of the paper (arXiv 2406.16690, tables 2 and 7), as corrected so that its own counts come out.

Tables 2 and 7 of the paper contradict each other; these sizes reproduce every printed parameter count and PFLOPs
figure: the head dim is 128 everywhere, the 1B model is d=1536 with 12 heads and g=4096, and the 410M models of TNL
and cosFormer2 have 25 layers against 26 of LLaMA and HGRN2.
"""

from linscale.config import ConfigError, Model

VOCAB = 100_280  # cl100k_base padded to a multiple of 8
HEAD_DIM = 128

# name: layers, width, ffn
_SIZES = {
    "70m": (6, 512, 1536),
    "160m": (12, 768, 2048),
    "410m": (26, 1024, 2816),
    "1b": (32, 1536, 4096),
    "3b": (35, 2560, 6912),
    "7b": (32, 4096, 11008),
}
SIZES = tuple(_SIZES)
_ASPECTS = {  # the 1B aspect-ratio study (paper table 5); d1536 is the 1b above
    "1b-d1536": (32, 1536, 4096),
    "1b-d1792": (24, 1792, 4864),
    "1b-d2048": (18, 2048, 5632),
    "1b-d3072": (8, 3072, 8192),
}
ASPECTS = tuple(_ASPECTS)


def paper_model(arch: str, size: str) -> Model:
    """The paper's model, e.g. paper_model("tnl", "410m"). Raises ConfigError for a size that does not exist."""
    sizes = _SIZES | _ASPECTS
    if size not in sizes:
        raise ConfigError(f"{size!r} is not a size; it must be one of {', '.join(sizes)}.")
    layers, width, ffn = sizes[size]
    if size == "410m" and arch in ("tnl", "cosformer2"):
        layers = 25
    return Model(arch=arch, layers=layers, width=width, heads=width // HEAD_DIM, ffn=ffn, vocab_size=VOCAB)
