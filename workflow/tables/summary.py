"""One line per data set, network, stage, device and batch size: time, spread, speedup, standing.

Times are medians over every epoch (or scaled block) of every repeat, with quartiles. Intervals are
95 % bootstrap intervals over the repeats, which are the independent observations; with a single
repeat there is none (nan). Runs that others on their GPU disturbed do not count; a line of nothing
else has the status `disturbed`. The speedup is over the first stage of the ladder that was measured
at the same batch size.

A stage that takes one image at a time needs as long for an image at every batch size. So all its
runs are pooled: each of its lines has the median and the interval of all of them, over the runs,
times the images of its epoch.
"""

from typing import Any

import numpy as np
import pandas as pd

from cnnlib.measuring.intervals import interval
from workflow.plotting import frames, ladder
from workflow.plotting.timings import repeats, timed

TABLES = ("epochs", "steps")

COLUMNS = {
    "dataset": "text",
    "network": "text",
    "stage": "text",
    "device": "text",
    "device_kind": "text",
    "batch_size": "count",
    "repeats": "count",
    "n": "count",
    "epoch_seconds": "number",
    "epoch_seconds_min": "number",
    "epoch_seconds_q25": "number",
    "epoch_seconds_q75": "number",
    "epoch_seconds_low": "number",
    "epoch_seconds_high": "number",
    "epochs_trained": "count",
    "test_accuracy": "number",
    "test_accuracy_min": "number",
    "status": "text",
    "validated": "truth",
    "extrapolated": "truth",
    "steps_timed": "count",
    "step_seconds": "number",
    "step_seconds_q05": "number",
    "step_seconds_q95": "number",
    "baseline": "text",
    "baseline_extrapolated": "truth",
    "speedup": "number",
    "speedup_low": "number",
    "speedup_high": "number",
}
"""The columns in the order in which they are written, with KINDS of workflow/glue/modules.py."""
KEY = ["dataset", "network", "stage", "device", "device_kind", "batch_size"]
Key = tuple[str, str, str, str, str, int]
Cell = tuple[str, str, int]


def make(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The summary of tables["epochs"] and ["steps"], ordered by KEY, stages as on the ladder."""
    rows = undisturbed(tables["epochs"])
    epochs: dict[Key, pd.DataFrame] = dict(frames.groups(rows, KEY))
    times = repeats(rows, KEY)
    timed_steps = tables["steps"][tables["steps"]["status"] == "ok"]
    steps = {key: group["step_seconds"] for key, group in timed_steps.groupby(KEY, sort=False)}
    baselines = find_baselines(epochs)
    lines = []
    for key, group in epochs.items():
        line = dict(zip(KEY, key, strict=True)) | summarise(group, times[key])
        line |= latency(steps.get(key)) | speedup(key, baselines.get(cell(key)), epochs, times)
        lines.append(line)
    frame = pd.DataFrame(lines)[list(COLUMNS)]
    rank = {name: i for i, name in enumerate(ladder.ordered(frame["stage"]))}
    return frame.sort_values(KEY, key=lambda c: c.map(rank) if c.name == "stage" else c)


def undisturbed(epochs: pd.DataFrame) -> pd.DataFrame:
    """The rows without those of disturbed runs, which stay only where a line has no others."""
    disturbed = epochs["status"] == "disturbed"
    if not disturbed.any():
        return epochs
    every = disturbed.groupby([epochs[name] for name in KEY]).transform("all")
    return epochs[~disturbed | every]


def cell(key: Key) -> Cell:
    """Data set, network and batch size, which two lines must share to be compared."""
    dataset, network, *_, batch_size = key
    return dataset, network, batch_size


def find_baselines(epochs: dict[Key, pd.DataFrame]) -> dict[Cell, Key]:
    """For each cell the key of the line that speedups are over: the lowest stage that ran.

    A network's baseline stage is the same at every batch size; where it did not run there is none.
    """
    ran = [key for key, group in epochs.items() if timed(group)]
    order = ladder.ordered(key[2] for key in ran)
    lowest: dict[tuple[str, str], str] = {}
    for dataset, network, stage, *_ in sorted(ran, key=lambda key: order.index(key[2])):
        lowest.setdefault((dataset, network), stage)
    return {cell(key): key for key in ran if lowest[key[:2]] == key[2]}


def summarise(group: pd.DataFrame, timings: list[np.ndarray]) -> dict[str, Any]:
    """n, median, spread, interval and standing of one line's epochs, timed in these repeats."""
    times = np.concatenate(timings) if timings else np.array([np.nan])
    low, high = interval(timings, None)
    lower, middle, upper = np.quantile(times, [0.25, 0.5, 0.75])
    last = group.groupby("repeat").tail(1)
    worst = [status for status in group["status"] if status != "ok"]
    return {
        "repeats": group["repeat"].nunique(),
        "n": sum(len(times) for times in timings),
        "epoch_seconds": middle,
        "epoch_seconds_min": times.min(),
        "epoch_seconds_q25": lower,
        "epoch_seconds_q75": upper,
        "epoch_seconds_low": low,
        "epoch_seconds_high": high,
        "epochs_trained": 0 if group["extrapolated"].any() else group["epoch"].max(),
        "test_accuracy": last["test_accuracy"].median(),
        "test_accuracy_min": last["test_accuracy"].min(),
        "status": worst[0] if worst else "ok",
        "validated": bool(group["validated"].all()),
        "extrapolated": bool(group["extrapolated"].any()),
    }


def latency(seconds: pd.Series | None) -> dict[str, Any]:
    """n, median and 5 % and 95 % quantiles of single steps."""
    times = np.array([np.nan]) if seconds is None else seconds.to_numpy()
    low, middle, high = np.quantile(times, [0.05, 0.5, 0.95])
    return {
        "steps_timed": 0 if seconds is None else len(seconds),
        "step_seconds": middle,
        "step_seconds_q05": low,
        "step_seconds_q95": high,
    }


def speedup(
    key: Key,
    baseline: Key | None,
    epochs: dict[Key, pd.DataFrame],
    times: dict[Key, list[np.ndarray]],
) -> dict[str, Any]:
    """The speedup over the baseline with its interval; nan where one of them did not run."""
    own, base = times[key], times[baseline] if baseline else []
    line = {
        "baseline": baseline[2] if baseline else "",
        "baseline_extrapolated": bool(baseline and epochs[baseline]["extrapolated"].any()),
        "speedup": np.nan,
        "speedup_low": np.nan,
        "speedup_high": np.nan,
    }
    if not own or not base:
        return line
    line["speedup"] = np.median(np.concatenate(base)) / np.median(np.concatenate(own))
    line["speedup_low"], line["speedup_high"] = (
        (1.0, 1.0) if key == baseline else interval(own, base)
    )
    return line
