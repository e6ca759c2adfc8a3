"""Run directories as trainers leave them: finished, interrupted, half-written, broken."""

import json

import numpy as np
import pytest
from synthetic_ladder import rung, write_run

from linscale.config import ConfigError
from linscale.scaling import flops, runs

SHAPE = (2, 48, 3, 128)


def falling(tokens):
    return 20 * tokens**-0.2


def test_a_ladder_is_read_in_its_order(ladder_folder):
    ladder = runs.read([ladder_folder])
    names = json.loads((ladder_folder / "ladder.json").read_text())["runs"]
    assert [run.name for run in ladder.runs] == names and len(names) == 20
    assert ladder.recipe == "configs/demo.py" and not ladder.missing
    run = ladder.runs[5]
    assert run.finished and run.arch == "tnl" and run.config.optimizer.warmup_tokens == 20_000
    assert run.parameters == flops.count_parameters(run.config.model)
    assert (np.diff(run.train.tokens) > 0).all() and len(run.heldout) == 8
    done = json.loads((run.path / "DONE.json").read_text())
    assert run.last.loss[0] == done["heldout_loss"] and run.heldout_bpb == done["heldout_bpb"]
    assert run.seconds == done["seconds"]


def test_units_of_compute(tmp_path):
    """1 PFLOP/s-day is 8.64e19 operations, in both accountings."""
    run = runs.read_run(write_run(tmp_path, rung("llama", SHAPE), falling))
    per_token = flops.flops_per_token(run.config.model, 256)
    assert runs.compute(run, run.heldout, "exact")[-1] == pytest.approx(run.heldout.tokens[-1] * per_token / 8.64e19)
    step = flops.paper_flops_per_step(run.config.model, batch=16, sequence=256)
    assert runs.compute(run, run.heldout, "paper")[-1] == pytest.approx(run.config.steps * step / 8.64e19)


def test_an_interrupted_run_is_read_as_far_as_it_goes(tmp_path):
    path = write_run(tmp_path, rung("tnl", SHAPE), falling, finished=False)
    with pytest.raises(ValueError):  # the last line is cut
        json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    run = runs.read_run(path)
    assert not run.finished and run.seconds is None and len(run.train) > 2


def test_a_run_that_has_just_begun_is_empty(tmp_path):
    path = write_run(tmp_path, rung("tnl", SHAPE), falling, finished=False)
    (path / "metrics.jsonl").unlink()
    run = runs.read_run(path)
    assert not len(run.train) and not len(run.last) and run.heldout_bpb is None


def test_a_step_logged_twice_counts_as_last_seen_and_bad_losses_are_counted(tmp_path):
    path = write_run(tmp_path, rung("tnl", SHAPE), falling)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "tokens": 4096, "flops": 1e9, "heldout_loss": 3.25}\n')
        file.write('{"step": 2, "tokens": 8192, "flops": 2e9, "heldout_loss": NaN}\n')
        file.write('{"step": 1, "tokens": 4096, "flops": 1e9, "heldout_loss": 3.5}\n')
    run = runs.read_run(path)
    assert run.heldout.loss[0] == 3.5 and run.unusable == 1


def test_missing_rungs_are_named(tmp_path):
    config = rung("tnl", SHAPE)
    write_run(tmp_path, config, falling)
    (tmp_path / "ladder.json").write_text(json.dumps({"recipe": "", "runs": [config.name, "tnl-9m"]}))
    assert runs.read([tmp_path]).missing == ("tnl-9m",)


def test_run_folders_without_a_ladder(tmp_path):
    for arch in ("tnl", "llama"):
        write_run(tmp_path, rung(arch, SHAPE), falling)
    assert {run.arch for run in runs.read([tmp_path]).runs} == {"tnl", "llama"}
    assert len(runs.read(sorted(tmp_path.iterdir())).runs) == 2


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", "{", "config.json cannot be read as JSON"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", '{"config": {"modell": {}}}', "config.modell is not a field"),
        ("metrics.jsonl", 'x\n{"step": 1}\n', "metrics.jsonl line 1 is not a JSON object"),
        ("metrics.jsonl", '{"loss": 2.0}\n', "lacks positive tokens"),
        ("DONE.json", "no", "DONE.json cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path, file, content, message):
    path = write_run(tmp_path, rung("tnl", SHAPE), falling)
    (path / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        runs.read([path])


def test_folders_that_are_no_ladders_are_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        runs.read([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"neither ladder\.json nor a run"):
        runs.read([tmp_path])
    (tmp_path / "ladder.json").write_text('{"runs": "all"}')
    with pytest.raises(ConfigError, match="no list of names"):
        runs.read([tmp_path])
