"""Names, colours and markers of the architectures, the same in every figure and on every page.

Okabe and Ito's colours, told apart by colour-blind readers.
"""

LABELS = {"llama": "LLaMA", "tnl": "TNL", "hgrn2": "HGRN2", "cosformer2": "cosFormer2", "hybrid": "Hybrid"}
COLOURS = {  # light page, dark page
    "llama": ("#0072b2", "#56b4e9"),
    "tnl": ("#d55e00", "#ff8f45"),
    "hgrn2": ("#009e73", "#2fcf9f"),
    "cosformer2": ("#b0508f", "#e59ac8"),
    "hybrid": ("#a88400", "#f0d54a"),
}
NEUTRALS = {"ink": ("#1c2127", "#e8ebef"), "muted": ("#5c6670", "#a3adb8"), "grid": ("#dfe3e8", "#333b45")}
MARKERS = {"llama": "o", "tnl": "s", "hgrn2": "^", "cosformer2": "D", "hybrid": "v"}


def style_of(name: str, index: int) -> tuple[str, str]:
    """Key of COLOURS and MARKERS, and label, of a group of runs of any name: its architecture's, else by its place."""
    known = name.lower()
    if known in COLOURS:
        return known, LABELS[known]
    return list(COLOURS)[index % len(COLOURS)], name


def plain(text: str) -> str:
    """A user's text for matplotlib: no formulas, nothing that cannot be drawn, not too long."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return (shown if len(shown) <= 60 else shown[:57] + "...").replace("$", r"\$")
