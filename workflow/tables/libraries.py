"""The last stage of the ladder against PyTorch and JAX: a line for each network and batch size.

Each line has the median epoch of the last stage that was measured there, of the quickest library
in float32 and of the quickest in TF32, and the ratios of the medians with their 95 % bootstrap
intervals over the repeats; above 1 the stage is the faster one. Of a stage that has several plans
it says which one trained. `accuracy` is what trainings at this batch size recognise in the end.
Emulated kernels have no times and make no line.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from cnnlib.engine.plans import Plans
from cnnlib.measuring.intervals import interval
from cnnlib.peers import PEERS
from cnnlib.stages import LADDER
from workflow.plotting import accuracies, frames, ladder, wording
from workflow.plotting.timings import repeats

TABLES = ("epochs", "kernels")
STAGES = (
    "torch",
    "torch_graph",
    "torch_compile",
    "torch_compile_tf32",
    "jax",
    "jax_tf32",
)
"""Without any of these in the sweep there is no such table."""
COLUMNS = {
    "dataset": "text",
    "network": "text",
    "batch_size": "count",
    "stage": "text",
    "plan": "text",
    "device": "text",
    "epoch_seconds": "number",
    "accuracy": "number",
    "library": "text",
    "library_seconds": "number",
    "ratio": "number",
    "ratio_low": "number",
    "ratio_high": "number",
    "tf32_library": "text",
    "tf32_library_seconds": "number",
    "tf32_ratio": "number",
    "tf32_ratio_low": "number",
    "tf32_ratio_high": "number",
}
CELL = ["dataset", "network", "batch_size"]
PLANS = {"persistent": {"leave_gradient"}, "stored": {"split_weights", "split_source"}}
"""Kernels, or parts of a kernel, by which a plan is known; plan graph has none of them. Plan stored
trained runs that are published, and is gone."""
Times = dict[str, list[np.ndarray]]
"""Seconds of the epochs of each repeat, by stage."""


def make(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The lines, networks in the order in which they were measured, batch sizes ascending."""
    epochs, kernels = tables["epochs"], tables["kernels"]
    good = epochs[(epochs["device_kind"] != "emulated") & epochs["validated"]]
    cells: dict[Any, Times] = {}
    for (*place, name), own in repeats(good, [*CELL, "stage"]).items():
        if own:
            cells.setdefault(tuple(place), {})[name] = own
    device = dict(good.groupby([*CELL, "stage"])["device"].first())
    accuracy = accuracies.by_batch(accuracies.of_epochs(good))
    rounded = [stage.name for stage in PEERS if stage.rounding is not None]
    lines = []
    places = list(dict.fromkeys(cell[:2] for cell in cells))
    for cell, times in sorted(cells.items(), key=lambda each: (places.index(each[0][:2]), each[0])):
        ran = [stage for stage in LADDER if stage.name in times]
        if not ran or not times.keys() & ladder.NAMES_OF_PEERS:
            continue
        stage = ran[-1]
        trained = kernels[
            (kernels[CELL] == list(cell)).all(axis=1) & (kernels["stage"] == stage.name)
        ]
        lines.append(
            dict(zip(CELL, cell, strict=True))
            | {
                "stage": stage.name,
                "plan": plan(trained) if isinstance(stage.options, Plans) else "",
                "device": device[*cell, stage.name],
                "epoch_seconds": median(times[stage.name]),
                "accuracy": accuracy.get(cell, math.nan),
            }
            | compared("", times, stage.name, ladder.exact_peers())
            | compared("tf32_", times, stage.name, rounded)
        )
    return pd.DataFrame(lines, columns=list(COLUMNS))


def plan(kernels: pd.DataFrame) -> str:
    """The plan by which these kernels trained; where repeats chose differently, all of them.

    "" where no kernel was timed.
    """
    found = set()
    for _, timed in kernels[kernels["launches"] > 0].groupby("repeat"):
        names = set(timed["kernel"])
        found.add(next((plan for plan, own in PLANS.items() if own & names), "graph"))
    return " and ".join(sorted(found))


def median(times: Iterable[np.ndarray]) -> float:
    """The median of all epochs, in seconds."""
    return float(np.median(np.concatenate(list(times))))


def compared(prefix: str, times: Times, own: str, libraries: Iterable[str]) -> dict[str, object]:
    """The quickest of the libraries, and how many times as long as `own` it takes; nan without one.

    `prefix` is that of the columns' names.
    """
    measured = {library: median(times[library]) for library in libraries if library in times}
    best = min(measured, key=measured.__getitem__, default="")
    seconds = measured.get(best, math.nan)
    low, high = interval(times[own], times[best]) if best else (math.nan, math.nan)
    return {
        f"{prefix}library": best,
        f"{prefix}library_seconds": seconds,
        f"{prefix}ratio": seconds / median(times[own]),
        f"{prefix}ratio_low": low,
        f"{prefix}ratio_high": high,
    }


def mean_ratio(ratios: pd.Series) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(ratios).mean()))


# for people -------------------------------------------------------------------------------------


def markdown(frame: pd.DataFrame) -> str:
    """One table: a line for each network and batch size, the mean below it."""
    head = ["network", "batch", "accuracy", "stage", "plan", "epoch"]
    head += ["best in float32", "its epoch", "ratio", "best in TF32", "its epoch", "ratio"]
    right, left = "---:", "---"
    peer = [left, right, right]
    rows = [head, [left, right, right, left, left, right, *peer, *peer]]
    for line in frames.rows(frame):
        exact = line.library, line.library_seconds, line.ratio, line.ratio_low, line.ratio_high
        tf32 = line.tf32_library, line.tf32_library_seconds, line.tf32_ratio
        spread = line.tf32_ratio_low, line.tf32_ratio_high
        what = wording.what(line.dataset, line.network)
        own = [wording.said(line.stage), line.plan or "–", wording.duration(line.epoch_seconds)]
        known = "–" if pd.isna(line.accuracy) else f"{100 * line.accuracy:.1f} %"
        rows.append(
            [what, str(line.batch_size), known, *own, *cells(*exact), *cells(*tf32, *spread)]
        )
    devices = " and ".join(dict.fromkeys(map(wording.device, frame["device"])))
    return f"{wording.markdown_table(rows)}\n{note(frame, devices)}\n"


def short(frame: pd.DataFrame) -> str:
    """A line for each batch size, a column for each network: the ratio to the best in float32.

    A network that was trained on several data sets is shown with the first. Lines that are
    `earlier`, if there is such a column, are in italics.
    """
    first = frame.drop_duplicates("network").set_index("network")["dataset"]
    rows = [["batch", *(f"`{name}`" for name in first.index)], ["---:"] * (len(first) + 1)]
    for size, group in frames.groups(frame, "batch_size", sort=True):
        found = {(line.network, line.dataset): line for line in frames.rows(group)}
        rows.append([str(size), *(short_cell(found.get(place)) for place in first.items())])
    return wording.markdown_table(rows)


def short_cell(line: Any) -> str:
    """`8.3×`, and the stage where it is not the ladder's last; a dash where there is no ratio."""
    if line is None or pd.isna(line.ratio):
        return "–"
    by = "" if line.stage == LADDER[-1].name else f" ({wording.said(line.stage)})"
    mark = "*" if getattr(line, "earlier", False) is True else ""
    return f"{mark}{wording.times(line.ratio)}{by}{mark}"


def cells(library: str, seconds: float, ratio: float, low: float, high: float) -> list[str]:
    """The name of a library, its epoch and the ratio with its interval; dashes without one."""
    if not library:
        return ["–"] * 3
    spread = "" if low != low else f" ({wording.times(low)} to {wording.times(high)})"
    return [wording.said(library), wording.duration(seconds), wording.times(ratio) + spread]


def note(frame: pd.DataFrame, devices: str) -> str:
    """How to read the table, and what its ratios come to together."""
    text = f"Measured on {devices}. Medians of all epochs; in brackets the 95 % bootstrap interval "
    text += "over the repeats. Accuracy: on the test set, at the end of these short trainings. "
    text += "Ratio: the library's epoch over the stage's."
    for column, kind in (("ratio", "float32"), ("tf32_ratio", "TF32")):
        known = frame[column].dropna()
        if len(known):
            text += (
                f" Against {kind}: {wording.times(known.min())} to {wording.times(known.max())}, "
                f"geometric mean {wording.times(mean_ratio(known))}."
            )
    return text
