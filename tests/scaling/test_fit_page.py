"""The page of a fit: what it shows is what the fit says, for every form, and nothing is claimed that data do not hold."""

import csv
import json
import re

import numpy as np
import pytest
from test_report import Balanced

from linscale.config import ConfigError
from linscale.scaling import appearance, fit, optimum
from linscale.scaling.flops import PF_DAY

COEFFICIENTS = {"llama": (1.7, 400.0, 410.0), "hgrn2": (1.65, 390.0, 380.0)}


def write_table(file, names=tuple(COEFFICIENTS), ratios=(5, 20, 80, 200), noise=0.003, seed=0, column="arch"):
    """Runs of a planted law for every name; returns the file."""
    rng = np.random.default_rng(seed)
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["run", column, "params", "tokens", "loss", "acc"])
        for i, name in enumerate(names):
            e, a, b = list(COEFFICIENTS.values())[i % 2]
            for n in np.geomspace(2e7, 3e9, 6).round():
                for ratio in ratios:
                    loss = (e + a / n**0.34 + b / (n * ratio) ** 0.28) * np.exp(rng.normal(0, noise))
                    table.writerow(
                        [f"{name}-{n:.0f}-{ratio}", name, n, n * ratio, loss, 1 / (1 + np.exp(2 * (loss - 2.5)))]
                    )
    return file


def write_budgets(file, seed=0):
    rng = np.random.default_rng(seed)
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["params", "tokens", "loss"])
        for compute in np.geomspace(1e18, 1e21, 5):
            for times in np.geomspace(0.3, 3, 7):
                n = 0.1 * (compute / 6) ** 0.5 * times
                d = compute / 6 / n
                table.writerow([n, d, (1.7 + 400 / n**0.34 + 410 / d**0.28) * np.exp(rng.normal(0, 0.002))])
    return file


DRAWS = ["--resamples", "150"]  # about as many as starts: one program for both
COLUMNS = ["--n", "params", "--d", "tokens", "--loss", "loss", *DRAWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    options = [*COLUMNS, "--group", "arch", "--joint", "--profile", "--task", "acc", "--backtest", "3"]
    options += ["--budget", "1e21", "3e23", "--hardware", "v5p:4x4x4", "--report", str(folder / "page")]
    assert fit.main([str(write_table(folder / "two <b>.csv")), *options]) == 0
    return folder / "page"


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def test_numbers_are_those_of_the_fit(folder, html):
    text = " ".join("".join(Balanced(html).text).split())
    content = json.loads((folder / "fit.json").read_text())
    for one in content["fits"]:
        for name, value in one["coefficients"].items():
            assert f"{value:.4g}" in text, name
            if name not in ("A", "B"):
                assert f"{one['intervals'][name][0]:.4g} … {one['intervals'][name][1]:.4g}" in text
        for best in one["optimal"]:
            assert f"{best['loss']:.4g}" in text and fit.short(best["n"]) in text and fit.short(best["d"]) in text
            assert f"{fit.short(best['n_interval'][0])} … {fit.short(best['n_interval'][1])}" in text
        for run in one["backtest"]["runs"]:
            assert run["name"] in text
        alpha, beta = one["coefficients"]["alpha"], one["coefficients"]["beta"]
        assert f"{beta / (alpha + beta):.3g}" in text
    for published in ("0.7118", "0.5102", "0.6427", "0.4500"):
        assert published in text, "the paper's exponents of N_opt and D_opt"
    assert f"Least AICc: {content['joint']['verdict']}" in text
    assert "the column 'params'" in text and "C is 6 N D" in text and "C = 6 N D" in text
    for one in content["fits"]:
        for best in one["tasks"][0]["optimal"]:
            assert f"{best['y']:.4g}" in text
        assert one["optimal"][0]["days"]["v5p:4x4x4"] == pytest.approx(1e21 / (64 * 459e12 * 0.4) / 86_400)
    # 1e21 FLOPs on 64 chips of 459 TFLOP/s at 40 %
    assert f"{1e21 / (64 * 459e12 * 0.4) / 3600:.3g} hours" in text and f"{1e21 / PF_DAY:.3g}" in text


def test_files_lie_beside_the_page(folder, html):
    names = {file.name for file in folder.iterdir()}
    figures = {"optimal-loss"} | {
        f"{kind}-{i}" for kind in ("contours", "slices", "residuals", "task-1") for i in (1, 2)
    }
    assert names == {f"{name}.{end}" for name in figures for end in ("png", "svg")} | {"index.html", "fit.json"}
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in figures)
    assert len(re.findall(r'<svg[^>]*role="img"', html)) == len(figures)
    assert not re.search(r"https?://", html.replace("http://www.w3.org/", ""))


def test_a_name_from_the_table_is_text(folder, html):
    assert "two &lt;b&gt;.csv" in html and "two <b>" not in html


def test_hostile_groups_and_columns(tmp_path):
    hostile = "</script><script>alert(1)</script>$\\frac$"
    file = write_table(tmp_path / "t.csv", names=(hostile, "a" * 300, "x\x07y"), column='g"<i>', seed=3)
    with file.open() as text:
        changed = text.read().replace("params", "p<b>$x")
    file.write_text(changed)
    options = [str(file), "--n", "p<b>$x", "--d", "tokens", "--loss", "loss", *DRAWS, "--group", 'g"<i>']
    assert fit.main([*options, "--report", str(tmp_path / "page")]) == 0
    parsed = Balanced((tmp_path / "page" / "index.html").read_text(encoding="utf-8"))
    assert hostile in "".join(parsed.text)
    assert not any("alert(1)" in script for script in parsed.scripts if not script.startswith("{"))
    assert any("alert(1)" in str(json.loads(script)) for script in parsed.scripts if script.startswith("{"))


def test_a_design_that_cannot_tell_gets_no_optimum(tmp_path):
    file = write_table(tmp_path / "t.csv", names=("llama",), ratios=(20,))
    rows = list(csv.reader(file.open()))
    with file.open("w", newline="") as out:  # more runs of the same ratio
        csv.writer(out).writerows(
            [*rows, *([r[0] + "b", r[1], float(r[2]) * 1.3, float(r[3]) * 1.3, r[4], r[5]] for r in rows[1:])]
        )
    assert fit.main([str(file), *COLUMNS, "--resamples", "20", "--report", str(tmp_path / "page")]) == 0
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "cannot be told apart" in html
    assert "What to train with a budget" not in html and "N_opt grows" not in html
    assert not (tmp_path / "page" / "optimal-loss.png").exists()
    assert (tmp_path / "page" / "residuals.png").exists() and (tmp_path / "page" / "contours.png").exists()


@pytest.mark.parametrize("form", ["chinchilla-no-e", "kaplan", "isoflop"])
def test_every_form_has_a_page(tmp_path, form):
    file = write_budgets(tmp_path / "t.csv")
    assert fit.main([str(file), *COLUMNS, "--form", form, "--report", str(tmp_path / "page")]) == 0
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    Balanced(html)
    for name in json.loads((tmp_path / "page" / "fit.json").read_text())["coefficients"]:
        assert name in html
    assert (tmp_path / "page" / ("isoflop.svg" if form == "isoflop" else "contours.svg")).exists()


def test_many_runs_are_folded(tmp_path):
    for count, folded in ((4, False), (16, True)):
        table = write_table(tmp_path / "table.csv", ["llama"], ratios=np.geomspace(5, 200, count))
        assert fit.main([str(table), *COLUMNS, "--report", str(tmp_path / "page")]) == 0
        text = (tmp_path / "page" / "index.html").read_text()
        assert (f"<details><summary>{6 * count} runs</summary>" in text) == folded


def test_d_from_flops_is_named(tmp_path, capsys):
    rows = write_budgets(tmp_path / "table.csv").read_text().splitlines()[1:]
    numbers = [tuple(map(float, row.split(","))) for row in rows]
    text = "".join(f"{n},{6 * n * d},{loss}\n" for n, d, loss in numbers)
    (tmp_path / "flops.csv").write_text("params,flops,loss\n" + text)
    options = ["--n", "params", "--flops", "flops", "--loss", "loss", *DRAWS]
    assert fit.main([str(tmp_path / "flops.csv"), *options, "--report", str(tmp_path / "page")]) == 0
    assert "N is params; C as counted; D is C / (6 N)." in capsys.readouterr().out
    assert "D is C / (6 N)." in (tmp_path / "page" / "index.html").read_text()


def test_budgets_are_round_and_reach_beyond_the_runs():
    class Table:
        compute = np.array([3e18, 4.2e21])

    assert optimum.round_budgets([Table]) == [1e20, 1e21, 1e22, 1e23, 1e24]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    file = write_budgets(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="cannot be written"):
        fit.main([str(file), *COLUMNS, "--form", "isoflop", "--report", str(file / "page")])


def test_groups_of_any_name_have_a_style():
    assert appearance.style_of("HGRN2", 3) == ("hgrn2", "HGRN2")
    keys = [appearance.style_of(f"group {i}", i)[0] for i in range(7)]
    assert len(set(keys)) == 5 and set(keys) <= set(appearance.COLOURS)
    assert appearance.plain("a$b") == r"a\$b" and len(appearance.plain("a" * 99)) == 60
