"""The epoch times of each repeat, and of how many images an epoch is made."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from workflow.plotting import frames, ladder


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
