"""Labels beside lines; colours and marks of stages."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnlib.stages import LADDER
from workflow.plotting import style

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
