"""Tables of runs, what is wrong with them, and `linscale fit --form`: text, JSON, errors."""

import csv
import json

import numpy as np
import pytest
from test_forms import PLANTED, isoflop_runs, simulate

from linscale.config import ConfigError
from linscale.scaling import fit, fit_forms, tables

COLUMNS = tables.Columns("n_params", "tokens", "loss")


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def rows_of(runs):
    return [
        {"n_params": float(n), "tokens": float(d), "loss": float(y), "flops": float(6 * n * d)}
        for n, d, y in zip(runs.n, runs.d, runs.loss)
    ]


@pytest.fixture
def rows():
    return rows_of(simulate("chinchilla", count=40))


def command(path, *more, resamples=150):  # about as many as starts: one program for both
    names = [] if "--flops" in more else ["--d", "tokens"]
    return fit.main([str(path), "--n", "n_params", *names, "--loss", "loss", "--resamples", str(resamples), *more])


def test_names_of_the_forms_agree():
    assert fit.FORMS == fit_forms.FORMS


def test_json_has_the_promised_keys_and_names_what_n_d_and_c_are(tmp_path, rows, capsys):
    out = tmp_path / "out.json"
    assert command(write(tmp_path / "runs.csv", rows), "--form", "chinchilla", "--json", str(out)) == 0
    found = json.loads(out.read_text())
    promised = {"form", "coefficients", "intervals", "objective", "loss", "n_runs", "warnings"}
    assert set(found) == promised | {"n", "d", "compute"}
    assert (found["n"], found["d"], found["compute"]) == ("n_params", "tokens", "6 N D")
    assert list(found["coefficients"]) == list(found["intervals"]) == ["E", "A", "B", "alpha", "beta"]
    assert found["form"] == "chinchilla" and found["n_runs"] == 40
    assert found["loss"] == {"kind": "huber", "delta": 1e-3, "reduction": "sum"}
    assert all(low < found["coefficients"][key] < high for key, (low, high) in found["intervals"].items())
    text = capsys.readouterr().out
    assert "N is n_params; C 6 N D" in text and "Huber loss of log L, delta 0.001, sum over runs; 40 runs" in text


def test_jsonl_and_flops_give_the_same_law(tmp_path, rows):
    out = tmp_path / "a.json", tmp_path / "b.json"
    command(write(tmp_path / "runs.csv", rows), "--json", str(out[0]))
    command(write(tmp_path / "runs.jsonl", rows), "--flops", "flops", "--json", str(out[1]))
    a, b = (json.loads(path.read_text())["coefficients"] for path in out)
    assert a == pytest.approx(b, rel=1e-5)


def test_drop_worst_leaves_out_the_highest_losses(tmp_path, rows):
    spoilt = [*rows, {"n_params": 1e9, "tokens": 2e10, "loss": 9.5, "flops": 1.2e20}]
    command(write(tmp_path / "runs.csv", spoilt), "--drop-worst", "1", "--json", str(tmp_path / "a.json"))
    command(write(tmp_path / "good.csv", rows), "--json", str(tmp_path / "b.json"))
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["coefficients"] == b["coefficients"] and a["n_runs"] == 40
    assert "row 41" in a["warnings"][0]


def test_budget_and_backtest(tmp_path, rows, capsys):
    out = tmp_path / "out.json"
    command(write(tmp_path / "runs.csv", rows), "--budget", "1e21", "1e22", "--backtest", "3", "--json", str(out))
    found = json.loads(out.read_text())
    first, second = found["optimal"]
    assert first["n_interval"][0] < first["n"] < first["n_interval"][1] and second["loss"] < first["loss"]
    assert 6 * first["n"] * first["d"] == pytest.approx(1e21)
    assert len(found["backtest"]["runs"]) == 3 and found["backtest"]["mean_absolute_error"] < 0.02
    assert "fitted to 37 runs, the 3 of greatest compute predicted" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["chinchilla-no-e", "kaplan", "isoflop"])
def test_other_forms(tmp_path, form):
    runs = isoflop_runs(0.01) if form == "isoflop" else simulate(form)
    out = tmp_path / "out.json"
    command(write(tmp_path / "runs.csv", rows_of(runs)), "--form", form, "--json", str(out))
    found = json.loads(out.read_text())
    assert found["form"] == form
    planted = {"N_exponent": 0.5} if form == "isoflop" else dict(zip(found["coefficients"], PLANTED[form]))
    for key, value in planted.items():
        low, high = found["intervals"][key]
        middle = (low + high) / 2
        assert abs(value - middle) < 1.5 * (high - middle), key


def test_ladder_by_architecture(ladder_folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--form", "chinchilla-no-e", "--n", "total", "--resamples", "20", "--json", str(out)]
    assert fit.main([str(ladder_folder), *options]) == 0
    found = json.loads(out.read_text())["fits"]
    assert [one["arch"] for one in found] == ["llama", "tnl", "hgrn2", "cosformer2"]
    assert all(one["n"] == "all parameters" and one["n_runs"] == 5 for one in found)
    assert "N is all parameters; C as counted" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="for a ladder it must be one of total, nonembedding"):
        fit.main([str(ladder_folder), "--form", "chinchilla", "--n", "active"])


@pytest.mark.parametrize("value", ["nan", "0", "-1.5", "inf", "", "abc"])
def test_a_bad_value_is_named(tmp_path, rows, value):
    rows[6]["loss"] = value
    with pytest.raises(ConfigError, match=rf"column 'loss' \(--loss\), row 7: '{value}' is not a positive finite"):
        tables.read(write(tmp_path / "runs.csv", rows), COLUMNS)


def test_a_missing_column_is_named(tmp_path, rows):
    path = write(tmp_path / "runs.csv", rows)
    with pytest.raises(ConfigError, match=r"no column 'params' \(--n\); it has n_params, tokens, loss, flops"):
        tables.read(path, tables.Columns("params", "tokens", "loss"))
    with pytest.raises(ConfigError, match="needs --n, --loss, and --d or --flops"):
        tables.read(path, tables.Columns("n_params", None, "loss"))
    with pytest.raises(ConfigError, match="line 2 is not a JSON object"):
        (tmp_path / "bad.jsonl").write_text('{"a": 1}\n[1]\n')
        tables.read(tmp_path / "bad.jsonl", COLUMNS)
    with pytest.raises(ConfigError, match="does not exist"):
        fit.main([str(tmp_path / "none.csv"), "--form", "chinchilla"])
    with pytest.raises(ConfigError, match="needs --n, --loss, and --d"):
        fit.main([str(path), "--form", "envelope"])


def notes_of(tmp_path, rows, **columns):
    return " ".join(
        tables.read(write(tmp_path / "runs.jsonl", rows), tables.Columns("n_params", "tokens", "loss", **columns))[1]
    )


def test_doubtful_tables_are_named(tmp_path, rows):
    assert notes_of(tmp_path, rows, flops="flops") == ""
    assert "row 41 repeats row 1" in notes_of(tmp_path, [*rows, rows[0]])
    mixed = [row | {"tokenizer": "bpe" if i % 2 else "bytes"} for i, row in enumerate(rows)]
    assert "different tokenizers (bpe, bytes)" in notes_of(tmp_path, mixed)
    days = [row | {"flops": row["flops"] / 8.64e19} for row in rows]
    assert "PFLOP/s-days? One is 8.64e19 FLOPs" in notes_of(tmp_path, days, flops="flops")
    assert "times 6 N D" in notes_of(tmp_path, [row | {"flops": row["flops"] * 1e3} for row in rows], flops="flops")
    assert "N looks wrong" in notes_of(tmp_path, [row | {"n_params": row["n_params"] / 1e6} for row in rows])
    assert "D looks wrong" in notes_of(tmp_path, [row | {"tokens": row["tokens"] / 1e9} for row in rows])
    assert "a perplexity?" in notes_of(tmp_path, [row | {"loss": float(np.exp(1.5 * row["loss"]))} for row in rows])
    assert "not annealed" in notes_of(tmp_path, [row | {"schedule": "constant"} for row in rows])
    inside = [row | {"run": "a", "n_params": 1e9} for row in rows]
    assert "checkpoints inside one run" in notes_of(tmp_path, inside)


def test_options_that_make_no_sense(tmp_path, rows, ladder_folder):
    path = write(tmp_path / "runs.csv", rows)
    for option, message in (
        (("--delta", "0"), "--delta is 0.0"),
        (("--starts", "0"), "--starts is 0"),
        (("--drop-worst", "40"), "there are only 40 runs"),
        (("--backtest", "40"), "must lie between 1 and 39"),
        (("--budget", "-1"), "positive number of FLOPs"),
        (("--budget", "1e21", "--compute-model", "counted"), "needs counted FLOPs"),
        (("--form", "data-constrained"), "--unique"),
        (("--form", "isoflop", "--budget", "1e21"), "isoflop is none"),
    ):
        with pytest.raises(ConfigError, match=message):
            command(path, *option, resamples=1)
    with pytest.raises(ConfigError, match="is a folder of runs"):
        fit.main([str(ladder_folder), "--form", "chinchilla", "--d", "tokens"])
