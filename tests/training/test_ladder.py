import json
import re
from types import SimpleNamespace

import pytest

from linscale import cli
from linscale.config import ConfigError
from linscale.scaling import flops, ladder, report
from linscale.training import loop, recipes, run_folder


@pytest.fixture
def argv(recipe, options):
    shape = ["--config.train.steps=6", "--config.train.eval_count=2", "--config.train.checkpoint_every=2"]
    return ["ladder", f"--config={recipe}", *options, *shape]


@pytest.fixture
def reports(monkeypatch, tmp_path):
    """Stands in for the report: what it was asked to write."""
    asked = []
    page = tmp_path / "runs" / "report" / "index.html"
    monkeypatch.setattr(report, "write", lambda folder, say: asked.append(folder) or page)
    return asked


def test_ladder_skips_finished_continues_broken_and_names_the_report_last(argv, reports, tmp_path, capsys, monkeypatch):
    runs = tmp_path / "runs"
    assert cli.main([*argv, "--only=llama"]) == 0
    assert json.loads((runs / "ladder.json").read_text())["runs"] == ["llama"]
    honest = loop.record

    def interrupt(log, progress, config, n, measured):
        if (config.name, n) == ("tnl", 5):
            raise KeyboardInterrupt
        return honest(log, progress, config, n, measured)

    monkeypatch.setattr(loop, "record", interrupt)
    assert cli.main([*argv, "--only=*l*"]) == 130
    monkeypatch.setattr(loop, "record", honest)
    capsys.readouterr()

    assert cli.main([*argv, "--only=*l*"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(runs / "report" / "index.html") and reports == [runs, runs]
    assert "[1/2] llama: finished before" in err and "[2/2] tnl: continues after step 4" in err
    assert re.search(r"\[2/2\] tnl: step 6/6, .*; ladder \d+:\d\d left", err)
    assert json.loads((runs / "ladder.json").read_text()) == {"recipe": argv[1][9:], "runs": ["llama", "tnl"]}
    assert (runs / "tnl" / "DONE.json").exists()


def test_every_run_is_checked_before_the_first_is_trained(argv, monkeypatch, capsys, tmp_path):
    foreign = tmp_path / "runs" / "cosformer2"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("")
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("trained"))
    assert cli.main(argv) == 2
    assert "notes.txt but no config.json" in capsys.readouterr().err


def test_several_processes_are_refused(argv, monkeypatch, capsys):
    several = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for variable, value in several.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(ladder, "run", lambda *_: pytest.fail("trained"))
    assert cli.main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "linscale ladder is one process" in said[0]


def test_space_is_checked_for_all_runs_together(make, monkeypatch):
    configs = [make("llama"), make("tnl")]
    run_folder.check(configs[0])
    one = 12 * flops.count_parameters(configs[0].model).total
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 + 4 * one))
    run_folder.check_space(configs[:1])
    with pytest.raises(ConfigError, match="GB free"):
        run_folder.check_space(configs)


def test_outlook_counts_starts_and_flops(make, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(ladder.time, "perf_counter", lambda: clock[0])
    configs = [make("llama"), make("tnl")]  # 40 steps each
    outlook = ladder.Outlook(configs)
    outlook.begin(configs[0])
    clock[0] = 5.0  # compile
    outlook.left(1)
    clock[0] = 5.0 + 19.0
    share = flops.flops_per_token(configs[1].model, 32) / flops.flops_per_token(configs[0].model, 32)
    assert outlook.left(20) == pytest.approx(20 + 40 * share + 5)  # 1 s a step here; then the other run and its start


def test_demo_is_the_default_and_spans_thirty_times():
    assert ladder.DEFAULT == "configs/demo.py"
    configs = recipes.load_ladder(ladder.DEFAULT, [])
    sizes = {}
    for config in configs:
        sizes.setdefault(config.model.arch, []).append(flops.count_parameters(config.model).nonembedding)
    assert set(sizes) == {"llama", "tnl", "hgrn2", "cosformer2"}
    for counts in sizes.values():
        assert len(counts) >= 5 and counts == sorted(counts) and counts[-1] >= 30 * counts[0]
    for config in configs:  # names carry sizes
        size = float(config.name.split("-")[1].removesuffix("k")) * 1000
        assert flops.count_parameters(config.model).nonembedding == pytest.approx(size, rel=0.1)
    assert len({(config.data, config.train.sequence) for config in configs}) == 1  # curves can be compared
