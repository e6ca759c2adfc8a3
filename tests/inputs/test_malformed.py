"""Malformed inputs: each is one sentence and exit code 2, and harms no file. experiments/faults/malformed.py counts them."""

import importlib

import pytest
from judging import judge

ROOMS = ("config_cases",)
CASES = [case for room in ROOMS for case in importlib.import_module(room).cases()]


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.delenv("LINSCALE_TRACEBACK", raising=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}: {case.name}"[:80])
def test_one_sentence_and_no_file_harmed(case, tmp_path):
    wrong, said = judge(case, tmp_path)
    assert not wrong, f"{'; '.join(wrong)}\nsaid: {said}"
