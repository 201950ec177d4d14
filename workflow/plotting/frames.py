"""Rows and groups of tables, whose values the schema checks and pandas cannot type."""

from collections.abc import Iterator
from typing import Any

import pandas as pd


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows with their columns as attributes."""
    return iter(frame.itertuples())


def groups(
    frame: pd.DataFrame, by: str | list[str], sort: bool = False
) -> Iterator[tuple[Any, pd.DataFrame]]:
    """(value, rows) for each value of a column, (values, rows) for several columns.

    In the order of their first rows unless they are to be sorted.
    """
    yield from frame.groupby(by, sort=sort)
