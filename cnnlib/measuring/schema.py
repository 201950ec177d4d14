"""The rows of every CSV file: names, units, types and permitted values of the columns.

Nothing else defines them. Every row begins with its identity, and units are part of the names. Rows
are raw observations in long form: means and intervals are computed in workflow/tables, never while
measuring.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlib.errors import DataError
from cnnlib.files import write_whole

# Importing pandas takes longer than many runs, and only `read` needs it.
if TYPE_CHECKING:
    import pandas as pd

IDENTITY: dict[str, type] = {
    "dataset": str,
    "network": str,
    "stage": str,
    "device": str,
    "batch_size": int,
    "seed": int,
    "repeat": int,
}

# The last columns of every row: how far it can be trusted.
STANDING: dict[str, type] = {
    "device_kind": str,
    "status": str,
    "validated": bool,
    "extrapolated": bool,
}

CHOICES: dict[str, tuple[str, ...]] = {
    "device_kind": ("cpu", "emulated", "cuda"),
    # disturbed: another process was on the GPU while the row was timed
    # unjudged: no check can decide whether the stage is right about this network
    "status": (
        "ok",
        "does_not_fit",
        "diverged",
        "unavailable",
        "failed",
        "disturbed",
        "unjudged",
    ),
}

# Why there is no measurement; empty where there is one.
REASON: dict[str, type] = {"reason": str}

# Columns that came later, with what stands in them where nothing is known: for rows that are
# written without them, and for tables of earlier versions, such as the published ones.
LATER: dict[str, str] = {"reason": "", "validation_accuracy": "nan", "class_name": ""}

TABLES: dict[str, dict[str, type]] = {
    # One row per epoch or, where `extrapolated`, per timed sample of `images` images, whose time is
    # scaled to a whole epoch. event_seconds is the epoch's time by CUDA events (nan on a CPU).
    "epochs": {
        **IDENTITY,
        "epoch": int,
        "images": int,
        "epoch_seconds": float,
        "event_seconds": float,
        "loss": float,
        "test_accuracy": float,
        **REASON,
        **STANDING,
    },
    # One row per kernel of a training step, timed on its own, with its `launches` per step (0 for
    # a kernel that is timed for comparison only). It does a `part` of the work of `layers`; flops
    # and bytes are the least that this part needs for a batch, on each kernel that shares in it.
    "kernels": {
        **IDENTITY,
        "layer": str,
        "kernel": str,
        "layers": str,
        "part": str,
        "grid": int,
        "launches": int,
        "kernel_seconds": float,
        "flops": float,
        "bytes": float,
        **STANDING,
    },
    # One row per epoch with `resident_images` on the GPU per load, and where its time went: the
    # host gathering images, copies to the device, kernels. Host and device overlap.
    "transfers": {
        **IDENTITY,
        "resident_images": int,
        "epoch": int,
        "images": int,
        "epoch_seconds": float,
        "gather_seconds": float,
        "upload_seconds": float,
        "kernel_seconds": float,
        **REASON,
        **STANDING,
    },
    # One row per reading of NVML and the system, `time_seconds` since the run began; nan where a
    # value is unknown (`unavailable`: no NVML). energy_joules is the device's counter.
    "samples": {
        **IDENTITY,
        "sample": int,
        "time_seconds": float,
        "phase": str,
        "device_memory_mib": float,
        "device_memory_total_mib": float,
        "process_memory_mib": float,
        "utilization_percent": float,
        "power_watts": float,
        "energy_joules": float,
        "sm_clock_mhz": float,
        "temperature_celsius": float,
        "host_memory_mib": float,
        **STANDING,
    },
    # One row per run: the device's energy while it trained on `images` images without a pause, and
    # its power just before it was used.
    "energy": {
        **IDENTITY,
        "images": int,
        "window_seconds": float,
        "energy_joules": float,
        "idle_watts": float,
        **STANDING,
    },
    # One row per epoch of one training of the race, `train_seconds` since it began; the mean of the
    # trainings' last test_accuracy is to reach target_accuracy.
    "race": {
        **IDENTITY,
        "epoch": int,
        "images": int,
        "train_seconds": float,
        "loss": float,
        "test_accuracy": float,
        "target_accuracy": float,
        **REASON,
        **STANDING,
    },
    # One row per point of a training, after `images` images and `train_seconds` of training.
    # validation_accuracy is that of the images left out for it, nan where there are none.
    "learning": {
        **IDENTITY,
        "images": int,
        "train_seconds": float,
        "test_images": int,
        "test_accuracy": float,
        "validation_accuracy": float,
        **STANDING,
    },
    # One row per point and test image (`image_index`: its position in the test set, from 0): the
    # probabilities of all classes in their order, with spaces between.
    "predictions": {
        **IDENTITY,
        "images": int,
        "train_seconds": float,
        "image_index": int,
        "label": int,
        "probabilities": str,
        **STANDING,
    },
    # One row per function that a CPU stage spent time in, according to a profiler.
    "cpu_profile": {
        **IDENTITY,
        "function": str,
        "calls": int,
        "own_seconds": float,
        "total_seconds": float,
        **STANDING,
    },
    # One row per number of a trained network: a weight of a filter, a pixel of an image or a map.
    "features": {
        **IDENTITY,
        "kind": str,
        "layer": str,
        "map": int,
        "source": int,
        "row": int,
        "column": int,
        "value": float,
        **STANDING,
    },
    # One row per test image whose predictions are recorded; pixels are hexadecimal (C, H, W).
    # class_name is what its label means, empty where classes have no names.
    "pictures": {
        "dataset": str,
        "image_index": int,
        "label": int,
        "class_name": str,
        "channels": int,
        "height": int,
        "width": int,
        "pixels": str,
    },
    # One row per measurement of the machine's own limits, `rate` in `unit`.
    "probes": {
        "device": str,
        "device_kind": str,
        "probe": str,
        "size_bytes": int,
        "repeat": int,
        "seconds": float,
        "rate": float,
        "unit": str,
        "status": str,
    },
    # One row per section of a step in which one block of a persistent kernel was, by the clocks
    # that the blocks read themselves; seconds since the first of them began. It is recorded on its
    # own, by `cnnlib timeline`, and is no part of a run.
    "timeline": {
        **IDENTITY,
        "step": int,
        "block": int,
        "section": str,
        "part": str,
        "begin_seconds": float,
        "end_seconds": float,
        **STANDING,
    },
    # One row per training step timed on its own, from choosing the batch to the visible update.
    "steps": {**IDENTITY, "step": int, "step_seconds": float, **STANDING},
}


@dataclass(frozen=True)
class Former:
    """Names that tables were written with by earlier versions, each with today's name."""

    tables: Mapping[str, str]
    columns: Mapping[str, Mapping[str, str]]
    """Former and present names of columns, by the present name of their table."""
    values: Mapping[str, Mapping[str, str]]
    """Former and present values, by the column in which they occur in any table."""


FORMER = Former(
    tables={"digits": "predictions", "functions": "cpu_profile"},
    columns={
        "predictions": {"digit": "image_index"},
        "pictures": {"digit": "image_index"},
    },
    values={"device_kind": {"host": "emulated"}},
)
"""The only list of former names. Everything that reads a table accepts them, so that published
results stay readable; nothing writes them.
"""


def current_name(table: str) -> str:
    """Today's name of a table; a name that no earlier version used is returned as it is."""
    return FORMER.tables.get(table, table)


def find(folder: Path, table: str) -> Path:
    """The file of `table` in `folder`: TABLE.csv, or a former name's file if only that exists."""
    path = folder / f"{table}.csv"
    if not path.exists():
        for former, name in FORMER.tables.items():
            if name == table and (folder / f"{former}.csv").exists():
                return folder / f"{former}.csv"
    return path


RUN_TABLES = ("epochs", "steps", "kernels", "samples", "energy", "learning", "predictions")
"""The tables that each run writes, one file each; see cnnlib.measuring.run."""

Value = str | int | float | bool
Row = dict[str, Value]
"""One row of a table: column -> value."""


def write(path: Path | str, table: str, rows: Iterable[Mapping[str, Value]]) -> None:
    """Write `rows` as a whole file; each has every column of `table` and no other.

    Only LATER columns may be missing from a row. Raises KeyError or ValueError for a row that does
    not fit, which is a bug and not bad input.
    """
    columns = TABLES[table]
    lines = []
    for row in rows:
        wrong = set(row) ^ set(columns) - (LATER.keys() - set(row))
        if wrong:
            raise KeyError(f"{table}: columns {sorted(wrong)} missing or unknown")
        lines.append(
            [
                _text(table, column, row[column]) if column in row else LATER[column]
                for column in columns
            ]
        )
    with write_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)


def _text(table: str, column: str, value: Value) -> str:
    kind = TABLES[table][column]
    if column in CHOICES and value not in CHOICES[column]:
        raise ValueError(f"{table}.{column} is {value!r}; known: {', '.join(CHOICES[column])}")
    if kind is bool:
        return "true" if value else "false"
    if kind is float:
        return repr(float(value))
    if kind is int and value != int(value):
        raise ValueError(f"{table}.{column} is {value!r}, not a whole number")
    # A name is one line, so that a reader of lines sees one row per line.
    return str(int(value)) if kind is int else " ".join(str(value).split())


def read(path: Path | str, table: str) -> "pd.DataFrame":
    """Rows of one file in the table's column order and types, under today's names.

    Raises DataError naming the file and the column when the file is missing, empty, cut off or has
    another header: a damaged file is refused, never drawn.
    """
    import pandas as pd

    columns = TABLES[current_name(table)]
    dtypes = {str: "str", int: "int64", float: "float64", bool: "bool"}
    return pd.DataFrame(
        {
            column: pd.Series(values, dtype=dtypes[columns[column]])
            for column, values in read_columns(path, table).items()
        }
    )


def read_columns(path: Path | str, table: str) -> dict[str, list[Any]]:
    """Like `read`, but plain lists and without pandas: quicker for a small table."""
    table = current_name(table)
    return _columns(path, table, _lines(path, table))


def _lines(path: Path | str, table: str) -> list[list[str]]:
    """The cells of every row below the header, as many as there are columns.

    Former names of columns and values are replaced by today's.
    """
    columns = TABLES[table]
    # pandas would pad short rows and shift long ones; here a row with other cells is an error.
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            lines = list(csv.reader(stream, strict=True))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a {table} table: {error}") from None
    if not lines:
        raise DataError(f"{path} is not a {table} table: it is empty")
    renamed = FORMER.columns.get(table, {})
    lines[0] = [renamed.get(column, column) for column in lines[0]]
    lines = _with_later_columns(table, lines)
    if lines[0] != list(columns):
        wrong = sorted(set(lines[0]) ^ set(columns)) or lines[0]
        raise DataError(
            f"{path} is not a {table} table: columns missing, unknown or moved: {wrong}"
        )
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(columns):
            raise DataError(
                f"{path}, row {number}: {len(line)} cells, not {len(columns)}: cut off?"
            )
    for index, column in enumerate(columns):
        if names := FORMER.values.get(column):
            for line in lines[1:]:
                line[index] = names.get(line[index], line[index])
    return lines[1:]


def _with_later_columns(table: str, lines: list[list[str]]) -> list[list[str]]:
    """The lines, header first, with LATER columns put in where the table was written without."""
    columns = list(TABLES[table])
    missing = [column for column in columns if column in LATER and column not in lines[0]]
    if not missing or [column for column in columns if column not in missing] != lines[0]:
        return lines
    for column in missing:
        index = columns.index(column)
        for number, line in enumerate(lines):
            if number == 0 or len(line) >= index:  # a line that is cut off is reported as such
                line.insert(index, LATER[column] if number else column)
    return lines


def _columns(path: Path | str, table: str, lines: list[list[str]]) -> dict[str, list[Any]]:
    """Column -> its values in these rows, each checked."""
    columns = TABLES[table]
    cells = zip(*lines, strict=True) if lines else [()] * len(columns)
    return {
        column: _typed(path, column, kind, texts)
        for (column, kind), texts in zip(columns.items(), cells, strict=True)
    }


def _typed(path: Path | str, column: str, kind: type, texts: Sequence[str]) -> list[Any]:
    if kind is str:
        unknown = set(texts) - set(CHOICES.get(column, texts))
        if unknown:
            raise DataError(f"{path}: unknown {column} {min(unknown)!r}")
        return list(texts)
    try:
        if kind is bool:
            known = {"true": True, "false": False}
            return [known[text] for text in texts]
        values = [kind(text) for text in texts]
        # A table cannot hold whole numbers of more than 64 bits.
        if kind is int and any(not -(2**63) <= value < 2**63 for value in values):
            raise OverflowError
        return values
    except (KeyError, ValueError, OverflowError):
        raise DataError(
            f"{path}: column {column} holds something that is no {kind.__name__}"
        ) from None


def combine(paths: Sequence[Path | str], table: str, out: Path | str) -> int:
    """Write all rows of many files of one table into `out`, in the order of `paths`; their number.

    One file is in memory at a time. Raises DataError where `read` does, and when two files hold
    rows of the same run: a measurement counted twice would look more certain than it is.
    """
    table = current_name(table)
    if not paths:
        raise DataError(f"there are no {table} files to combine")
    columns = TABLES[table]
    keys = [column for column in IDENTITY if column in columns]
    indices = [list(columns).index(column) for column in keys]
    seen: dict[tuple[str, ...], Path | str] = {}
    count = 0
    with write_whole(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as whole:
        writer = csv.writer(whole, lineterminator="\n")
        writer.writerow(columns)
        for path in paths:
            lines = _lines(path, table)
            _columns(path, table, lines)
            for identity in dict.fromkeys(tuple(line[i] for i in indices) for line in lines):
                if identity in seen:
                    run = ", ".join(f"{k} {v}" for k, v in zip(keys, identity, strict=True))
                    raise DataError(f"{seen[identity]} and {path} both hold the run {run}")
                seen[identity] = path
            writer.writerows(lines)
            count += len(lines)
    return count
