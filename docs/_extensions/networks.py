"""The table of all shipped networks against PyTorch and JAX, from the published measurements.

`{published-networks}` puts the whole one in a page, a line for each network and batch size; README
has a short one with the ratios alone, which docs/_extensions/rewrite.py writes.
"""

import functools
from pathlib import Path

import pandas as pd

from cnnlib.measuring import schema
from workflow.glue import modules
from workflow.plotting import wording

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results/reference"
TABLES = REFERENCE / "nvidia-h100-networks/tables"
EARLIER = REFERENCE / "nvidia-h100/networks/epochs.csv"
"""Raw epochs of an earlier sweep at one batch size; read while there are no TABLES."""
MAKER = modules.load("tables", "libraries")


@functools.cache
def lines() -> pd.DataFrame:
    """The published table `libraries` of all networks."""
    if (made := TABLES / "libraries.csv").exists():
        return modules.read_tables([made])["libraries"]
    kernels = pd.DataFrame(columns=list(schema.TABLES["kernels"]))
    table: pd.DataFrame = MAKER.make({"epochs": schema.read(EARLIER, "epochs"), "kernels": kernels})
    return table


def whole() -> str:
    """A line for each network and batch size, with times, intervals and the plan."""
    text: str = MAKER.markdown(lines())
    return text


def short() -> str:
    """A line for each batch size, a column for each network: the ratio to the best in float32."""
    text: str = MAKER.short(lines())
    return text


def summary() -> str:
    """The range of all ratios in float32, and their mean: `0.41 to 8.3, geometric mean 1.4`."""
    ratios = lines()["ratio"].dropna()
    mean = MAKER.mean_ratio(ratios)
    low, high, middle = (wording.times(each).removesuffix("×") for each in (*ends(ratios), mean))
    return f"{low} to {high}, geometric mean {middle}"


def ends(values: pd.Series) -> tuple[float, float]:
    """The smallest and the largest."""
    return float(values.min()), float(values.max())
