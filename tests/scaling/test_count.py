"""The counting command: its JSON, its table, its speed and its imports."""

import json
import subprocess
import sys
import time

import pytest

from linscale.scaling import count, paper

KEYS = [
    "arch",
    "size",
    "layers",
    "width",
    "heads",
    "ffn",
    "params_nonembedding_paper",
    "pflops_per_step_paper",
    "params_total",
    "params_nonembedding",
    "flops_per_token",
]


def test_json_is_the_24_models_with_these_keys(capsys):
    assert count.main(["--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [list(row) for row in table] == [KEYS] * 24
    assert {row["arch"] for row in table} == {"llama", "tnl", "hgrn2", "cosformer2"}
    assert [row["size"] for row in table[:6]] == ["70m", "160m", "410m", "1b", "3b", "7b"]
    llama = table[5]
    assert all(isinstance(llama[key], int) for key in KEYS if key.startswith("params"))
    assert llama["params_nonembedding_paper"] == 6_476_529_664
    assert llama["pflops_per_step_paper"] == pytest.approx(202.6723, abs=1e-4)


def test_table_prints_the_papers_digits(capsys):
    assert count.main([]) == 0
    out = capsys.readouterr().out
    for arch in ("llama", "tnl", "hgrn2"):
        lines = [line.split() for line in out.splitlines() if line.startswith(arch)]
        assert [float(line[7]) for line in lines] == list(paper.TABLE7_PARAMETERS[arch])
        assert [float(line[8]) for line in lines] == list(paper.TABLE7_PFLOPS[arch])


def test_options_change_the_figures(capsys):
    assert count.main(["--json", "--aspects", "--batch", "240"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert len(table) == 40
    assert table[5]["pflops_per_step_paper"] == pytest.approx(202.6723 / 2, abs=1e-4)


def test_starts_fast_without_jax():
    """The command answers in under a second because nothing on its way imports jax."""
    program = (
        "import sys; from linscale.scaling import count; count.main([]);"
        "print(sorted({'jax', 'numpy', 'grain', 'ml_collections', 'matplotlib'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", "linscale.models and linscale.scaling must import lazily"
    assert time.perf_counter() - start < 5  # a loaded machine; alone it takes 0.1 s
