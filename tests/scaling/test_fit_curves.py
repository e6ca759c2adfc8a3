"""L(C), N_opt(C), D_opt(C) from a file of training curves, against a planted L(N, D) whose optimum is known."""

import json

import numpy as np
import pytest

from linscale.config import ConfigError
from linscale.scaling import fit, laws
from linscale.scaling.flops import PF_DAY

E, A, B, ALPHA, BETA = 0.0, 30.0, 40.0, 0.15, 0.15  # E = 0: pure power laws of C


def write(path, sizes, noise=0.0, seed=0, points=300, most=40, **more):
    """Curves of L(N, D) up to `most` tokens a parameter; the optimum is at 6.8, where the first tenth is over."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for i, n in enumerate(sizes):
            for d in np.geomspace(0.5, most, points) * n:
                loss = (E + A * n**-ALPHA + B * d**-BETA) * np.exp(rng.normal(0, noise))
                file.write(
                    json.dumps({"run": f"r{i}", "n": float(n), "d": float(d), "loss": float(loss)} | more) + "\n"
                )
    return path


def command(path, *more):
    names = ["--n", "n", "--d", "d", "--loss", "loss", "--resamples", "100"]
    return fit.main([str(path), "--form", "envelope", *names, *more])


def truth():
    """Coefficients in C / (PFLOP/s-day), Hoffmann et al. (arXiv 2203.15556), eq. 4."""
    g, power = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)), BETA / (ALPHA + BETA)
    n, d = g * (PF_DAY / 6) ** power, (PF_DAY / 6) ** (1 - power) / g
    return {
        "N_coefficient": n,
        "N_exponent": power,
        "D_coefficient": d,
        "D_exponent": 1 - power,
        "L_coefficient": A * n**-ALPHA + B * d**-BETA,
        "L_exponent": -ALPHA * power,
    }


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_planted_optimum(tmp_path, noise, capsys):
    out = tmp_path / "out.json"
    path = write(tmp_path / "curves.jsonl", np.geomspace(3e7, 3e9, 25), noise)
    assert command(path, "--json", str(out), "--bins", "20") == 0
    found = json.loads(out.read_text())
    assert {"form", "coefficients", "intervals", "objective", "loss", "n_runs", "warnings"} <= set(found)
    for name, value in truth().items():
        got = found["coefficients"][name]
        error = abs(got - value) if name.endswith("exponent") else abs(np.log(got / value))
        assert error < {"L": 0.02, "N": 0.1, "D": 0.1}[name[0]], name
        if name.endswith("exponent"):
            assert error < (0.002 if name[0] == "L" else 0.05), name
            low, high = found["intervals"][name]
            assert low <= got <= high
    assert len(found["envelope"]["n"]) == len(found["envelope"]["compute"]) and found["n_runs"] == 25
    text = capsys.readouterr().out
    assert "20 bins a decade of C; smoothed by local lines, Gaussian sd 0.05 decades; the first 10%" in text


def test_without_smoothing_noise_lowers_the_envelope(tmp_path):
    path, out = write(tmp_path / "curves.jsonl", np.geomspace(3e7, 3e9, 25), 0.03), tmp_path / "out.json"
    height = {}
    for width in ("0", "0.1"):
        command(path, "--smoothing", width, "--json", str(out))
        found = json.loads(out.read_text())["coefficients"]
        height[width] = found["L_coefficient"] * 0.1 ** found["L_exponent"]
    exact = truth()["L_coefficient"] * 0.1 ** truth()["L_exponent"]
    assert height["0"] < 0.98 * exact and height["0.1"] == pytest.approx(exact, rel=0.01)


def test_flops_and_groups(tmp_path):
    out = tmp_path / "out.json"
    path = write(tmp_path / "a.jsonl", np.geomspace(3e7, 3e9, 8), arch="tnl")
    other = write(tmp_path / "b.jsonl", np.geomspace(3e7, 3e9, 8), arch="llama")
    path.write_text(path.read_text() + other.read_text().replace('"loss": ', '"loss": 1'))  # 1 before the digits
    command(path, "--group", "arch", "--json", str(out))
    tnl, llama = json.loads(out.read_text())["fits"]
    assert (tnl["arch"], llama["arch"]) == ("tnl", "llama")
    assert llama["coefficients"]["L_coefficient"] > tnl["coefficients"]["L_coefficient"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "c": 12 * row["n"] * row["d"]} for row in rows if row["arch"] == "tnl"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(path, "--flops", "c", "--json", str(out))
    double = json.loads(out.read_text())
    assert double["compute"]["accounting"] == "as counted"
    lower = tnl["coefficients"]["L_coefficient"] * 0.5 ** tnl["coefficients"]["L_exponent"]
    assert double["coefficients"]["L_coefficient"] == pytest.approx(lower, rel=0.01)


def test_sizes_chosen_by_the_rule_are_named(tmp_path, capsys):
    """With 200 tokens a parameter the first tenth ends at 20, after the optimum of 6.8."""
    path = write(tmp_path / "curves.jsonl", np.geomspace(3e7, 3e9, 25), most=200)
    out = tmp_path / "out.json"
    command(path, "--bins", "20", "--skip", "0.1")
    assert "best where they begin to speak" in capsys.readouterr().out
    command(path, "--bins", "20", "--skip", "0.005", "--json", str(out))
    assert "begin to speak" not in capsys.readouterr().out
    assert json.loads(out.read_text())["coefficients"]["N_exponent"] == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_fitted_is_named(tmp_path, capsys):
    path = write(tmp_path / "curves.jsonl", np.geomspace(3e7, 3e9, 3), points=5)
    command(path)
    assert "Only 3 curves" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="2 sizes N; --run must tell"):
        path.write_text(path.read_text().replace('"r1"', '"r0"'))
        command(path)
    with pytest.raises(ConfigError, match="has 1 curves; an envelope needs two"):
        command(write(path, [1e8]))
    with pytest.raises(ConfigError, match="needs --run COLUMN"):
        path.write_text(path.read_text().replace('"run"', '"series"'))
        command(path)
    with pytest.raises(ConfigError, match="--budget is for laws"):
        command(path, "--budget", "1e21")
    with pytest.raises(ConfigError, match="--smoothing is -1"):
        command(path, "--smoothing", "-1")
    with pytest.raises(ConfigError, match="--bins is 0"):
        command(path, "--bins", "0")
    with pytest.raises(ConfigError, match=f"has 2 bins.*{laws.MIN_BINS} are needed"):
        path = write(path, [1e8, 1e9], points=200)
        command(path, "--bins", "1")


def test_the_share_left_out_is_the_largest_at_which_the_loss_chooses_the_sizes():
    """Best are 2935 tokens a parameter: 3 % of the long curves, half of the short ones."""
    sizes, at = np.geomspace(1e7, 1e10, 12), np.geomspace(0.002, 1, 200)

    def curves(tokens):
        return [
            laws.Curve(
                f"{n:.3g}",
                n,
                6 * n * tokens * n * at / PF_DAY,
                tokens * n * at,
                9 * n**-0.1 + 20 * (tokens * n * at) ** -0.1,
            )
            for n in sizes
        ]

    options = laws.Options("train", smoothing=0.0, resamples=0)
    long, short = curves(1e5), curves(6e3)
    assert laws.fit_curves("", long, options).late
    chosen = laws.settled([long], options)
    assert chosen.skip in laws.SKIP_SHARES[1:] and not laws.fit_curves("", long, chosen).late
    assert laws.settled([short], options) == options
