"""Pages of reports in a real browser: from disk, without network or complaints, light, dark, narrow, in print."""

import io

import chromium
import matplotlib.image
import numpy as np
import pytest
from synthetic_ladder import write_ladder

from linscale.scaling import drawing, report

pytestmark = pytest.mark.skipif(
    chromium.program() is None, reason="no Chromium is installed: `apt-get install chromium` runs these tests"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A page of every kind."""
    return {"ladder": report.write(write_ladder(tmp_path_factory.mktemp("pages") / "ladder"))}


KINDS = ("ladder",)
COLUMN = """(column, table) => [...document.querySelectorAll('table')[table].tBodies[0].rows].map(
    row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim())"""


def pixels(page) -> np.ndarray:
    return (matplotlib.image.imread(io.BytesIO(page.screenshot()))[..., :3] * 255).round().astype(int)


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dark", [False, True])
def test_opens_without_network_or_complaints_and_shows_its_figures(page, files, kind, dark):
    page.open(files[kind], dark=dark)
    assert page.complaints == [] and page.requests == [files[kind].as_uri()]
    shown = pixels(page)
    assert abs(shown[2, 2] - rgb("#14181d" if dark else "#ffffff")).max() == 0
    present = [name for name in drawing.COLOURS if page.evaluate(f"!!document.querySelector('svg [style*={name}]')")]
    assert present
    for name in present:
        assert (abs(shown - rgb(drawing.COLOURS[name][dark])).max(-1) < 3).sum() > 100, name
    boxes = page.evaluate("[...document.querySelectorAll('figure svg')].map(e => [e.clientWidth, e.clientHeight])")
    assert boxes and min(min(box) for box in boxes) > 150


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_no_width_needs_scrolling_sideways(page, files, kind, width):
    page.open(files[kind], width=width)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_sorts_both_ways_at_a_click(page, files, kind):
    page.open(files[kind])
    for table in range(page.evaluate("document.querySelectorAll('table.sortable').length")):
        columns = page.evaluate(f"document.querySelectorAll('table')[{table}].tHead.rows[0].cells.length")
        page.evaluate(f"document.querySelectorAll('table')[{table}].id = 'chosen'")
        whole = sorted(page.evaluate("[...document.querySelector('#chosen').tBodies[0].rows].map(r => r.textContent)"))
        for column in range(columns):
            for turn in (1, -1):
                page.click("#chosen th button", column)
                cells = page.evaluate(f"({COLUMN})({column}, {table})")
                numbers = [
                    float(c.replace(",", "").replace("\N{MINUS SIGN}", "-").rstrip(" %")) for c in cells if plain(c)
                ]
                assert numbers == sorted(numbers, reverse=turn < 0), (kind, table, column)
                assert all(map(plain, cells[: len(numbers)])), "words and empty cells come last"
        rows = page.evaluate("[...document.querySelector('#chosen').tBodies[0].rows].map(r => r.textContent)")
        assert sorted(rows) == whole, "rows stay whole"
        page.evaluate("document.querySelector('#chosen').id = ''")
    assert page.complaints == []


def plain(cell: str) -> bool:
    try:
        float(cell.replace(",", "").replace("\N{MINUS SIGN}", "-").removesuffix(" %"))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_values_show_under_the_pointer_and_by_keys(page, files, kind):
    page.open(files[kind])
    figures = page.evaluate("document.querySelectorAll('figure').length")
    tried = 0
    for number in range(figures):
        if not page.evaluate(f"!!document.querySelectorAll('figure')[{number}].querySelector('script')"):
            continue
        place = page.evaluate(
            f"""(() => {{ const f = document.querySelectorAll('figure')[{number}];
            const p = JSON.parse(f.querySelector('script').textContent).points, q = p[p.length >> 1];
            const s = f.querySelector('svg'); s.scrollIntoView({{block: 'center'}});
            const at = new DOMPoint(q[0], q[1]).matrixTransform(s.getScreenCTM());
            return [at.x, at.y, p.map(r => r[2])]; }})()"""
        )
        page.move(place[0] + 1, place[1] - 1)
        tip = f"document.querySelectorAll('figure')[{number}].querySelector('.tip')"
        assert page.evaluate(f"{tip}.innerText") in place[2]
        box = page.evaluate(f"(() => {{ const r = {tip}.getBoundingClientRect(); return [r.left, r.right]; }})()")
        assert box[0] >= 0 and box[1] <= 1280 and box[1] - box[0] > 30
        page.evaluate(f"document.querySelectorAll('figure')[{number}].querySelector('svg').focus()")
        page.send("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        assert page.evaluate(f"getComputedStyle({tip}).display") == "none"
        page.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        assert page.evaluate(f"{tip}.innerText") == place[2][0]
        tried += 1
    assert tried and page.complaints == []


@pytest.mark.parametrize("kind", KINDS)
def test_print_is_light_and_hides_what_needs_a_pointer(page, files, kind):
    page.open(files[kind], dark=True, media="print", width=794)
    assert abs(pixels(page)[2, 2] - 255).max() == 0
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 33, 39)"
    wide = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.firstChild.scrollWidth - e.clientWidth)")
    assert max(wide) <= 0, "a table runs off the paper"
    content = page.pdf()
    assert content.startswith(b"%PDF") and len(content) > 20_000
