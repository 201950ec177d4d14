"""The rows of every CSV: column names, units, types and permitted values. Nothing else knows them.

Every row begins with its identity; units stand in the names. Rows are raw observations in long
form: means and intervals are made from them in workflow/tables, never while measuring.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cnnlib.errors import DataError
from cnnlib.files import write_whole

IDENTITY: dict[str, type] = {
    "dataset": str,
    "network": str,
    "stage": str,
    "device": str,
    "batch_size": int,
    "seed": int,
    "repeat": int,
}

# How far a row can be trusted; closes every row.
STANDING: dict[str, type] = {
    "device_kind": str,
    "status": str,
    "validated": bool,
    "extrapolated": bool,
}

CHOICES: dict[str, tuple[str, ...]] = {
    "device_kind": ("cpu", "host", "cuda"),
    "status": ("ok", "does_not_fit", "diverged", "unavailable"),
}

TABLES: dict[str, dict[str, type]] = {
    # One row an epoch; where `extrapolated`, one row a timed block of `images` images, its time
    # scaled to a whole epoch. event_seconds is the same epoch by CUDA events (nan on a CPU).
    "epochs": {
        **IDENTITY,
        "epoch": int,
        "images": int,
        "epoch_seconds": float,
        "event_seconds": float,
        "loss": float,
        "test_accuracy": float,
        **STANDING,
    },
    # One row a training step timed on its own, from choosing the batch to the visible update.
    "steps": {**IDENTITY, "step": int, "step_seconds": float, **STANDING},
}

Row = Mapping[str, Any]


def write(path: Path | str, table: str, rows: Iterable[Row]) -> None:
    """Write `rows` (one mapping each, every column of `table` and no other) as a whole file.

    Raises KeyError or ValueError for a row that does not fit: that is a bug, not bad input.
    """
    columns = TABLES[table]
    lines = []
    for row in rows:
        if set(row) != set(columns):
            raise KeyError(f"{table}: columns {sorted(set(row) ^ set(columns))} missing or unknown")
        lines.append([_text(table, column, row[column]) for column in columns])
    with write_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)


def _text(table: str, column: str, value: Any) -> str:
    kind = TABLES[table][column]
    if column in CHOICES and value not in CHOICES[column]:
        raise ValueError(f"{table}.{column} is {value!r}; known: {', '.join(CHOICES[column])}")
    if kind is bool:
        return "true" if value else "false"
    if kind is float:
        return "nan" if math.isnan(value) else repr(float(value))
    return str(kind(value))


def read(path: Path | str, table: str) -> pd.DataFrame:
    """Rows of one file in the table's column order and types.

    Raises DataError naming the file and the column when it is missing, empty, cut off or has
    another header: a damaged file is refused, never drawn.
    """
    columns = TABLES[table]
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a {table} table: {error}") from None
    if list(frame.columns) != list(columns):
        wrong = sorted(set(frame.columns) ^ set(columns)) or list(frame.columns)
        raise DataError(f"{path} is not a {table} table: columns missing, unknown or moved: {wrong}")
    for column, kind in columns.items():
        frame[column] = _typed(path, column, kind, frame[column])
    return frame


def _typed(path: Path | str, column: str, kind: type, texts: "pd.Series[str]") -> Any:
    if kind is str:
        unknown = set(texts) - set(CHOICES.get(column, texts))
        if unknown:
            raise DataError(f"{path}: unknown {column} {sorted(unknown)[0]!r}")
        return texts
    try:
        if kind is bool:
            known = {"true": True, "false": False}
            return pd.Series([known[text] for text in texts], index=texts.index, dtype=bool)
        return texts.astype("float64" if kind is float else "int64")
    except (KeyError, ValueError):
        raise DataError(f"{path}: column {column} holds something that is no {kind.__name__}") from None


def combine(paths: Sequence[Path | str], table: str) -> pd.DataFrame:
    """All rows of many files of one kind, in the order of `paths`."""
    if not paths:
        raise DataError(f"there are no {table} files to combine")
    return pd.concat([read(path, table) for path in paths], ignore_index=True)
