"""Verdicts on the published repeats: chance alone seldom makes one, and slowdowns are found."""

from dataclasses import replace

import pytest

from cnnlib.comparing import halves
from cnnlib.comparing.comparison import compare_results
from cnnlib.comparing.results import Results, read
from cnnlib.paths import ROOT

PUBLISHED = ROOT / "results/reference/nvidia-h100/earlier"


@pytest.fixture(scope="module")
def published() -> Results:
    return read(PUBLISHED)


def test_halves_of_the_published_repeats_raise_few_false_alarms(published: Results) -> None:
    """Chance alone seldom makes a verdict; the page on comparing results says how often."""
    comparisons = halves.compared(halves.halves(published))
    found = halves.rates(comparisons)
    assert found.runs > 1000
    assert found.runs_wrong < 0.05 * found.runs
    assert found.lines_wrong < 0.05 * found.lines
    assert found.regressions < 0.05 * found.comparisons
    text = (ROOT / "docs/comparing.md").read_text(encoding="utf-8")
    assert "\n    ".join(halves.in_words(comparisons)) in text


def test_five_repeats_each_find_5_percent_and_raise_no_false_alarm(published: Results) -> None:
    """The slowdowns that are found are calculated; a copy that is as much slower is found too."""
    pairs = [halves.dealt(published, 5, seed) for seed in range(4)]
    comparisons = halves.compared(pairs)
    assert halves.rates(comparisons).regressions == 0
    assert halves.rates(comparisons).runs == 8 * 54
    together = {line[2]: least for line, (least, _) in halves.found_from(comparisons).items()}
    assert together["tuned"] < 1.05
    assert max(together.values()) < 1.5
    for a, b in pairs:
        slower = {
            key: replace(run, seconds={i: 1.05 * times for i, times in run.seconds.items()})
            for key, run in b.runs.items()
            if key.stage == "tuned"
        }
        (line,) = compare_results(a, replace(b, runs=slower)).lines
        assert line.effect.word == "slower"
