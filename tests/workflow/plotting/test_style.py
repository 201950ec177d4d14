"""Labels beside lines; colours and marks of stages."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnlib.paths import ROOT
from cnnlib.stages import LADDER
from workflow.plotting import ladder, style

pytestmark = pytest.mark.quick


@given(
    st.lists(st.floats(0, 300, allow_nan=False), min_size=1, max_size=12).map(sorted),
    st.floats(5, 20),
)
def test_labels_do_not_overlap_and_stay_close(wanted: list[float], gap: float) -> None:
    placed = style.spread(wanted, gap, -1000, 1000)
    assert len(placed) == len(wanted)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(placed))
    assert max(abs(p - w) for p, w in zip(placed, wanted, strict=True)) <= gap * len(wanted)


def test_every_stage_of_the_ladder_has_its_own_colour_and_mark() -> None:
    marks = [style.mark(stage.name) for stage in LADDER]
    assert (
        len({mark.color for mark in marks}) == len({mark.marker for mark in marks}) == len(LADDER)
    )


def test_a_stage_made_from_another_is_not_drawn_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the other's colour and mark in its record, as long as it says nothing of its own."""
    ring = LADDER[4]
    copy = dataclasses.replace(ring, name="ring_copy")
    own = dataclasses.replace(ring, name="ring_own", color="#123456", marker="*")
    plain = dataclasses.replace(ring, name="ring_plain", color="", marker="")
    monkeypatch.setattr(ladder, "ALL", (*LADDER, copy, own, plain))
    assert style.mark("ring") == style.Mark(ring.color, ring.marker)
    assert style.mark("ring_own") == style.Mark("#123456", "*")
    assert {style.mark("ring_copy"), style.mark("ring_plain")} <= set(style.OTHERS)
    assert style.mark("a stage of an old table") in style.OTHERS


def test_a_program_that_draws_does_not_wait_for_statistics() -> None:
    """With scipy.stats, which seaborn imports if it can, starting takes nearly twice as long.

    No entry of it is left behind, by which a later import would fail.
    """
    code = (
        "import sys, workflow.plotting.draw, workflow.report.page, workflow.report.poster; "
        "print(*{'seaborn', 'scipy.stats', 'scipy.cluster'}.intersection(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "seaborn\n"
