import json
import re

from linscale.training import metrics


def test_cut_keeps_lines_up_to_the_step_and_drops_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "loss": 0.1}, {"step": 4, "loss": 0.2}, {"step": 4, "heldout_loss": 0.3}, {"step": 6}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "lo')
    before = path.read_text().splitlines()[:3]
    assert metrics.cut(path, 4) == lines[:3]
    assert path.read_text().splitlines() == before  # the very bytes
    assert metrics.cut(path, 0) == [] and path.read_text() == ""


def test_cut_of_nothing(tmp_path):
    assert metrics.cut(tmp_path / "metrics.jsonl", 10) == []


def test_plain_progress_is_rate_limited_and_names_what_matters(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    progress = metrics.Progress("[2/5] tnl-10k", 100, 0, 1000, note=lambda step: f"ladder {step}")
    for step in range(1, 101):
        clock[0] += 0.5
        progress.update(step, 2.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6  # at 0.5 s, then each 10 s, and the last step
    assert lines[1] == "[2/5] tnl-10k: step 21/100, loss 2.500, 2,000 tokens/s, 0:40 left; ladder 21"
    assert re.match(r".*step 100/100.* 0:00 left", lines[-1])


def test_duration():
    assert [metrics.duration(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]
