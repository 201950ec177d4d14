"""The race: what each stage recognises when its trainings end, and after how much time.

One line a stage and device. Accuracies are those of the last epoch, their mean over n seeds with
its standard deviation and its 95 % interval (Student's t); times are those of whole trainings.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from workflow.plotting import frames, reasons, wording

TABLES = ("race",)

COLUMNS = {
    "dataset": "text",
    "network": "text",
    "stage": "text",
    "device": "text",
    "device_kind": "text",
    "batch_size": "count",
    "epochs": "count",
    "n": "count",
    "accuracy_mean": "number",
    "accuracy_sd": "number",
    "accuracy_low": "number",
    "accuracy_high": "number",
    "accuracy_min": "number",
    "target_accuracy": "number",
    "train_seconds_mean": "number",
    "train_seconds_sd": "number",
    "train_seconds_min": "number",
    "train_seconds_max": "number",
    "status": "text",
    "validated": "truth",
}
KEY = ["dataset", "network", "stage", "device", "device_kind", "batch_size"]


def make(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A line for each stage and device, in the order in which they ran."""
    lines = [
        dict(zip(KEY, key, strict=True)) | summarise(group)
        for key, group in tables["race"].groupby(KEY, sort=False)
    ]
    return pd.DataFrame(lines, columns=list(COLUMNS))


def summarise(group: pd.DataFrame) -> dict[str, Any]:
    """n, mean, deviation and interval of the accuracies at the end; the times."""
    last = group[group["epoch"] == group["epoch"].max()]
    good = last[last["status"] == "ok"]
    found, seconds = good["test_accuracy"], good["train_seconds"]
    low, high = interval(found.to_numpy())
    worst = [status for status in group["status"] if status != "ok"]
    return {
        "epochs": group["epoch"].max(),
        "n": len(good),
        "accuracy_mean": found.mean(),
        "accuracy_sd": found.std(),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_min": found.min(),
        "target_accuracy": group["target_accuracy"].iloc[0],
        "train_seconds_mean": seconds.mean(),
        "train_seconds_sd": seconds.std(),
        "train_seconds_min": seconds.min(),
        "train_seconds_max": seconds.max(),
        "status": worst[0] if worst else "ok",
        "validated": bool(group["validated"].all()),
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean; nan for fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def markdown(frame: pd.DataFrame) -> str:
    """A table for people, with a note on how it was run."""
    head = ["stage", "device", "n", "test accuracy", "of one seed", "training takes", "goal"]
    table = [head, ["---", "---", *["---:"] * 5]]
    for line in frames.rows(frame):
        kind = f" ({wording.EMULATED})" if line.device_kind == "emulated" else ""
        name = [wording.title(line.stage) + kind, wording.device(line.device), f"{line.n}"]
        goal = f"{100 * line.target_accuracy:.4g} %"
        if not line.n:
            why = wording.STATUS.get(line.status, line.status)
            table.append([*name, why, "", "", goal])
            continue
        mean = f"{100 * line.accuracy_mean:.3f} %"
        if line.n > 1:
            mean += f" ({100 * line.accuracy_low:.3f} to {100 * line.accuracy_high:.3f})"
            spread = f"± {100 * line.accuracy_sd:.3f}"
            times = (
                f"{wording.duration(line.train_seconds_mean)} "
                f"({wording.duration(line.train_seconds_min)} to "
                f"{wording.duration(line.train_seconds_max)})"
            )
        else:
            spread, times = "", wording.duration(line.train_seconds_mean)
        # a mean of shares of thousands of images: nothing is lost by rounding sums of floats away
        there = round(line.accuracy_mean, 9) >= line.target_accuracy
        reached = "reached" if there else "not reached"
        table.append([*name, mean, spread, times, f"{goal}: {reached}"])
    return wording.markdown_table(table) + note(frame)


def footnotes(tables: dict[str, pd.DataFrame]) -> str:
    """A paragraph for each stage that has not run, with the reason."""
    return reasons.footnotes(tables["race"])


def note(frame: pd.DataFrame) -> str:
    """A note on what was trained and what the numbers mean."""
    first = frame.iloc[0]
    return (
        f"\n{wording.what(first['dataset'], first['network'])}, batch {first['batch_size']}, "
        f"{first['epochs']} epochs. n trainings from n seeds; accuracy: their mean when they end, "
        "with its 95 % interval (Student's t), and the standard deviation of one. Times of "
        "training: mean, least and most; evaluating is off the clock.\n"
    )
