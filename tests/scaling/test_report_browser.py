"""Pages of reports in a real browser: from disk, without network or complaints, light, dark, narrow, in print."""

import io

import chromium
import numpy as np
import PIL.Image
import pytest
from synthetic_ladder import write_ladder
from test_fit_page import COLUMNS, write_budgets, write_table

from linscale.scaling import appearance, fit, paper_command, report

pytestmark = pytest.mark.skipif(
    chromium.program() is None, reason="no Chromium is installed: `apt-get install chromium` runs these tests"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pages by kind, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("pages"), {}

    class Files:
        def __getitem__(self, kind):
            if kind not in made:
                made[kind] = make(kind, folder)
            return made[kind]

    return Files()


def make(kind: str, folder):
    if kind == "ladder":
        return report.write(write_ladder(folder / "ladder"))
    page = folder / kind
    if kind == "paper":
        assert paper_command.main(["--report", str(page)]) == 0
    elif kind == "isoflop":
        table = write_budgets(folder / "budgets.csv")
        assert fit.main([str(table), *COLUMNS, "--form", "isoflop", "--report", str(page)]) == 0
    else:
        options = ["--group", "arch", "--joint", "--profile", "--task", "acc", "--backtest", "3", "--report", str(page)]
        assert fit.main([str(write_table(folder / "table.csv")), *COLUMNS, *options]) == 0
    return page / "index.html"


def slow(kind):
    return pytest.param(kind, marks=pytest.mark.slow)


KINDS = ("ladder", slow("paper"), slow("forms"), slow("isoflop"))
COLUMN = """(column, table) => [...document.querySelectorAll('table')[table].tBodies[0].rows].map(
    row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim())"""


def colours(page) -> np.ndarray:
    """Of the whole page, [height, width], 0xrrggbb."""
    shown = np.asarray(PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB"), np.uint32)
    return shown[..., 0] << 16 | shown[..., 1] << 8 | shown[..., 2]


def code(colour: str) -> int:
    return int(colour[1:], 16)


@pytest.mark.parametrize("kind", ("ladder", "paper", *KINDS[2:]))
@pytest.mark.parametrize("dark", [False, True])
def test_opens_without_network_or_complaints_and_shows_its_figures(page, files, kind, dark):
    page.open(files[kind], dark=dark)
    assert page.complaints == [] and page.requests == [files[kind].as_uri()]
    shown = colours(page)
    assert shown[2, 2] == code("#14181d" if dark else "#ffffff")
    present = [name for name in appearance.COLOURS if page.evaluate(f"!!document.querySelector('svg [style*={name}]')")]
    assert present
    for name in present:
        assert (shown == code(appearance.COLOURS[name][dark])).sum() > 100, name
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
        page.settle()  # scrolling hides values
        page.move(place[0] + 1, place[1] - 1)
        tip = f"document.querySelectorAll('figure')[{number}].querySelector('.tip')"
        assert page.evaluate(f"{tip}.innerText") in place[2]
        box = page.evaluate(f"(() => {{ const r = {tip}.getBoundingClientRect(); return [r.left, r.right]; }})()")
        assert box[0] >= 0 and box[1] <= 1280 and box[1] - box[0] > 30
        page.evaluate(f"document.querySelectorAll('figure')[{number}].querySelector('svg').focus()")
        page.settle()
        page.send("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        assert page.evaluate(f"getComputedStyle({tip}).display") == "none"
        page.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        assert page.evaluate(f"{tip}.innerText") == place[2][0]
        tried += 1
    assert tried and page.complaints == []


@pytest.mark.parametrize("kind", KINDS)
def test_print_is_light_and_hides_what_needs_a_pointer(page, files, kind):
    page.open(files[kind], dark=True, media="print", width=794)
    assert colours(page)[2, 2] == 0xFFFFFF
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 33, 39)"
    wide = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.firstChild.scrollWidth - e.clientWidth)")
    assert max(wide) <= 0, "a table runs off the paper"
    content = page.pdf()
    assert content.startswith(b"%PDF") and len(content) > 20_000


def test_days_follow_the_chosen_hardware(page, files):
    """10 PFLOP/s-days on 100 v5p (459 TFLOP/s) at half the peak."""
    page.open(files["paper"])
    before = page.evaluate("document.querySelector('[data-flops]').textContent")
    set_ = "e.value = {}; e.dispatchEvent(new Event('input', {{bubbles: true}}));"
    page.evaluate(
        "(() => { const f = document.querySelector('form.hardware').elements; let e = f.chip;"
        + set_.format("[...f.chip.options].find(o => o.text.startsWith('v5p')).value")
        + "e = f.count;"
        + set_.format("'100'")
        + "e = f.mfu;"
        + set_.format("'50'")
        + "})()"
    )
    cells = page.evaluate("[...document.querySelectorAll('[data-flops]')].map(e => [e.dataset.flops, e.dataset.value])")
    for flops, days in cells:
        assert float(days) == pytest.approx(float(flops) / (100 * 459e12 * 0.5) / 86_400, rel=1e-3)
    assert page.evaluate("document.querySelector('[data-flops]').textContent") != before
    page.evaluate(
        "(() => { const e = document.querySelector('form.hardware').elements.mfu;" + set_.format("'0'") + "})()"
    )
    assert page.evaluate("document.querySelector('[data-flops]').dataset.value") == cells[0][1], (
        "nonsense changes nothing"
    )
