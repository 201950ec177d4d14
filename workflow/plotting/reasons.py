"""Why stages have no result: the sentences below figures and tables.

They come from the `reason` of raw rows (cnnlib/measuring/schema.py), so from what a run found when
it was tried, never from the config.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from workflow.plotting import ladder, wording

PLACE = ["dataset", "network"]


def left_out(rows: pd.DataFrame, cell: tuple[str, str] | None = None) -> str:
    """A line for each stage that has no result at all, as on the ladder, for below a figure.

    `cell` is the data set and network that the figure shows, if it shows one only. Rows from before
    there were reasons give no line.
    """
    if cell is not None:
        rows = rows[(rows["dataset"] == cell[0]) & (rows["network"] == cell[1])]
    lines = [
        wording.why_not(stage, *explained(group)[["status", "reason"]].iloc[0])
        for stage, group in stages(rows)
        if is_left_out(group)
    ]
    return "\n".join(dict.fromkeys(lines))


def without_left_out(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that left_out says nothing about."""
    parts = [group for _, group in stages(rows) if not is_left_out(group)]
    return pd.concat(parts) if parts else rows.iloc[:0]


def is_left_out(group: pd.DataFrame) -> bool:
    """Whether a stage has no result at all, for a known reason."""
    return len(explained(group)) > 0 and bool((group["status"] != "ok").all())


def footnotes(rows: pd.DataFrame) -> str:
    """A paragraph for each stage and status that a table shows in place of a time.

    A stage that does not fit at the larger batch sizes needs no explanation; one that never fits
    does.
    """
    lines = []
    for stage, group in stages(rows):
        known = explained(group)
        if (group["status"] == "ok").any():
            known = known[known["status"] != "does_not_fit"]
        for status, reason in known.groupby("status", sort=False)["reason"].first().items():
            lines.append(wording.why_not(stage, str(status), reason))
    return "".join(f"\n{line}\n" for line in dict.fromkeys(lines))


def stages(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(stage, its rows of one data set and network), stages as on the ladder."""
    for name in ladder.ordered(rows["stage"]):
        for _, group in rows[rows["stage"] == name].groupby(PLACE, sort=False):
            yield name, group


def explained(group: pd.DataFrame) -> pd.DataFrame:
    """The rows that say why there is no measurement."""
    given = [isinstance(reason, str) and reason != "" for reason in group["reason"]]
    return group[np.array(given, dtype=bool)]
