"""One step of a stage that trains whole epochs in a launch, by the clocks of all its blocks."""

from dataclasses import dataclass

import pandas as pd

from workflow.plotting import ladder, style, wording
from workflow.report import timeline
from workflow.report.shown import Shown


@dataclass(frozen=True)
class Section:
    """Where one block was during a part of a step; microseconds since the step began."""

    block: int
    start: float
    length: float
    color: str
    hint: str


@dataclass(frozen=True)
class Clocks:
    """One step of a stage by the clocks of all its blocks."""

    title: str
    color: str
    step: int
    blocks: int
    length: float
    """Microseconds of the step, from the first mark to the last."""
    sections: tuple[Section, ...]


def clocks(shown: Shown, size: int) -> list[Clocks]:
    """Of each stage whose blocks recorded their clocks on a GPU, the step of median length."""
    rows = timeline.recorded(shown, size)
    found = []
    for stage in ladder.ordered(rows["stage"]) if len(rows) else ():
        own = timeline.median_step(rows[rows["stage"] == stage])
        zero = float(own["begin_seconds"].min())
        found.append(
            Clocks(
                wording.title(stage),
                style.mark(stage).color,
                int(own["step"].iloc[0]),
                own["block"].nunique(),
                1e6 * (float(own["end_seconds"].max()) - zero),
                tuple(section(row, zero) for _, row in own.iterrows()),
            )
        )
    return found


def section(row: pd.Series, zero: float) -> Section:
    """The section of a row of the table `timeline`."""
    length = 1e6 * (row["end_seconds"] - row["begin_seconds"])
    color = timeline.COLOURS["waiting" if row["part"] == "wait" else row["part"]]
    hint = f"block {row['block']}, {row['section']}: {timeline.micro(length)}"
    return Section(int(row["block"]), 1e6 * (row["begin_seconds"] - zero), length, color, hint)
