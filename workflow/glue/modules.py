"""Figures and tables are found by file name: a new file in the folder is a new figure or table.

Each is a Python file that names the tables it reads in a constant, TABLES = ("summary",), so that
the workflow knows its inputs without running it.
"""

import ast
import csv
import importlib.util
import io
from collections.abc import Iterable
from pathlib import Path
from re import fullmatch
from types import ModuleType
from typing import Any

import pandas as pd

from cnnlib.errors import ConfigError, DataError
from cnnlib.measuring import schema
from cnnlib.paths import ROOT

FOLDER = ROOT / "workflow"

NUMBER = r"-?\d+(\.\d+)?(e[+-]\d+)?|-?inf|nan|"
KINDS = {"text": r"[^\x00-\x1f\x7f]*", "truth": "True|False", "count": r"\d+", "number": NUMBER}
"""Kinds of columns of the tables of workflow/tables, and what their fields match."""


def names(folder: str) -> list[str]:
    """Names of the files in workflow/<folder>, sorted."""
    return sorted(path.stem for path in (FOLDER / folder).glob("[!_.]*.py"))


def chosen(folder: str, wanted: Iterable[str] | None, place: str) -> list[str]:
    """`wanted`, or all if None; ConfigError naming `place` and the choices for an unknown one."""
    known = names(folder)
    if wanted is None:
        return known
    for name in wanted:
        if name not in known:
            raise ConfigError(f"unknown name {name!r} in {place}; known: {', '.join(known)}")
    return list(wanted)


def source(folder: str, name: str) -> Path:
    """The file workflow/<folder>/<name>.py, relative to the Snakefile."""
    return Path("workflow", folder, f"{name}.py")


def constant(folder: str, name: str, constant: str) -> Any:
    """The value of a constant of the file, without running it; None if there is none."""
    path = FOLDER / folder / f"{name}.py"
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == constant:
            return ast.literal_eval(statement.value)
    return None


def tables_read(folder: str, name: str) -> tuple[str, ...]:
    """The constant TABLES of the file."""
    tables = constant(folder, name, "TABLES")
    if tables is None:
        raise ConfigError(f"{source(folder, name)} does not say which TABLES it reads")
    return tuple(tables)


def raw_tables(folder: str, name: str) -> set[str]:
    """Names of the raw tables that a figure or table is made from, directly or through others."""
    made = set(names("tables"))
    found: set[str] = set()
    for table in tables_read(folder, name):
        found |= raw_tables("tables", table) if table in made else {table}
    return found


def docstring(folder: str, name: str) -> str:
    """The docstring of the file, read without running it."""
    path = FOLDER / folder / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or name


def load(folder: str, name: str) -> ModuleType:
    """The file as a module."""
    path = FOLDER / folder / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    if specification is None or specification.loader is None:
        raise DataError(f"cannot load {path}")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def read_tables(paths: Iterable[Path]) -> dict[str, pd.DataFrame]:
    """Table name -> rows; every field is checked."""
    named = [(path, schema.current_name(path.stem)) for path in paths]
    return {
        name: (schema.read if name in schema.TABLES else read_made)(path, name)
        for path, name in named
    }


def read_made(path: Path, name: str) -> pd.DataFrame:
    """A table that workflow/tables/<name>.py has made: whole, with its COLUMNS of their kinds.

    Raises DataError that names the file and the line; a damaged table is made again once it is
    removed.
    """
    columns = constant("tables", name, "COLUMNS") if name in names("tables") else None
    if not isinstance(columns, dict):
        raise DataError(f"cannot read {path}: no table that is read has this name")
    try:
        text = path.read_text(encoding="utf-8")
        lines = list(csv.reader(io.StringIO(text), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise damaged(path, str(error)) from None
    if not lines or lines[0] != list(columns):
        raise damaged(path, f"its columns are not those of workflow/tables/{name}.py")
    if len(lines) == 1 or not text.endswith("\n"):
        raise damaged(path, "its end is missing")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise damaged(path, f"line {number} has {len(line)} fields, not {len(columns)}")
        for (column, kind), field in zip(columns.items(), line, strict=True):
            if not fullmatch(KINDS[kind], field):
                raise damaged(path, f"line {number} has {ascii(field)[:40]} as {column}")
    # A network may be called 007, or nan: columns of texts are taken as they are written.
    texts = [column for column, kind in columns.items() if kind == "text"]
    missing = {column: ["nan", ""] for column in columns if column not in texts}
    frame = pd.read_csv(
        io.StringIO(text), dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=missing
    )
    former = {name: values for name, values in schema.FORMER.values.items() if name in frame}
    return frame.assign(**{name: frame[name].replace(former[name]) for name in former})


def damaged(path: Path, why: str) -> DataError:
    """The error for a table that was made here and has been altered since."""
    return DataError(f"{path} is damaged: {why}; remove it, and it is made again")
