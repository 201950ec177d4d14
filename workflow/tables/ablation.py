"""What each technique of stage tuned gains: epochs without it over epochs with it.

Each technique is two stages of workflow/experiments/ablation/ that differ in it alone, measured in
one sweep. The gain is the median epoch without it over that with it, with the 95 % bootstrap
interval over the repeats; below 1 the technique costs time. Where one of the two has no valid
times there is no gain.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from cnnlib.measuring.intervals import interval
from workflow.plotting import frames, wording

TABLES = ("epochs",)
STAGES = (
    "graph_launches",
    "graph_captured",
    "graph_programmatic",
    "graph_gathered_by_host",
    "graph_layers",
    "graph_ffma",
    "graph_tf32",
    "graph_bf16",
    "persistent",
    "persistent_one_team",
    "persistent_without_bulk_copies",
    "persistent_tf32",
)
"""Without any of these in the sweep there is no such table."""
COLUMNS = {
    "dataset": "text",
    "network": "text",
    "device": "text",
    "device_kind": "text",
    "batch_size": "count",
    "technique": "text",
    "stage_without": "text",
    "stage_with": "text",
    "seconds_without": "number",
    "seconds_with": "number",
    "gain": "number",
    "gain_low": "number",
    "gain_high": "number",
}
KEY = ["dataset", "network", "device", "device_kind", "batch_size"]


class Technique(NamedTuple):
    """A technique, and the stages that differ in it alone."""

    name: str
    without: str
    by: str


TECHNIQUES = (
    Technique("many steps in one CUDA graph", "graph_launches", "graph_captured"),
    Technique("programmatic launches in the graph", "graph_captured", "graph_programmatic"),
    Technique("images gathered on the GPU", "graph_gathered_by_host", "graph_programmatic"),
    Technique("last layers and loss in one launch", "graph_layers", "graph_programmatic"),
    Technique("tensor cores: TF32, three products", "graph_ffma", "graph_tf32"),
    Technique("FP16 planes instead of TF32", "graph_tf32", "graph_programmatic"),
    Technique("FP16 planes instead of BF16", "graph_bf16", "graph_programmatic"),
    # The graph that is the faster one on an H100 at most batch sizes.
    Technique("one launch instead of a graph", "graph_captured", "persistent"),
    Technique("two teams of threads a block", "persistent_one_team", "persistent"),
    Technique("bulk copies of weights", "persistent_without_bulk_copies", "persistent"),
    Technique("one launch: FP16 planes split once", "persistent_tf32", "persistent"),
)


def make(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A line for each technique at each batch size that either of its stages was measured at."""
    lines = []
    for key, group in frames.groups(tables["epochs"], KEY):
        rows = {str(name): part for name, part in group.groupby("stage", sort=False)}
        for technique in TECHNIQUES:
            if technique.without in rows or technique.by in rows:
                pair = [timed(rows.get(name)) for name in technique[1:]]
                place = dict(zip(KEY, key, strict=True))
                lines.append(place | compared(technique, *pair))
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    order = [technique.name for technique in TECHNIQUES]
    return frame.sort_values(
        [*KEY[:4], "technique", "batch_size"],
        key=lambda column: column.map(order.index) if column.name == "technique" else column,
        kind="stable",
    )


def timed(rows: pd.DataFrame | None) -> list[np.ndarray]:
    """The valid epoch times of each repeat, in seconds."""
    if rows is None:
        return []
    good = rows[(rows["status"] == "ok") & rows["validated"] & rows["epoch_seconds"].notna()]
    return [times.to_numpy() for _, times in good.groupby("repeat")["epoch_seconds"]]


def compared(
    technique: Technique, without: list[np.ndarray], by: list[np.ndarray]
) -> dict[str, object]:
    """The columns after KEY; nan where one of the two has no times."""
    slow, fast = (np.median(np.concatenate(each)) if each else np.nan for each in (without, by))
    low, high = interval(by, without) if without and by else (np.nan, np.nan)
    return {
        "technique": technique.name,
        "stage_without": technique.without,
        "stage_with": technique.by,
        "seconds_without": slow,
        "seconds_with": fast,
        "gain": slow / fast,
        "gain_low": low,
        "gain_high": high,
    }


def markdown(frame: pd.DataFrame) -> str:
    """One table a data set and network: a line a technique, a column a batch size."""
    parts = []
    for (dataset, network), lines in frames.groups(frame, ["dataset", "network"]):
        sizes = sorted(set(lines["batch_size"]))
        head = ["technique", *(f"batch {size}" for size in sizes)]
        table = [head, ["---"] + ["---:"] * len(sizes)]
        for (technique, kind), group in frames.groups(lines, ["technique", "device_kind"]):
            gains = dict(zip(group["batch_size"], group["gain"], strict=True))
            name = f"{technique} ({wording.EMULATED})" if kind == "emulated" else str(technique)
            table.append([name, *(cell(gains.get(size, np.nan)) for size in sizes)])
        parts.append(f"{wording.what(dataset, network)}\n\n{wording.markdown_table(table)}")
    note = "Epoch without the technique over epoch with it; below 1 it costs time."
    return "\n\n".join([*parts, note]) + "\n"


def cell(gain: float) -> str:
    """A gain, or a dash where there is none."""
    return "-" if np.isnan(gain) else f"{gain:.2f}×"
