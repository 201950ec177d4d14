"""The functions that CPU stages spend their time in: the first few of each, by Python's profiler.

The profiler adds some tenths of a microsecond to every call: functions that are called very often
look slower beside the others than they are. On one core, as it follows no other processes.
"""

import pandas as pd

TABLES = ("functions",)

KEY = ["dataset", "network", "stage", "device", "batch_size"]
MOST = 8


def make(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Up to MOST functions of each stage with their share of the time, largest first."""
    functions = tables["functions"].copy()
    whole = functions.groupby(KEY, sort=False)["own_seconds"].transform("sum")
    functions["own_percent"] = (100 * functions["own_seconds"] / whole).round(1)
    first = functions.groupby(KEY, sort=False).head(MOST)
    return first[[*KEY, "function", "calls", "own_percent", "own_seconds", "total_seconds"]]
