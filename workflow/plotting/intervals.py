"""Intervals of medians and of their ratios, by the bootstrap over repeats."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from workflow.plotting import frames, ladder

RESAMPLES = 2000
SEED = 20171


def timed(group: pd.DataFrame, by: str | list[str] = "repeat") -> list[np.ndarray]:
    """The epoch times of each repeat of a line of the table `epochs`, in seconds."""
    good = group[(group["status"] == "ok") & group["epoch_seconds"].notna()]
    return [times.to_numpy() for _, times in good.groupby(by)["epoch_seconds"]]


def epoch_images(epochs: pd.DataFrame) -> Callable[[str, int], float]:
    """Images of an epoch by data set and batch size: an epoch is made of whole batches.

    Runs timed in full show how many there are; nan for a data set of which there is none.
    """
    full = epochs[~epochs["extrapolated"].astype(bool) & (epochs["images"] > 0)]
    exactly = full.groupby(["dataset", "batch_size"])["images"].max().to_dict()
    about = full.groupby("dataset")["images"].max().to_dict()

    def of(dataset: str, size: int) -> float:
        whole = about.get(dataset, math.nan) // size * size
        return float(exactly.get((dataset, size), whole))

    return of


def repeats(epochs: pd.DataFrame, keys: list[str]) -> dict[Any, list[np.ndarray]]:
    """The epoch times of each repeat of every line, by its values of `keys`.

    A stage that takes one image at a time needs as long for an image at every batch size: all its
    runs are pooled by their time per image, and count as repeats of each of its lines.
    """
    found = {key: timed(group) for key, group in frames.groups(epochs, keys)}
    own = epochs[epochs["stage"].isin(ladder.image_by_image())]
    images = epoch_images(epochs)
    for _, group in own.groupby([name for name in keys if name != "batch_size"], sort=False):
        counts = [images(row.dataset, row.batch_size) for row in frames.rows(group)]
        if np.isnan(counts).any():
            continue
        times = timed(
            group.assign(epoch_seconds=group["epoch_seconds"] / counts), ["batch_size", "repeat"]
        )
        for key, rows in frames.groups(group, keys):
            if found[key]:
                first = rows.iloc[0]
                count = images(first["dataset"], first["batch_size"])
                found[key] = [each * count for each in times]
    return found


def interval(repeats: list[np.ndarray], base: list[np.ndarray] | None) -> tuple[float, float]:
    """95 % interval of the median of `repeats`, or of the median of `base` over it.

    Whole repeats are drawn with replacement; epochs within a repeat are not independent. The
    percentile method, with a fixed seed, so that the same rows give the same table.
    """
    samples = [repeats] if base is None else [base, repeats]
    if any(len(sample) < 2 for sample in samples):
        return np.nan, np.nan
    padded = [pad(sample) for sample in samples]
    # np.median gives the same where nothing is missing, and is several times faster
    median: Callable[..., np.ndarray]
    median = np.nanmedian if any(np.isnan(rows).any() for rows in padded) else np.median

    def statistic(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        medians = [
            median(rows[which].reshape(*which.shape[:-1], -1), axis=-1)
            for rows, which in zip(padded, drawn, strict=True)
        ]
        found: np.ndarray = medians[0] if base is None else medians[0] / medians[1]
        return found

    found = bootstrap(
        [np.arange(len(sample)) for sample in samples],
        statistic,
        vectorized=True,
        axis=-1,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def pad(sample: list[np.ndarray]) -> np.ndarray:
    """Rows of unequal length as one array, filled up with nan."""
    width = max(len(row) for row in sample)
    return np.array([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in sample])
