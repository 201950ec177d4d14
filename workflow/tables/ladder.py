"""The ladder: each stage, its one change, the time of its epoch and its speedup over stage 1.

A few batch sizes are shown. workflow/tables/summary.py says how each number is computed.
"""

from typing import Any

import pandas as pd

from workflow.plotting import frames, ladder, reasons, wording

TABLES = ("summary", "epochs")

CHOSEN = (64, 256, 1024)
COLUMNS = [
    "dataset",
    "network",
    "stage",
    "change",
    "device",
    "device_kind",
    "batch_size",
    "n",
    "repeats",
    "epoch_seconds",
    "speedup",
    "speedup_low",
    "speedup_high",
    "test_accuracy",
    "epochs_trained",
    "status",
    "validated",
    "extrapolated",
]


def make(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Lines of the summary at the chosen batch sizes (the largest three if none of them ran)."""
    summary = tables["summary"]
    sizes = sorted(set(summary["batch_size"]))
    sizes = [size for size in sizes if size in CHOSEN] or sizes[-3:]
    change = {stage.name: stage.change for stage in ladder.known()}
    frame = summary[summary["batch_size"].isin(sizes)].copy()
    frame["change"] = frame["stage"].map(change).fillna("")
    return frame[COLUMNS]


def markdown(frame: pd.DataFrame) -> str:
    """One table a data set and network, one line a stage, with a note on how to read it."""
    parts = []
    for (dataset, network), lines in frames.groups(frame, ["dataset", "network"]):
        sizes = sorted(set(lines["batch_size"]))
        head = ["stage", "what changes", *(f"epoch, batch {size}" for size in sizes)]
        head += [f"speedup, batch {size}" for size in sizes] + ["test accuracy"]
        table = [head, ["---", "---"] + ["---:"] * (2 * len(sizes) + 1)]
        for (stage, _, kind), group in frames.groups(lines, ["stage", "device", "device_kind"]):
            by_size = {line.batch_size: line for line in frames.rows(group)}
            name = wording.title(stage) + (f" ({wording.EMULATED})" if kind == "emulated" else "")
            cells = [name, group["change"].iloc[0]]
            cells += [epoch_cell(by_size.get(size)) for size in sizes]
            cells += [speedup_cell(by_size.get(size)) for size in sizes]
            table.append([*cells, accuracy_cell(group)])
        parts.append(f"**{wording.what(dataset, network)}**\n\n{wording.markdown_table(table)}")
    return "\n".join([*parts, note(frame)])


def footnotes(tables: dict[str, pd.DataFrame]) -> str:
    """The reasons of stages without a time at the batch sizes that are shown."""
    shown = set(make(tables)["batch_size"])
    epochs = tables["epochs"]
    return reasons.footnotes(epochs[epochs["batch_size"].isin(shown)])


def epoch_cell(line: Any) -> str:
    """A time, marked if scaled, or why there is none."""
    if line is None:
        return "not run"
    if line.status != "ok":
        return wording.status(line.status)
    return wording.duration(line.epoch_seconds) + (" *" if line.extrapolated else "")


def speedup_cell(line: Any) -> str:
    """A ratio with its interval, or nothing."""
    if line is None or pd.isna(line.speedup):
        return ""
    middle = wording.times(line.speedup)
    if pd.isna(line.speedup_low) or line.speedup_low == line.speedup_high:
        return middle
    return f"{middle} ({wording.times(line.speedup_low)} to {wording.times(line.speedup_high)})"


def accuracy_cell(group: pd.DataFrame) -> str:
    """The best of the line's test accuracies, or nothing where no epoch was trained in full."""
    best = group["test_accuracy"].max()
    return "" if pd.isna(best) else f"{100 * best:.2f} %"


def note(frame: pd.DataFrame) -> str:
    """A note on how to read the table and on what it was measured."""
    devices = {
        wording.device(row.device): None
        for row in frames.rows(frame)
        if row.device_kind != "emulated"
    }
    text = (
        f"Measured on {' and '.join(devices)}. " if devices else ""
    ) + "Times are medians; in brackets the 95 % bootstrap interval over the repeats."
    if frame["test_accuracy"].notna().any():
        text += " Test accuracy is that of the best batch size shown, at the end of training."
    if frame["extrapolated"].any():
        text += " \\* timed on part of an epoch and scaled."
    if (frame["device_kind"] == "emulated").any():
        text += (
            " Emulated stages are the GPU's kernels compiled for the CPU: their times say nothing"
            " about a GPU."
        )
    return text + "\n"
