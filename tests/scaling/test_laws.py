"""The fit against planted laws, the envelope against a loop, and the command."""

import dataclasses
import json
import math

import numpy as np
import pytest
from synthetic_ladder import SHAPES, rung, write_ladder, write_run

from linscale.config import ConfigError
from linscale.scaling import envelope, fit, flops, laws, runs

A, B = 0.31, -0.094  # planted


def planted_ladder(folder, noise=0.004, seed=0, shapes=SHAPES, schedule="constant"):
    """Every run touches a C^b 0.3 decades before its end and lies above it elsewhere, so its envelope is the law."""
    for i, shape in enumerate(shapes):
        config = rung("tnl", shape, floor=2_000_000, tokens_per_parameter=2)
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule=schedule))
        per_token = flops.flops_per_token(config.model, config.train.sequence) / flops.PF_DAY
        touch = math.log10(config.train.tokens * per_token) - 0.3

        def loss(tokens, per_token=per_token, touch=touch):
            x = np.log10(tokens * per_token)
            return 10 ** (math.log10(A) + B * x + 0.03 * (x - touch) ** 2)

        write_run(folder, config, loss, noise=noise, seed=100 * seed + i)
    return runs.read([folder])


@pytest.mark.parametrize("loss", laws.LOSSES)
def test_planted_law_lies_in_the_interval(tmp_path, loss):
    found = laws.fit_runs(list(planted_ladder(tmp_path).runs), laws.Options(loss=loss))
    assert found.b_interval[0] < B < found.b_interval[1] < 0
    assert found.a_interval[0] < A < found.a_interval[1]
    assert found.b == pytest.approx(B, abs=0.005)
    assert found.b_interval[1] - found.b_interval[0] < 0.03, "an interval that wide says nothing"
    assert found.failed < 0.05 * found.draws
    here = found(found.compute)  # on the edge of the band where every subset of the runs has the same envelope
    assert (found.band[0] <= here * (1 + 1e-9)).all() and (found.band[1] >= here * (1 - 1e-9)).all()
    assert (found.band[1] / found.band[0]).max() > 1.003


def test_intervals_cover(tmp_path):
    """95 % intervals of five runs hold the planted exponent most of the time (measured: about 93 % of 300)."""
    inside = 0
    for seed in range(20):
        grid_G, loss_RG = np.arange(-95, -64) / 10, np.full((5, 31), np.inf)
        shift_R = np.random.default_rng(seed).normal(0, 0.01 / math.log(10), 5)
        for row_G, end, shift in zip(loss_RG, np.linspace(-8.5, -6.5, 5), shift_R):
            speaks_G = (grid_G >= end - 1 - 1e-9) & (grid_G <= end + 1e-9)
            x_G = grid_G[speaks_G]
            row_G[speaks_G] = math.log10(A) + B * x_G + 0.03 * (x_G - end + 0.3) ** 2 + shift
        draw = np.random.default_rng(seed).integers(0, 5, (500, 5))
        chosen_SR = (draw[:, :, None] == np.arange(5)).any(1)
        b_S = envelope.least_squares(grid_G, envelope.envelopes(loss_RG, chosen_SR))[1]
        low, high = np.nanpercentile(b_S, laws._percentiles(5))
        inside += low <= B <= high
    assert inside >= 16


def test_noiseless_line_is_exact():
    x = np.linspace(-9, -6, 30)
    intercept, slope = envelope.least_squares(x, (0.5 - 0.1 * x)[None])
    assert intercept[0] == pytest.approx(0.5, abs=1e-12) and slope[0] == pytest.approx(-0.1, abs=1e-12)


def test_least_squares_ignores_gaps_and_refuses_few_bins():
    x = np.arange(8.0)
    y = np.stack([2 + 3 * x, np.where(x < laws.MIN_BINS - 1, x, np.inf)])
    y[0, [1, 5]] = np.inf
    intercept, slope = envelope.least_squares(x, y)
    assert (intercept[0], slope[0]) == pytest.approx((2, 3))
    assert np.isnan(slope[1])


def test_envelope_is_the_lower_envelope(ladder_folder):
    """Against a loop, and no run lies below it anywhere."""
    group = [run for run in runs.read([ladder_folder]).runs if run.arch == "hgrn2"]
    found = laws.fit_runs(group)
    for compute, loss, best in zip(found.compute, found.envelope, found.best):
        here = {}
        for run in group:
            x, y = np.log10(runs.compute(run, run.heldout, "exact")), np.log10(run.heldout.loss)
            keep = run.heldout.tokens > 40_000
            start = max(x[keep][0], x[-1] - 1)
            if start <= np.log10(compute) <= x[-1]:
                here[run.name] = 10 ** np.interp(np.log10(compute), x[keep], y[keep])
        assert min(here.values()) == pytest.approx(loss, rel=1e-9)
        assert min(here, key=here.get) == best
    assert len(set(found.best)) >= 4, "several runs take part"


def test_envelope_begins_with_the_second_run():
    """The first run alone cannot say what a still smaller model would reach."""
    inf = np.inf
    loss_RG = np.array([[1.0, 0.9, 0.8, 0.7, inf], [inf, inf, 0.9, 0.6, 0.5]])
    both, first, second = np.array([[True, True], [True, False], [False, True]])
    out = envelope.envelopes(loss_RG, np.stack([both, first, second]))
    assert out[0].tolist() == [inf, inf, 0.8, 0.6, 0.5]
    assert out[1].tolist() == loss_RG[0].tolist() and out[2].tolist() == loss_RG[1].tolist()
    apart = np.array([[1.0, 0.9, inf, inf], [inf, inf, inf, 0.5]])
    assert envelope.envelopes(apart, np.ones((1, 2), bool))[0].tolist() == [inf, 0.9, inf, 0.5]


def test_envelope_falls():
    """Where the better run has ended and the larger one is still behind its end, there is no envelope."""
    inf = np.inf
    loss_RG = np.array([[1.0, 0.8, inf, inf, inf], [1.2, 1.1, 0.9, 0.8, 0.7]])
    assert envelope.envelopes(loss_RG, np.ones((1, 2), bool))[0].tolist() == [1.0, 0.8, inf, inf, 0.7]


def test_units_shift_a_and_leave_b(tmp_path):
    """Compute in other units by a factor k: b stays, a becomes a k^b."""
    group = list(planted_ladder(tmp_path).runs)

    def scaled(run, k):
        def more(curve):
            return runs.Curve(curve.tokens, curve.flops * k, curve.loss)

        return dataclasses.replace(run, train=more(run.train), heldout=more(run.heldout))

    one, hundred = laws.fit_runs(group), laws.fit_runs([scaled(run, 100.0) for run in group])
    assert hundred.b == pytest.approx(one.b, rel=1e-9)
    assert hundred.a == pytest.approx(one.a * 100**-one.b, rel=1e-9)
    assert 10 ** (math.log10(one.compute[-1]) + laws.SKIP_SHARE) < 1e-3, "PFLOP/s-days, not FLOPs"


def test_training_loss_is_smoothed_without_bias():
    rng = np.random.default_rng(0)
    x = np.linspace(-8, -7, 400)
    y = 0.2 - 0.1 * x
    smooth = envelope.local_line(x[[0, 200, -1]], x, y + rng.normal(0, 0.02, 400), laws.SMOOTHING)
    assert smooth == pytest.approx(y[[0, 200, -1]], abs=0.01)
    assert envelope.local_line(x[[0, -1]], x, y, laws.SMOOTHING) == pytest.approx(y[[0, -1]], abs=1e-9)


def test_the_fit_is_reproducible(ladder_folder):
    ladder = runs.read([ladder_folder])
    first, second, other = (laws.fit_ladder(ladder, laws.Options(seed=seed))[0]["tnl"] for seed in (0, 0, 1))
    assert first.b_interval == second.b_interval and first.a == other.a
    assert first.law.draws.tolist() != other.law.draws.tolist()  # the intervals of few runs may agree


def test_too_few_finished_runs_get_a_sentence(tmp_path):
    ladder = write_ladder(tmp_path / "l", archs=("tnl", "llama"))
    for path in sorted(ladder.glob("llama-*"))[1:]:
        (path / "DONE.json").unlink()
    fits, notes = laws.fit_ladder(runs.read([ladder]))
    assert list(fits) == ["tnl"] and len(fits["tnl"].runs) == 5
    assert any("llama has 1 finished of 5 runs" in note for note in notes)
    assert any("Not finished" in note and "llama-" in note for note in notes)


def test_warm_up_is_left_out(tmp_path):
    config = dataclasses.replace(rung("tnl", SHAPES[0]))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_tokens=100_000))
    run = runs.read_run(write_run(tmp_path, config, lambda tokens: 20 * tokens**-0.2))
    log_compute, log_loss, start = laws.usable_curve(run, laws.Options(loss="train"))
    per_token = flops.flops_per_token(config.model, 256) / flops.PF_DAY
    assert 10 ** log_compute[0] > 200_000 * per_token and len(log_loss) == len(log_compute)
    assert start == log_compute[0]  # later than the first tenth of 401,408 tokens


def test_notes_on_what_is_not_comparable(tmp_path):
    ladder = planted_ladder(tmp_path, schedule="cosine", shapes=SHAPES[:3])
    odd = dataclasses.replace(ladder.runs[0], data={"tokenizer": "bpe:512", "fingerprint": "x"})
    _, notes = laws.fit_ladder(dataclasses.replace(ladder, runs=(odd, *ladder.runs[1:])))
    text = " ".join(notes)
    for part in ("different tokenizers", "different data", "learning rate decays (cosine)", "only 3 finished runs"):
        assert part in text


def test_fit_command(ladder_folder, tmp_path, capsys):
    assert fit.main([str(ladder_folder), "--json", str(tmp_path / "out.json"), "--compute", "paper"]) == 0
    out = capsys.readouterr().out
    assert "the paper's accounting" in out and "parameters without embedding" in out and "PFLOP/s-days" in out
    assert "-0.0768" in out, "the paper's exponent of TNL"
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["compute"] == {"accounting": "paper", "unit": "PFLOP/s-days"}
    assert [one["arch"] for one in content["fits"]] == ["llama", "tnl", "hgrn2", "cosformer2"]
    for one in content["fits"]:
        low, high = one["intervals"]["b"]
        assert low < one["coefficients"]["b"] < high < 0


def test_fit_command_without_enough_runs(tmp_path):
    write_run(tmp_path, rung("tnl", SHAPES[0]), lambda tokens: 20 * tokens**-0.2)
    with pytest.raises(ConfigError, match=r"No architecture can be fitted\. tnl has 1 finished of 1 runs"):
        fit.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="--resamples is 0"):
        fit.main([str(tmp_path), "--resamples", "0"])


def test_curves_too_short_are_named(tmp_path):
    for shape in SHAPES[:2]:
        config = rung("tnl", shape)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, tokens=45_000))
        write_run(tmp_path, config, lambda tokens: 20 * tokens**-0.2)
    with pytest.raises(ConfigError, match="train longer or evaluate more often"):
        fit.main([str(tmp_path)])


def test_percentiles_reach_further_out_the_fewer_runs():
    assert laws._percentiles(10**9) == pytest.approx((2.5, 97.5), abs=1e-3)
    assert laws._percentiles(12)[0] == pytest.approx(1.59, abs=0.01)
    assert 0 < laws._percentiles(2)[0] == laws._percentiles(3)[0] < laws._percentiles(12)[0]
