"""`linscale eval` on a run that training wrote: what it appends, that it continues, and what it refuses."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from linscale import cli
from linscale.evaluation import results, runs, scoring, table

pytest.importorskip("lm_eval")


@pytest.fixture
def ladder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


def evaluate(ladder, *options):
    return cli.main(["eval", str(ladder), *options])


def test_every_checkpoint_once(ladder, data_dir, capsys):
    options = ("--tasks", "piqa,wikitext,lambada_openai,winogrande", "--data-dir", str(data_dir), "--steps", "all")
    assert evaluate(ladder, *options, "--samples") == 0
    lines = results.read(ladder / "tnl-tiny")
    assert [(line["step"], line["task"]) for line in lines] == [
        (step, task) for step in (4, 8) for task in ("piqa", "wikitext", "lambada_openai", "winogrande")
    ]
    for line in lines:
        assert line["tokens"] == line["step"] * 64 and line["flops"] > 0 and line["heldout_loss"] > 0
        assert set(line["errors"]) <= set(line["scores"]) and line["documents"] >= 2
    samples = (ladder / "tnl-tiny" / "evals" / "samples" / "piqa-8.jsonl").read_text().splitlines()
    assert len(samples) == 3 and "Twist the lid." in samples[0]

    # killed while it wrote the sixth line: that one is measured again, the others are not
    path = results.path_of(ladder / "tnl-tiny")
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:5]) + kept[5][:40])
    capsys.readouterr()
    assert evaluate(ladder, *options) == 0
    said = capsys.readouterr().out
    assert "step 4: 0 of 4 tasks" in said and "step 8: 3 of 4 tasks" in said
    again = results.read(ladder / "tnl-tiny")
    assert path.read_bytes().splitlines(keepends=True)[:5] == kept[:5]
    assert [line["scores"] for line in again] == [line["scores"] for line in lines]
    assert "| PIQA | WG | WIKI | LAMB |" in said

    rows = table.of_ladder(ladder)
    assert [row["step"] for row in rows] == [4, 8]
    assert rows[1]["PIQA"] == 100 * lines[4]["scores"]["acc"] and rows[1]["CSR"] is None
    assert table.comma_separated(rows).splitlines()[0].startswith("run,arch,parameters,step,tokens,flops")


def test_parameters_are_those_that_training_saved(ladder):
    run = runs.open_run(ladder / "tnl-tiny")
    heldout = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    heldout = [line["heldout_loss"] for line in heldout if "heldout_loss" in line and line["step"] == 8]
    from linscale.data import prepare

    tokens = prepare(run.config.data, 264, log=lambda _: None).heldout
    scorer = scoring.Scorer(run.config.model, run.params(8))
    documents = [tokens.tokens[a:b].tolist() for a, b in zip(tokens.starts, [*tokens.starts[1:], len(tokens.tokens)])]
    # a document begins with its separator; the label after its last token is the next document's
    losses = [-scorer.token_scores([[*d[1:], d[0]]], d[0])[0] for d in documents]
    total, count = sum(float(x.sum()) for x in losses), sum(len(x) for x in losses)
    assert total / count == pytest.approx(heldout[-1], rel=0.02)  # rows of 32 tokens forget what came before them


def test_needles_and_positions(ladder, capsys):
    options = ["--tasks", "needle_easy,positions", "--needle-lengths", "300:400:2", "--needle-depths", "3"]
    assert evaluate(ladder, *options) == 0
    needle, positions = results.read(ladder / "tnl-tiny")
    assert needle["scores"]["accuracy"] == 0 and needle["documents"] == 6
    grid = json.loads((ladder / "tnl-tiny" / "evals" / "needle_easy-8.json").read_text())
    assert grid["lengths"] == [300, 400] and grid["depths"] == [0, 0.5, 1]
    assert list(positions["scores"])[:5] == ["0-4", "4-8", "8-16", "16-32", "32-64"]
    assert list(positions["scores"])[-1] == "256-512"


MISSPELT = (["--tasks", "piqqa"], "'piqqa' is not a task of the harness; did you mean piqa")


@pytest.fixture
def small_index(monkeypatch):
    """The harness knows one folder of its tasks: it takes many seconds to read all 14,000."""
    from lm_eval import tasks as harness

    folder = Path(harness.__file__).parent / "piqa"
    manager = functools.partial(harness.TaskManager, include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", manager)


@pytest.mark.usefixtures("small_index")
@pytest.mark.parametrize(
    "options, message",
    [
        MISSPELT,
        (
            ["--tasks", "boolq", "--data-dir", "DATA"],
            "boolq.jsonl (or, in DATA, boolq.mosaic.jsonl or boolq.parquet), which is missing; it comes from huggingface.co/datasets/aps/super_glue",
        ),
        (["--tasks", "scrolls_qasper", "--data-dir", "DATA"], "qasper/validation.jsonl"),
        (["--tasks", "piqa", "--data-dir", "nowhere"], "--data-dir is 'nowhere', which is no folder"),
        (["--tasks", ""], "--tasks is empty"),
        (["--tasks", "positions", "--steps", "5"], "has no checkpoint of step 5; it has 4, 8"),
        (["--tasks", "positions", "--steps", "new"], "--steps is 'new'; it must be"),
        (["--tasks", "positions", "--limit", "0"], "--limit is 0"),
        (["--tasks", "needle_easy", "--haystack", "nowhere.txt"], "--haystack is nowhere.txt"),
        (
            ["--tasks", "needle_easy", "--needle-lengths", "20:40:2", "--needle-depths", "2"],
            "does not hold needle and question",
        ),
    ],
)
def test_what_is_refused(ladder, data_dir, capsys, monkeypatch, options, message):
    assert evaluate(ladder, *[str(data_dir) if option == "DATA" else option for option in options]) == 2
    assert message.replace("DATA", str(data_dir)) in capsys.readouterr().err
    assert not results.read(ladder / "tnl-tiny")


@pytest.mark.slow
def test_a_misspelt_task_is_refused_by_the_whole_index(ladder, capsys):
    assert evaluate(ladder, *MISSPELT[0]) == 2
    assert MISSPELT[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"goal": "x"', "piqa.jsonl line 1 cannot be read"),
        ('{"goal": "x", "sol1": "y"}', "piqa.jsonl row 1 is no row of piqa"),
        ('{"a": 1, "b": 2}', "piqa.jsonl row 1 has the fields a, b, which are not those of piqa"),
        ("", "holds no rows"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
    ],
)
def test_broken_files_are_named(ladder, tmp_path, capsys, content, message):
    (tmp_path / "piqa.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert evaluate(ladder, "--tasks", "piqa", "--data-dir", str(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_no_run_and_a_damaged_checkpoint(ladder, tmp_path, capsys):
    assert evaluate(tmp_path / "nothing", "--tasks", "positions") == 2
    assert "holds neither a run (config.json) nor runs" in capsys.readouterr().err
    for path in (ladder / "tnl-tiny" / "checkpoints" / "8").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:-500])
    assert evaluate(ladder, "--tasks", "positions") == 2
    assert "cannot be read" in capsys.readouterr().err
