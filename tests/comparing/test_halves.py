"""Verdicts on the published repeats: chance alone seldom makes one, and slowdowns are found."""

import pytest

from cnnlib.comparing import halves
from cnnlib.comparing.results import Results, read
from cnnlib.paths import ROOT

PUBLISHED = ROOT / "results/reference/nvidia-h100"


@pytest.fixture(scope="module")
def published() -> Results:
    return read(PUBLISHED)


def test_halves_of_the_published_repeats_raise_few_false_alarms(published: Results) -> None:
    """Chance alone seldom makes a verdict, 5 % in stage tuned is found, and the page says so."""
    comparisons = halves.compared(halves.halves(published))
    found = halves.rates(comparisons)
    assert found.runs > 1000
    assert found.runs_wrong < 0.05 * found.runs
    assert found.lines_wrong < 0.05 * found.lines
    together = {line[2]: least for line, (least, _) in halves.found_from(comparisons).items()}
    assert together["tuned"] < 1.05
    assert max(together.values()) < 1.6
    text = (ROOT / "docs/comparing.md").read_text(encoding="utf-8")
    assert "\n    ".join(halves.in_words(comparisons)) in text


def test_five_repeats_each_raise_no_false_regression(published: Results) -> None:
    comparisons = halves.compared(halves.dealt(published, 5, seed) for seed in range(4))
    assert halves.rates(comparisons).regressions == 0
    assert halves.rates(comparisons).runs == 8 * 54
