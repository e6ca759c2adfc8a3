"""The HTML of a report: one file, no scripts, nothing loaded. Every text that comes from a file is escaped here."""

import html
from collections.abc import Sequence

from linscale.scaling.plots import COLOURS, NEUTRALS


class Markup(str):
    """HTML that is safe as it is; any other str is escaped."""


def escape(value) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def element(name: str, *children, **attributes) -> Markup:
    """element('p', 'a < b', class_='note') -> <p class="note">a &lt; b</p>"""
    listed = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{listed}>{''.join(map(escape, children))}</{name}>")


def table(head: Sequence, rows: Sequence[Sequence], words: int = 1) -> Markup:
    """The first `words` columns are left-aligned words, the others numbers."""

    def cells(kind, row):
        return [element(kind, cell, class_="word" if i < words else "number") for i, cell in enumerate(row)]

    top = element("thead", element("tr", *cells("th", head)))
    body = element("tbody", *(element("tr", *cells("td", row)) for row in rows))
    return element("div", element("table", top, body), class_="scroll")


def figure(svg: str, caption) -> Markup:
    """svg comes from plots.save; the caption may be Markup."""
    return element("figure", Markup(svg), element("figcaption", caption))


def chip(arch: str, label: str) -> Markup:
    """The architecture's name with its colour before it."""
    return element("span", element("i", style=f"background:var(--{arch})"), label, class_="chip")


def power(value: float, digits: int = 2) -> Markup:
    """1.26e14 -> 1.26 x 10^14 with a raised exponent."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return Markup(f"{mantissa}&#8201;&times;&#8201;10{element('sup', minus(int(exponent)))}")


def minus(value, digits: int | None = None) -> str:
    """A number with a real minus sign."""
    text = str(value) if digits is None else f"{value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def page(title: str, body: Sequence[Markup]) -> str:
    """The whole document."""
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _style() -> str:
    colours = COLOURS | NEUTRALS
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in colours.items()) for i in (0, 1))
    return f"""
:root{{color-scheme:light dark;{light};--page:#fff;--card:#f6f7f9;--warn:#fff6e0;--edge:#e0b64a;
--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}}
@media (prefers-color-scheme:dark){{:root{{{dark};--page:#14181d;--card:#1c2229;--warn:#2d2716;--edge:#8a7330}}}}
@media print{{:root{{color-scheme:light;{light};--page:#fff;--card:#f6f7f9;--warn:#fff6e0;--edge:#e0b64a}}}}
{_RULES}"""


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 var(--font)}
main{max-width:1180px;margin:0 auto;padding:48px 24px 80px}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .6rem}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:3rem 0 .5rem;padding-top:1.2rem;border-top:1px solid var(--grid)}
p{margin:.5rem 0;max-width:75ch}
.lead{font-size:1.12rem;max-width:70ch}
.muted,figcaption,small{color:var(--muted)}
figcaption{font-size:.9rem;max-width:80ch;margin:.2rem 0 0}
figure{margin:1rem 0}
svg{display:block;width:100%;height:auto;font-family:var(--font)}
svg *{stroke-linejoin:round}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr));gap:8px 32px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px;margin:1.6rem 0}
.card{background:var(--card);border-radius:10px;padding:14px 18px;border-top:4px solid}
.card b{display:block;font-size:1.3rem;font-weight:600;margin:.25rem 0;white-space:nowrap}
.card small{display:block;line-height:1.5}
.chip{white-space:nowrap;font-weight:600}
.chip i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th{color:var(--muted);font-weight:600;text-align:right;vertical-align:bottom;border-bottom:1.5px solid var(--muted)}
th,td{padding:6px 8px}
th:first-child,td:first-child{padding-left:0}
td{border-bottom:1px solid var(--grid)}
.number{text-align:right;white-space:nowrap}
th.number{white-space:normal;line-height:1.3}
.word{text-align:left;min-width:8.5em;overflow-wrap:anywhere}
td small{display:block;font-size:.88em}
a{color:inherit}
.notes{background:var(--warn);border-left:4px solid var(--edge);border-radius:6px;padding:10px 18px;margin:1.4rem 0}
.notes ul{margin:.3rem 0;padding-left:1.2rem}
dt{font-weight:600;margin-top:.7rem}
dd{margin:0;max-width:80ch}
sup{line-height:0;font-size:.72em}
@media print{main{max-width:none;padding:0}body{font-size:11pt}figure,.card,tr{break-inside:avoid}
h2{break-after:avoid}.scroll{overflow:visible}table{font-size:7.5pt}th,td{padding:3px 4px}
.pair{grid-template-columns:1fr 1fr}.cards{grid-template-columns:repeat(4,1fr);gap:8px}
.card b{font-size:1.05rem}.card{padding:8px 12px;border:1px solid var(--grid);border-top:4px solid}}
"""
