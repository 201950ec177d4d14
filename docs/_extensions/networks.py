"""The table of all shipped networks against PyTorch and JAX, from the published measurements.

`{published-networks}` puts the whole one in a page, a line for each network and batch size; README
has a short one with the ratios alone, which docs/_extensions/rewrite.py writes.
"""

import functools
from pathlib import Path
from typing import Any

import pandas as pd

from cnnlib.measuring import schema
from workflow.glue import modules
from workflow.plotting import frames, wording

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results/reference"
TABLES = REFERENCE / "nvidia-h100-networks/tables"
EARLIER = REFERENCE / "nvidia-h100/earlier/networks.csv"
"""Raw epochs of all networks at batch 64 in a sweep of 27 November, before plan graph of tuned."""
MAKER = modules.load("tables", "libraries")


@functools.cache
def published() -> pd.DataFrame:
    """The published table `libraries` of all networks; it may hold rows of the earlier sweep."""
    made = TABLES / "libraries.csv"
    return modules.read_tables([made])["libraries"] if made.exists() else earlier().iloc[:0]


@functools.cache
def earlier() -> pd.DataFrame:
    """The same table of the earlier sweep."""
    kernels = pd.DataFrame(columns=list(schema.TABLES["kernels"]))
    table: pd.DataFrame = MAKER.make({"epochs": schema.read(EARLIER, "epochs"), "kernels": kernels})
    return table


def is_earlier(line: Any) -> bool:
    """Whether a published line has the earlier sweep's time of the same stage."""
    own = earlier()
    same = (own["network"] == line.network) & (own["stage"] == line.stage)
    known = own.loc[same & (own["batch_size"] == line.batch_size), "epoch_seconds"]
    return bool((abs(known / line.epoch_seconds - 1) < 1e-6).any())


def lines() -> pd.DataFrame:
    """The published lines that were measured last."""
    table = published()
    return table.loc[[line.Index for line in frames.rows(table) if not is_earlier(line)]]


def others() -> pd.DataFrame:
    """The lines of the earlier sweep on networks that were not measured again."""
    return earlier()[~earlier()["network"].isin(lines()["network"])]


def whole() -> str:
    """A line for each network and batch size, with times, intervals and the plan."""
    text: str = MAKER.markdown(lines()) if len(lines()) else ""
    if len(others()):
        text += f"\nMeasured earlier, before plan `graph` of `tuned`:\n\n{MAKER.markdown(others())}"
    return text


def short() -> str:
    """A line for each batch size, a column for each network: the ratio to the best in float32.

    What was measured earlier is in italics.
    """
    text: str = MAKER.short(pd.concat([lines(), others().assign(earlier=True)], ignore_index=True))
    return text


def summary() -> str:
    """The range of what was measured last, and its mean: `2.3 to 9.8, geometric mean 5.3`."""
    ratios = (lines() if len(lines()) else earlier())["ratio"].dropna()
    each = (ratios.min(), ratios.max(), MAKER.mean_ratio(ratios))
    low, high, middle = (wording.times(float(value)).removesuffix("×") for value in each)
    return f"{low} to {high}, geometric mean {middle}"
