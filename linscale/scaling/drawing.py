"""What all figures share: style, logarithmic axes, values under the pointer, and saving.

Every figure is drawn once with matplotlib and saved as PNG, as an SVG file, and as an SVG element that a page inlines.
The element names its colours as CSS variables, so that the page decides about light and dark, and leaves the font to it.
"""

import dataclasses
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from linscale.scaling.appearance import COLOURS, NEUTRALS
from linscale.scaling.fit import short

INK, MUTED, GRID = (NEUTRALS[name][0] for name in ("ink", "muted", "grid"))

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "linscale",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}


def power_of_ten(exponent: int) -> str:
    """-8 -> '10⁻⁸': plain characters, so that text in SVG needs no layout of its own."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def scientific(x: float) -> str:
    """2e-10 -> '2·10⁻¹⁰', 1e-10 -> '10⁻¹⁰'."""
    mantissa, exponent = f"{x:.0e}".split("e")
    return ("" if mantissa == "1" else f"{mantissa}·") + power_of_ten(int(exponent))


def styled(draw):
    """A drawing function under the common style."""

    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    wrapper.__doc__ = draw.__doc__
    return wrapper


def decades(axes, label: str, between: float = 2.0) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(label)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: power_of_ten(round(np.log10(x)))))
    if np.log10(high / low) < between:  # few decades: name the values between
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=15))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x) if x >= 1 else scientific(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def loss_axis(axes, label: str) -> None:
    """Logarithmic with round numbers; a loss seldom spans a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(label)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure for a page."""

    svg: str  # an SVG element
    points: list[list]  # [x, y, text, colour or ""] in its user units: what a reader can point at


def hover(axes, x, y, texts, colour: str = "") -> None:
    """Says what is shown at the places (x, y) of the axes; colour is a name of COLOURS or NEUTRALS."""
    places = getattr(axes.figure, "hover", [])
    places += [(axes, *place, colour) for place in zip(np.atleast_1d(x), np.atleast_1d(y), texts)]
    axes.figure.hover = places


def save(figure: Figure, name: str, folder: Path) -> Drawn:
    """Writes folder/name.png and name.svg; the figure for a page has the ids of `name`."""
    with matplotlib.rc_context(_STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: it takes longer than drawing
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    begin = svg.index(">", svg.index("<svg")) + 1
    file = folder / f"{name}.svg"
    file.write_text(f'{svg[:begin]}<rect width="100%" height="100%" fill="#fff"/>{svg[begin:]}', encoding="utf-8")
    points = []
    for axes, x, y, text, colour in getattr(figure, "hover", []):
        # Positions are of the last drawing; SVG counts points of 1/72 inch, downward.
        across, up = axes.transData.transform((x, y)) * 72 / figure.dpi
        inside = axes.bbox.x0 - 1 <= across * figure.dpi / 72 <= axes.bbox.x1 + 1
        if inside and np.isfinite(up) and axes.bbox.y0 - 1 <= up * figure.dpi / 72 <= axes.bbox.y1 + 1:
            points.append([round(float(across), 1), round(72 * figure.get_figheight() - float(up), 1), text, colour])
    return Drawn(themed(svg, name), points)


def themed(svg: str, name: str) -> str:
    """matplotlib's SVG file as an element for a page: no prologue or metadata, own ids, CSS colours, the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"(font: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--font)", svg)
    for variable, (light, _) in (COLOURS | NEUTRALS).items():
        svg = re.sub(light, f"var(--{variable})", svg, flags=re.IGNORECASE)
    size = re.search(r'<svg[^>]*?width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    svg = svg.replace(f' width="{size[1]}pt" height="{size[2]}pt"', "", 1)
    return svg.replace("<svg", f'<svg role="img" aria-label="figure {name}"', 1)
