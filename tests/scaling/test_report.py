"""The report: self-contained, escaped, complete, and honest about unfinished runs."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_ladder import SHAPES, rung, write_ladder, write_run

from linscale.config import ConfigError
from linscale.scaling import appearance, drawing, envelope_page, fit, flops, laws, paper, plots, report, runs

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balanced(HTMLParser):
    """Collects tags and text, and fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.ids, self.scripts = [], [], [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ladder(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def html(folder):
    return report.write(folder).read_text(encoding="utf-8")


def test_main_prints_the_path_last(tmp_path, capsys):
    for shape in SHAPES[:2]:
        write_run(tmp_path, rung("tnl", shape), lambda tokens: 20 * tokens**-0.2)
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report" / "index.html")


def test_the_page_loads_nothing(html):
    parsed = Balanced(html)
    assert not {"link", "img", "iframe", "object", "embed", "image"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith("#") or value == "fit.json", (name, value)
        assert not name.startswith("on"), "a script that the policy does not name"
    assert not re.search(r"url\((?!#)|@import", html)
    remaining = html.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert not re.search(r"https?://", remaining)


def test_the_policy_names_the_only_script(html):
    """Another script would not run: the policy has the digest of this one, and data are not scripts."""
    parsed = Balanced(html)
    policy = next(value for name, value in parsed.attributes if name == "content" and "default-src" in value)
    (code,) = [text for text in parsed.scripts if not text.startswith("{")]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    for text in parsed.scripts:
        if text != code:
            assert json.loads(text)["points"] and "<" not in text


def test_values_under_the_pointer_lie_where_the_points_are_drawn(folder, tmp_path):
    """The marker that matplotlib draws for a point and the point's place for the pointer are the same."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    x, y = [3.0, 40.0, 700.0], [2.0, 5.0, 3.0]
    axes.plot(x, y, "o", gid="series")
    drawing.hover(axes, x, y, ["a", "b", "c"], "tnl")
    drawn = drawing.save(figure, "where", tmp_path)
    group = drawn.svg[drawn.svg.index('id="where-series"') :]
    uses = re.findall(r'<use xlink:href="#[^"]+" x="([\d.]+)" y="([\d.]+)"', group)[:3]
    assert [text for _, _, text, _ in drawn.points] == ["a", "b", "c"]
    for (left, top), (px, py, _, colour) in zip(uses, drawn.points):
        assert (px, py) == pytest.approx((float(left), float(top)), abs=0.2) and colour == "tnl"


def test_ids_are_unique_and_resolve(html):
    parsed = Balanced(html)
    assert len(parsed.ids) == len(set(parsed.ids))
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert wanted and wanted <= set(parsed.ids)


def test_figures_follow_the_page_theme(html):
    """Colours are CSS variables that both themes define."""
    figures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert len(re.findall(r'<svg[^>]*role="img"', html)) == 9
    assert set(re.findall(r"var\(--(\w+)\)", figures)) <= {"font", *appearance.COLOURS, *appearance.NEUTRALS}
    assert not re.search(r"(fill|stroke): #(?!ffffff)", figures), "a colour that does not change with the theme"
    assert "prefers-color-scheme:dark" in html and "@media print" in html
    assert "DejaVu" not in figures


def test_png_files_and_json(folder, html):
    names = {file.name for file in (folder / "report").iterdir()}
    figures = {f"compute-{arch}.png" for arch in paper.TABLE3} | {"comparison.png", "parameters.png", "training.png"}
    figures |= {"n-opt.png", "d-opt.png"}
    assert names == figures | {name.replace(".png", ".svg") for name in figures} | {"index.html", "fit.json"}
    assert all((folder / "report" / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    for name in figures:
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((folder / "report" / "fit.json").read_text())["fits"]) == 4


def test_every_run_and_its_numbers_are_there(folder, html):
    text = " ".join(Balanced(html).text)
    for run in runs.read([folder]).runs:
        assert run.name in text
        assert f"{run.heldout.loss[-1]:.4f}" in text and f"{run.heldout_bpb:.4f}" in text
        assert f"{run.parameters.total:,}" in text and f"{run.parameters.nonembedding:,}" in text
    for published in paper.TABLE3.values():
        assert f"{published.loss.coefficient:.4f}" in text
        for law in (published.loss, published.parameters, published.tokens):
            assert f"{law.exponent:.4f}".replace("-", "\N{MINUS SIGN}") in text
    assert "the text of the Python standard library" in text and "exact accounting" in text


def test_hostile_names_are_escaped(tmp_path):
    hostile = '"><script>alert(1)</script>&amp;'
    for shape in SHAPES[:2]:
        path = write_run(tmp_path, rung("tnl", shape), lambda tokens: 20 * tokens**-0.2)
        description = json.loads((path / "config.json").read_text())
        description["name"] = hostile + path.name
        description["config"]["data"].update(source="text", path="<b onload=x>/*.txt")
        (path / "config.json").write_text(json.dumps(description))
    parsed = Balanced(report.write(tmp_path).read_text(encoding="utf-8"))
    assert not any("alert" in text for text in parsed.scripts if not text.startswith("{"))
    assert "onload" not in dict(parsed.attributes)
    text = "".join(parsed.text)
    assert hostile + "tnl-58k" in text and "<b onload=x>/*.txt" in text


def test_unfinished_and_missing_runs_are_shown_as_such(tmp_path):
    configs = [rung("tnl", shape) for shape in SHAPES[:3]]
    for i, config in enumerate(configs):
        write_run(tmp_path, config, lambda tokens: 20 * tokens**-0.2, finished=i < 2)
    names = [config.name for config in configs] + ["tnl-9m"]
    (tmp_path / "ladder.json").write_text(json.dumps({"recipe": "r", "runs": names}))
    text = " ".join(Balanced(report.write(tmp_path).read_text(encoding="utf-8")).text)
    assert f"{names[2]} (unfinished)" in text and "tnl-9m (not started)" in text
    assert f"Not finished, so not in the fit: {names[2]}, tnl-9m." in text


def test_without_any_law_there_is_still_a_page(tmp_path):
    write_run(tmp_path, rung("hybrid", (8, 48, 3, 128)), lambda tokens: 20 * tokens**-0.2)
    html = report.write(tmp_path).read_text(encoding="utf-8")
    assert "hybrid has 1 finished of 1 runs" in html and "Side by side" not in html
    assert not (tmp_path / "report" / "comparison.png").exists()


def test_nothing_to_report_is_a_sentence(tmp_path):
    path = write_run(tmp_path, rung("tnl", SHAPES[0]), lambda tokens: 20 * tokens**-0.2, finished=False)
    (path / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="no run with a logged loss"):
        report.write(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    write_run(tmp_path, rung("tnl", SHAPES[0]), lambda tokens: 20 * tokens**-0.2)
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write(tmp_path)


def test_one_colour_and_marker_an_architecture():
    assert set(appearance.COLOURS) == set(appearance.MARKERS) == set(appearance.LABELS)
    for values in (appearance.MARKERS.values(), *zip(*appearance.COLOURS.values())):
        assert len(set(values)) == len(appearance.LABELS)


def test_curves_are_thinned_without_their_ends(folder):
    run = max(runs.read([folder]).runs, key=lambda run: len(run.train))
    thin = plots._thin(run.train, 50)
    assert len(thin) <= 50 and thin.tokens[0] == run.train.tokens[0] and thin.tokens[-1] == run.train.tokens[-1]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """TNL at 3 sizes x 4 lengths: enough for L(N, D); and two runs of HGRN2."""
    folder = tmp_path_factory.mktemp("wide")
    for arch, times in (("tnl", (4, 10, 25, 60)), ("hgrn2", (6,))):
        for shape in SHAPES[:3]:
            for ratio in times:
                config = rung(arch, shape, f"{arch}-{shape[1]}-{ratio}", ratio, floor=100_000)
                n = flops.count_parameters(config.model).nonembedding
                write_run(
                    folder, config, lambda t, n=n: 0.8 + 30 * n**-0.3 + 60 * t**-0.32, noise=0.002, seed=ratio + n
                )
    return folder


def test_with_enough_runs_the_report_has_the_law_of_size_and_tokens(wide, capsys):
    options = ["--hardware", "v5e:4x4", "--budget", "1e13", "1e14", "--resamples", "150"]
    assert report.main([str(wide), *options]) == 0
    html = (wide / "report" / "index.html").read_text(encoding="utf-8")
    text = " ".join("".join(Balanced(html).text).split())
    content = json.loads((wide / "report" / "fit.json").read_text())
    (law,) = content["L(N, D)"]
    assert law["arch"] == "tnl" and law["n_runs"] == 12 and len(law["optimal"]) == 2
    assert f"{law['coefficients']['alpha']:.4g}" in text and "Coefficients of L(N, D)" in text
    assert "hgrn2 has 3 finished runs; L(N, D) has 5 coefficients" in text
    assert (wide / "report" / "contours.svg").exists() and (wide / "report" / "residuals.png").exists()
    for best in law["optimal"]:
        assert fit.short(best["n"]) in text and fit.short(best["d"]) in text
    # 1e14 FLOPs on 16 chips of 197 TFLOP/s at 40 %
    assert f"{1e14 / (16 * 197e12 * 0.4):.3g} seconds" in text


def test_budgets_of_the_envelope_law_have_intervals_and_time(folder, html):
    ladder = runs.read([folder])
    fits, _ = laws.fit_ladder(ladder)
    text = " ".join("".join(Balanced(html).text).split()).replace("\N{MINUS SIGN}", "-")
    for law in fits.values():
        for at in envelope_page.round_budgets(fits):
            low, high = law.law.interval(at)
            assert f"{law(at):.4f}{low:.4f} … {high:.4f}" in text
            assert fit.short(law.n_opt(at)) in text and fit.short(law.d_opt(at)) in text


def test_fit_of_a_ladder_writes_the_same_report_elsewhere(folder, html, tmp_path, capsys):
    assert fit.main([str(folder), "--report", str(tmp_path / "there")]) == 0
    there = (tmp_path / "there" / "index.html").read_text(encoding="utf-8")
    assert there == html
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "there" / "index.html")


def test_curves_of_a_file_get_a_page(tmp_path, capsys):
    file = tmp_path / "curves.csv"
    with file.open("w") as out:
        out.write("run,arch,params,tokens,loss\n")
        for arch, a in (("llama", 20.0), ("other <x>", 18.0)):
            for n in (1e6, 3e6, 1e7, 3e7, 1e8):
                for t in 20 * n * np.geomspace(0.02, 1, 30):
                    out.write(f"{arch}-{n:.0f},{arch},{n:.0f},{t:.0f},{0.5 + a * n**-0.2 + 40 * t**-0.25:.6f}\n")
    options = ["--form", "envelope", "--n", "params", "--d", "tokens", "--loss", "loss", "--group", "arch"]
    assert fit.main([str(file), *options, "--resamples", "50", "--report", str(tmp_path / "page")]) == 0
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    parsed = Balanced(html)
    text = " ".join("".join(parsed.text).split())
    assert "the column 'params'" in text and "6 N D" in text and "other <x>" in text
    assert "0.7118" in text and "10 bins" not in text and "0.1 decade" in text and "0.05 decades" in text
    content = json.loads((tmp_path / "page" / "fit.json").read_text())
    for one in content["fits"]:
        assert f"{one['coefficients']['L_exponent']:.4f}".replace("-", "\N{MINUS SIGN}") in text
    assert {"comparison.png", "n-opt.svg", "d-opt.svg"} <= {path.name for path in (tmp_path / "page").iterdir()}


def test_n_is_the_chosen_one_everywhere(folder, tmp_path, capsys):
    ladder, total = runs.read([folder]), tmp_path / "total"
    assert fit.main([str(folder), "--n", "total", "--resamples", "20", "--report", str(total)]) == 0
    assert "N is all parameters" in capsys.readouterr().out
    text = " ".join("".join(Balanced((total / "index.html").read_text(encoding="utf-8")).text).split())
    assert "N is all parameters" in text and "N is parameters without embedding" not in text
    found, _ = laws.fit_ladder(ladder, laws.Options(n="total", resamples=20))
    usual, _ = laws.fit_ladder(ladder, laws.Options(resamples=20))
    sizes = {run.name: run.parameters.total for run in ladder.runs}
    for arch, law in found.items():
        points = law.n_opt.points[np.isfinite(law.n_opt.points)]
        assert {round(n) for n in points} <= set(sizes.values())
        assert law.b == usual[arch].b, "the loss does not depend on what N is"
    content = json.loads((total / "fit.json").read_text())
    assert content["n"] == "total"
    with pytest.raises(ConfigError, match="--n is 'params'"):
        fit.main([str(folder), "--n", "params"])
