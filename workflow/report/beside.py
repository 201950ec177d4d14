"""The reader's own machine beside published measurements."""

from collections.abc import Sequence

import pandas as pd

from workflow.plotting import wording
from workflow.report.rungs import TABLE
from workflow.report.shown import Shown, of_network

EMULATED = "checks, no times"


def own_times(shown: Shown, size: int) -> dict[str, str]:
    """What the stages took on the reader's own machine at a batch size, by their names.

    Emulated stages have been checked there, and have no times.
    """
    if shown.own is None:
        return {}
    own = of_network(shown.own, "ladder", shown.dataset, shown.network)
    at_size = own[own["batch_size"] == size]
    checked = at_size[(at_size["device_kind"] == "emulated") & was_checked(at_size)]
    timed = at_size[(at_size["device_kind"] != "emulated") & at_size["epoch_seconds"].notna()]
    return dict.fromkeys(checked["stage"], EMULATED) | {
        str(line["stage"]): TABLE.epoch_cell(line) for _, line in timed.iterrows()
    }


def notes(shown: Shown, stages: Sequence[str]) -> list[str]:
    """A line on the stages that were checked on the reader's machine, and on those that were not
    measured there at all.
    """
    if shown.own is None:
        return []
    own = of_network(shown.own, "ladder", shown.dataset, shown.network)
    if own.empty:
        return [f"Your machine has not trained {shown.what}: its own results are further below."]
    timed = set(own.loc[(own["device_kind"] != "emulated") & own["epoch_seconds"].notna(), "stage"])
    checked = set(own.loc[(own["device_kind"] == "emulated") & was_checked(own), "stage"])
    emulated = [wording.title(name) for name in stages if name in checked - timed]
    missing = [wording.title(name) for name in stages if name not in checked | timed]
    lines = []
    if emulated:
        lines.append(f"Checked here by emulation, no times: {', '.join(emulated)}.")
    if missing:
        lines.append(f"Not measured on your machine: {', '.join(missing)}.")
    return lines


def was_checked(lines: pd.DataFrame) -> pd.Series:
    """Which lines are of runs that were validated."""
    return (lines["status"] == "ok") & lines["validated"].astype(bool)
