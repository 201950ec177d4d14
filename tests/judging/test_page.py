"""The page and the numbers on it."""

import json
from pathlib import Path

import numpy as np
import pytest

from cnnlib.engine import KernelTime, Setup
from cnnlib.judging import page, record, roofline
from cnnlib.judging.record import Findings, Part
from cnnlib.judging.rivals import Arm, Race, Timing, ratio
from cnnlib.judging.roofline import Limits, Point
from cnnlib.judging.tools import METRICS, Counter
from tests.support.networks import lenet5

pytestmark = pytest.mark.quick

OWN, OTHER = Arm("./mine.py", "judged", "cuda", "mine"), Arm("tuned", "stage", "cuda")


def timing(arm: Arm, repeat: int, seconds: float) -> Timing:
    return Timing(arm, repeat, seconds, 640, 0.5, "a GPU")


def test_ratios_are_taken_within_repeats() -> None:
    """The machine gets twice as slow from repeat to repeat; the ratio is always three."""
    times = [timing(OWN, r, 2.0**r) for r in range(5)]
    times += [timing(OTHER, r, 3 * 2.0**r) for r in range(4)]
    found = ratio(Race(times, [], {}), OWN, OTHER)
    assert found is not None
    assert (found.factor, found.low, found.high) == (3.0, 3.0, 3.0)
    one = ratio(Race([timing(OWN, 1, 1.0), timing(OTHER, 1, 2.0)], [], {}), OWN, OTHER)
    assert one is not None
    assert one.factor == 2.0
    assert np.isnan(one.low)  # one repeat has no interval
    assert ratio(Race([timing(OWN, 1, 1.0), timing(OTHER, 2, 2.0)], [], {}), OWN, OTHER) is None


def test_the_interval_holds_what_varies() -> None:
    times = [timing(OWN, r, 1.0) for r in range(9)]
    times += [timing(OTHER, r, 2.0 + 0.1 * (r % 3)) for r in range(9)]
    found = ratio(Race(times, [], {}), OWN, OTHER)
    assert found is not None
    assert 2.0 <= found.low < found.factor < found.high <= 2.2


def test_the_arithmetic_of_a_step() -> None:
    """Training takes about three times the arithmetic of going forward."""
    network = lenet5()
    setup = Setup(network, 64, 0.1)
    least = roofline.step_arithmetic(network, setup)
    forward = 64 * sum(network.forward_flops)
    assert 2.5 * forward < least.flops < 3.2 * forward
    found = roofline.point("mine", network, setup, seconds_per_image=1e-6)
    assert found.rate == pytest.approx(least.flops / 64e-6)
    limits = Limits(100.0, 1000.0, "memory", "peak")
    assert [limits.attainable(each) for each in (1.0, 10.0, 50.0)] == [100.0, 1000.0, 1000.0]


@pytest.fixture
def findings() -> Findings:
    found = Findings(
        "mine", "<Mine>", "./mine.py", "mnist", "lenet5", 64, 7, "a GPU", "cuda", {"cpu": "one"}
    )
    found.parts = [Part("check", "right", "all is well", 1.0, ["this & that"])]
    found.timings = [timing(OTHER, 1, 0.2), timing(OWN, 1, 0.1)]
    found.profile = [KernelTime("conv1", "conv_forward", "conv1", "forward", 1, 1, 4, 2, 1e-5)]
    found.counters = [Counter("conv1_forward", 2, [1.5] * len(METRICS))]
    found.limits = Limits(1e12, 5e13, "device memory", "fp32")
    found.points = [Point("mine", 6.0, 1e12), Point("tuned", 6.0, 5e11)]
    return found


def test_names_of_close_marks_do_not_overlap() -> None:
    assert page.apart([5.0, 100.0, 4.0, 3.0], 10.0) == [23.0, 100.0, 13.0, 3.0]


def test_everything_is_on_the_page(findings: Findings, tmp_path: Path) -> None:
    page.write(tmp_path / "page.html", findings)
    text = (tmp_path / "page.html").read_text()
    for words in (
        "all is well",
        "this &amp; that",
        "&lt;Mine&gt;",
        "conv1_forward",
        "20",
        *METRICS.values(),
    ):
        assert words in text, words
    assert text.count("data:image/svg+xml;base64,") == 2
    assert "unfinished" in text
    page.write(tmp_path / "again.html", findings)
    assert (tmp_path / "again.html").read_text() == text


def test_the_files_say_the_same(findings: Findings, tmp_path: Path) -> None:
    findings.finished = True
    record.write(tmp_path, findings)
    facts = json.loads((tmp_path / "judge.json").read_text())
    assert (facts["verdict"], facts["rejected"]) == ("right", False)
    assert (tmp_path / "times.csv").read_text().splitlines()[2] == "mine,judged,1,640,0.1,0.5,a GPU"
    assert (tmp_path / "counters.csv").read_text().startswith("kernel,launches,gpu__time")
    findings.parts.append(Part("tricks", "REJECTED", "it cheats", 1.0))
    assert findings.verdict == "rejected (tricks: it cheats)"
    findings.parts = [Part("check", "unjudged", "near-ties", 1.0)]
    assert (findings.rejected, findings.verdict) == (True, "no verdict (check: near-ties)")
    assert record.clear(tmp_path)
    assert not record.clear(tmp_path)
