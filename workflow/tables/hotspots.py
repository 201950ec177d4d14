"""The functions that CPU stages spend their time in: the first few of each, by Python's profiler.

The profiler adds 0.5 to 0.7 microseconds to every call, which makes stage naive take 1.3 times as
long (LeNet-5): functions that are called very often appear slower than they are beside the others.
It runs on one core, since it does not follow other processes. Functions that take less than 0.1 %
of the time are left out.
"""

import pandas as pd

TABLES = ("cpu_profile",)

KEY = ["dataset", "network", "stage", "device", "batch_size"]
MOST = 8


def make(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Up to MOST functions of each stage with their share of the time, largest first."""
    functions = tables["cpu_profile"]
    functions = functions[functions["status"] == "ok"].copy()
    whole = functions.groupby(KEY, sort=False)["own_seconds"].transform("sum")
    functions["own_percent"] = (100 * functions["own_seconds"] / whole).round(1)
    first = functions.groupby(KEY, sort=False).head(MOST)
    return first[[*KEY, "function", "calls", "own_percent", "own_seconds", "total_seconds"]]
