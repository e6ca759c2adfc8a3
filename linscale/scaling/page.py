"""The HTML of a report: one file that loads nothing. Every text that comes from a file is escaped here.

Styles and the only script are page.css and page.js beside this file; the page's policy lets no other script run, and no
request leave. Without the script the page is whole: it adds values under the pointer, sorting, and a choice of hardware.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path

from linscale.scaling.appearance import COLOURS, NEUTRALS

VOID = ("input", "br")  # elements without an end


class Markup(str):
    """HTML that is safe as it is; any other str is escaped."""


def escape(value) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def element(name: str, /, *children, **attributes) -> Markup:
    """element('p', 'a < b', class_='note') -> <p class="note">a &lt; b</p>"""
    listed = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    end = "" if name in VOID else f"{''.join(map(escape, children))}</{name}>"
    return Markup(f"<{name}{listed}>{end}")


class Number(Markup):
    """A cell that sorts by its value, whatever it shows."""

    attributes: dict

    def __new__(cls, text, value: float):
        cell = super().__new__(cls, escape(text))
        cell.attributes = {"data-value": repr(float(value))}
        return cell


def table(head: Sequence, rows: Sequence[Sequence], words: int = 1, best: Sequence[tuple[int, int]] = ()) -> Markup:
    """The first `words` columns are left-aligned words, the others numbers; cells of `best` (row, column) are strong."""

    def cell(kind, value, i, strong=False):
        classes = ("word" if i < words else "number") + (" best" if strong else "")
        own = value.attributes if isinstance(value, Number) else {}
        if kind == "th" and value:
            value = element("button", value, type="button")
        return element(kind, value, class_=classes, **own)

    top = element("tr", *(cell("th", value, i) for i, value in enumerate(head)))
    body = [
        element("tr", *(cell("td", value, i, (r, i) in best) for i, value in enumerate(row)))
        for r, row in enumerate(rows)
    ]
    classes = "sortable" + (" wide" if len(head) > 11 else "")
    inner = element("table", element("thead", top), element("tbody", *body), class_=classes)
    return element("div", inner, class_="scroll", tabindex="0")


def figure(drawn, caption) -> Markup:
    """drawn comes from plots.save: an SVG element and its points. The caption may be Markup."""
    return element("figure", Markup(drawn.svg), data({"points": drawn.points}), element("figcaption", caption))


def data(content) -> Markup:
    """JSON inside a page: no character of it can end the element or begin another. ValueError for NaN."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json">{text}</script>')


def chip(arch: str, label: str) -> Markup:
    """The architecture's name with its colour before it."""
    return element("span", element("i", style=f"background:var(--{arch})"), label, class_="chip")


def power(value: float, digits: int = 2) -> Number:
    """1.26e14 -> 1.26 x 10^14 with a raised exponent."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    raised = element("sup", minus(int(exponent)))
    return Number(Markup(f"{mantissa}&#8201;&times;&#8201;10{raised}"), value)


def amount(value: float, digits: int = 2) -> Number:
    """Plain from 0.01 to 10,000, else as power(); digits after the first."""
    if not 0.01 <= value < 9999.5:
        return power(value, digits)
    return Number(f"{value:.{digits + 1}g}" if value < 100 else f"{value:,.0f}", value)


def minus(value, digits: int | None = None) -> str:
    """A number with a real minus sign."""
    text = str(value) if digits is None else f"{value:z.{digits}f}"  # z: no minus before zero
    return text.replace("-", "\N{MINUS SIGN}")


def page(title: str, body: Sequence[Markup]) -> str:
    """The whole document."""
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main><script>{script}</script></body></html>\n"
    )


def _style() -> str:
    colours = COLOURS | NEUTRALS
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in colours.items()) for i in (0, 1))
    return f"""
:root{{color-scheme:light dark;{light};--page:#fff;--card:#f6f7f9;--warn:#fff6e0;--edge:#e0b64a;
--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}}
@media (prefers-color-scheme:dark){{:root{{{dark};--page:#14181d;--card:#1c2229;--warn:#2d2716;--edge:#8a7330}}}}
@media print{{:root{{color-scheme:light;{light};--page:#fff;--card:#f6f7f9;--warn:#fff6e0;--edge:#e0b64a}}}}
{Path(__file__).with_name("page.css").read_text(encoding="utf-8")}"""
