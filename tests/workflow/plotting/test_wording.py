"""How times, ratios and statuses are written."""

import math

import pytest

from cnnlib.measuring import schema
from workflow.plotting import wording

pytestmark = pytest.mark.quick


def test_every_status_has_its_word() -> None:
    assert set(wording.STATUS) == set(schema.CHOICES["status"]) - {"ok"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (25200, "7.00 h"),
        (150, "2.50 min"),
        (60, "60.0 s"),
        (3.7249, "3.72 s"),
        (0.0154, "15.4 ms"),
        (0.00123456, "1.23 ms"),
        (2.5e-6, "2.50 µs"),
        (9.9999e-8, "100 ns"),
        (math.nan, "-"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("factor", "text"),
    [(1, "1×"), (0.854, "0.85×"), (9.21, "9.2×"), (141.3, "141×"), (12345, "12,300×")],
)
def test_ratios_read_well(factor: float, text: str) -> None:
    assert wording.times(factor) == text
