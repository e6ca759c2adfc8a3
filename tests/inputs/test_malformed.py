"""Malformed inputs: each is one sentence and exit code 2, and harms no file. experiments/faults/malformed.py counts them."""

import pytest
from judging import all_cases, judge


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.delenv("LINSCALE_TRACEBACK", raising=False)


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.group}: {case.name}"[:80])
def test_one_sentence_and_no_file_harmed(case, tmp_path):
    wrong, said = judge(case, tmp_path)
    assert not wrong, f"{'; '.join(wrong)}\nsaid: {said}"
