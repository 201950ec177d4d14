"""The ladder: each stage, its one change, the time of its epoch and what it gains.

One line per data set, network, stage, device and batch size: how many times as fast it is as the
stage before and as the best library, which share of the machine's arithmetic it reaches, and what
the network has learned by then. The page shows a few batch sizes. workflow/tables/summary.py says
how times and intervals are computed.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from cnnlib.measuring.intervals import interval
from cnnlib.stages import LADDER
from workflow.plotting import accuracies, frames, ladder, limits, panels, reasons, wording
from workflow.plotting.timings import epoch_images, repeats

TABLES = ("summary", "epochs", "kernels", "probes")

CHOSEN = (64, 256, 1024)
COLUMNS = {
    "dataset": "text",
    "network": "text",
    "stage": "text",
    "change": "text",
    "device": "text",
    "device_kind": "text",
    "batch_size": "count",
    "n": "count",
    "repeats": "count",
    "epoch_seconds": "number",
    "epoch_seconds_low": "number",
    "epoch_seconds_high": "number",
    "test_accuracy": "number",
    "epochs_trained": "count",
    "batch_accuracy": "number",
    "learns": "truth",
    "before": "text",
    "gain": "number",
    "gain_low": "number",
    "gain_high": "number",
    "library": "text",
    "library_ratio": "number",
    "library_ratio_low": "number",
    "library_ratio_high": "number",
    "limit": "text",
    "share": "number",
    "baseline": "text",
    "speedup": "number",
    "speedup_low": "number",
    "speedup_high": "number",
    "status": "text",
    "validated": "truth",
    "extrapolated": "truth",
}
"""The columns in the order in which they are written, with KINDS of workflow/glue/modules.py."""
PLACE = ["dataset", "network", "batch_size"]
Times = dict[str, list[np.ndarray]]
"""The epoch times of each repeat of a stage."""


def make(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The lines of the summary with what each gains; nan where the other one was not measured."""
    summary, epochs = tables["summary"], tables["epochs"]
    accuracy, learns = accuracies.by_batch(summary), accuracies.learned(summary)
    change = {stage.name: stage.change for stage in ladder.known()}
    flops, peaks = limits.image_flops(tables["kernels"]), limits.peaks(tables["probes"])
    images = epoch_images(epochs)
    measured = epochs[epochs["device_kind"] != "emulated"]
    times: dict[accuracies.Cell, Times] = {}
    for (*place, stage), timings in repeats(measured, [*PLACE, "stage"]).items():
        times.setdefault((place[0], place[1], place[2]), {})[stage] = timings
    found = []
    for _, line in summary.iterrows():
        cell = (line["dataset"], line["network"], line["batch_size"])
        probe = limits.probe_of(line["device_kind"], line["device"])
        whole = flops.get(cell[:2], math.nan) * images(cell[0], cell[2])
        others = summary[(summary[PLACE] == list(cell)).all(axis=1)]
        before = stage_before(others, line)
        library = best_library(others) if line["device_kind"] != "emulated" else ""
        found.append(
            line.to_dict()
            | {
                "change": change.get(line["stage"], ""),
                "batch_accuracy": accuracy.get(cell, math.nan),
                "learns": learns[cell],
                "before": before,
                **ratio("gain", others, times.get(cell, {}), line["stage"], before),
                "library": library,
                **ratio("library_ratio", others, times.get(cell, {}), line["stage"], library),
                "limit": probe if probe in peaks else "",
                "share": limits.share(whole, line["epoch_seconds"], peaks.get(probe, math.nan)),
            }
        )
    return pd.DataFrame(found, columns=list(COLUMNS))


def stage_before(others: pd.DataFrame, line: pd.Series) -> str:
    """The stage of the ladder before this line's that was measured beside it; "" if none was."""
    names = [stage.name for stage in LADDER]
    if line["stage"] not in names or line["device_kind"] == "emulated":
        return ""
    ran = others[(others["device_kind"] != "emulated") & others["epoch_seconds"].notna()]
    earlier = names[: names.index(line["stage"])]
    return next((name for name in reversed(earlier) if name in set(ran["stage"])), "")


def best_library(others: pd.DataFrame) -> str:
    """The quickest peer in float32 beside a line; "" if none was measured."""
    exact = others[others["stage"].isin(ladder.exact_peers()) & others["epoch_seconds"].notna()]
    return str(exact.nsmallest(1, "epoch_seconds")["stage"].iloc[0]) if len(exact) else ""


def ratio(name: str, others: pd.DataFrame, times: Times, own: str, other: str) -> dict[str, float]:
    """How many times as long `other` takes as `own`, with an interval; nan where one is missing."""
    measured = others[others["device_kind"] != "emulated"].drop_duplicates("stage")
    seconds = measured.set_index("stage")["epoch_seconds"]
    middle, low, high = math.nan, math.nan, math.nan
    if own in seconds and other in seconds:
        middle = seconds[other] / seconds[own]
        low = high = 1.0
    if own != other and middle == middle:
        low, high = interval(times.get(own, []), times.get(other, []))
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


# for people -------------------------------------------------------------------------------------


def shown(frame: pd.DataFrame) -> list[int]:
    """The batch sizes that people are shown: the chosen ones, or else the largest three."""
    sizes = sorted(set(frame["batch_size"]))
    return [size for size in sizes if size in CHOSEN] or sizes[-3:]


def markdown(frame: pd.DataFrame) -> str:
    """A table a data set, network and batch size, one line a stage, with a note on how to read."""
    parts = []
    frame = frame[frame["batch_size"].isin(shown(frame))]
    for (dataset, network), group in frames.groups(frame, ["dataset", "network"]):
        for size, lines in frames.groups(group, "batch_size", sort=True):
            heading = f"**{wording.what(dataset, network)}, batch {size}**"
            if not lines["learns"].all():
                accuracy = 100 * lines["batch_accuracy"].iloc[0]
                trained = accuracies.epochs(lines)
                heading += f" (learns too little in {trained}: {accuracy:.1f} %)"
            parts.append(f"{heading}\n\n{wording.markdown_table(of_batch(lines))}")
    return "\n".join([*parts, note(frame)])


def of_batch(lines: pd.DataFrame) -> list[list[str]]:
    """The rows of one table; columns of what was not measured are left out."""
    base = next((name for name in lines["baseline"] if isinstance(name, str) and name), "")
    columns = {
        "epoch": [epoch_cell(line) for line in frames.rows(lines)],
        "test accuracy": [accuracy_cell(line.test_accuracy) for line in frames.rows(lines)],
        "gain over the stage before": [
            ratio_cell(line.gain, line.gain_low, line.gain_high) for line in frames.rows(lines)
        ],
        "against the best library": [library_cell(line) for line in frames.rows(lines)],
        "share of peak": [share_cell(line.share) for line in frames.rows(lines)],
        f"over {base}": [
            wording.times(value) if value == value and stage != base else ""
            for stage, value in zip(lines["stage"], lines["speedup"], strict=True)
        ],
    }
    told = {head: cells for head, cells in columns.items() if any(cells)}
    table = [["stage", "what changes", *told], ["---", "---"] + ["---:"] * len(told)]
    for number, line in enumerate(frames.rows(lines)):
        built = f" ({wording.EMULATED})" if line.device_kind == "emulated" else ""
        cells = [column[number] for column in told.values()]
        table.append([wording.title(line.stage) + built, line.change, *cells])
    return table


def footnotes(tables: Mapping[str, pd.DataFrame]) -> str:
    """The reasons of stages without a time at the batch sizes that are shown."""
    epochs = tables["epochs"]
    return reasons.footnotes(epochs[epochs["batch_size"].isin(shown(tables["summary"]))])


def epoch_cell(line: Any) -> str:
    """A time, marked if scaled, or why there is none."""
    if line.status != "ok":
        return wording.status(line.status)
    return wording.duration(line.epoch_seconds) + (" *" if line.extrapolated else "")


def ratio_cell(middle: float, low: float, high: float) -> str:
    """A ratio with its interval, and whether it is a gain at all; or nothing."""
    if middle != middle:
        return ""
    if low != low or low == high:
        return wording.times(middle)
    none = "; no gain" if low <= 1 <= high else "; slower" if high < 1 else ""
    return f"{wording.times(middle)} ({wording.times(low)} to {wording.times(high)}){none}"


def library_cell(line: Any) -> str:
    """How many times as fast a line is as the best library, which is itself said to be it.

    Far below it the ratio says nothing.
    """
    if line.stage == line.library:
        return "the best library"
    return wording.times(line.library_ratio) if line.library_ratio >= 0.01 else ""


def share_cell(value: float) -> str:
    """A share in percent, to two digits, or nothing."""
    return "" if pd.isna(value) else f"{wording.digits(100 * value, 2)} %"


def accuracy_cell(value: float) -> str:
    """A test accuracy, or nothing where no epoch was trained in full."""
    return "" if pd.isna(value) else f"{100 * value:.1f} %"


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
        text += f" Test accuracy: after {accuracies.epochs(frame)}, median of the repeats."
    if (frame["library"] != "").any():
        text += " Against the best library: the fastest of PyTorch and JAX in float32."
    if frame["share"].notna().any():
        text += (
            " Share of peak: the arithmetic that the network needs, in float32, of what the probes"
            " measured on the same cores or GPU."
        )
    if (frame["share"] > 1).any():
        text += (
            " A share above 100 %: other programs slowed the probes down (remove tables/probes.csv"
            " and run again), or a stage multiplies less than the plain sums do."
        )
    text += baseline(frame)
    if frame["extrapolated"].any():
        text += " \\* timed on part of an epoch and scaled."
    if (frame["device_kind"] == "emulated").any():
        text += (
            " Emulated stages are the GPU's kernels compiled for the CPU: their times say nothing"
            " about a GPU."
        )
    return text + "\n"


def baseline(frame: pd.DataFrame) -> str:
    """A sentence on the stage that takes one image at a time, with its interval, if it ran."""
    own = frame[frame["stage"].isin(ladder.image_by_image()) & (frame["status"] == "ok")]
    if not len(own) or own["epoch_seconds"].isna().any():
        return ""
    first = own.iloc[0]
    text = f" {first['stage']} takes as long for an image at every batch size: all are pooled, to "
    return f"{text}{panels.with_interval(first)} for an epoch at batch {first['batch_size']}."
