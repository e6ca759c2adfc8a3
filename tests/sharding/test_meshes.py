"""Runs one_step.py on eight devices."""

from pathlib import Path

import pytest


@pytest.mark.parametrize("marked", ("not slow", pytest.param("slow", marks=pytest.mark.slow)))
def test_on_eight_devices(on_eight_devices, marked):
    on_eight_devices(Path(__file__).with_name("one_step.py"), marked)
