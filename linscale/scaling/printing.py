"""Tables on the terminal and plain values for JSON."""

import math


def finite(value) -> float | None:
    return float(value) if math.isfinite(value) else None


def plain(entry: dict) -> dict:
    """JSON has no NaN and no numpy."""
    out = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            out[key] = plain(value)
        elif isinstance(value, tuple):
            out[key] = list(map(finite, value))
        else:
            out[key] = value if isinstance(value, str | bool) else finite(value)
    return out


def table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    cells = [[cell(value) for value in row] for row in rows]
    wide = [max(len(head[i]), *(len(row[i]) for row in cells)) for i in range(len(head))]
    out = ["  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(head, wide)))]
    out.append("-" * len(out[0]))
    for row in cells:
        out.append("  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(row, wide))))
    return out


def cell(value) -> str:
    if isinstance(value, str):
        return value[:40]
    return f"{value:.5g}" if math.isfinite(value) else "-"
