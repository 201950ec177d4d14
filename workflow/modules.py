"""Figures and tables are found by file name: a new file in the folder is a new figure or table.

Each is a Python file that names the tables it reads in a constant, TABLES = ("summary",), so that
the workflow knows its inputs without running it.
"""

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pandas as pd

from cnnlib import records
from cnnlib.errors import ConfigError, DataError

HERE = Path(__file__).resolve().parent


def names(folder: str) -> list[str]:
    """Names of the files in workflow/<folder>, sorted."""
    return sorted(path.stem for path in (HERE / folder).glob("[!_.]*.py"))


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
    """The file workflow/<folder>/<name>.py, relative to the folder of the Snakefile."""
    return Path("workflow", folder, f"{name}.py")


def tables_read(folder: str, name: str) -> tuple[str, ...]:
    """The constant TABLES of the file, without running it."""
    path = HERE / folder / f"{name}.py"
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "TABLES":
            return tuple(ast.literal_eval(statement.value))
    raise ConfigError(f"{source(folder, name)} does not say which TABLES it reads")


def raw_tables(folder: str, name: str) -> set[str]:
    """The raw tables that the file's tables are, or are made from."""
    made = set(names("tables"))
    found: set[str] = set()
    for table in tables_read(folder, name):
        found |= raw_tables("tables", table) if table in made else {table}
    return found


def docstring(folder: str, name: str) -> str:
    """What the file says of itself, without running it."""
    path = HERE / folder / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or name


def load(folder: str, name: str) -> ModuleType:
    """The file as a module."""
    path = HERE / folder / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    if specification is None or specification.loader is None:
        raise DataError(f"cannot load {path}")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def read_tables(paths: Iterable[Path]) -> dict[str, pd.DataFrame]:
    """Table name -> rows; raw tables are checked column by column, others as pandas reads them."""
    tables = {}
    for path in paths:
        if path.stem in records.TABLES:
            tables[path.stem] = records.read(path, path.stem)
        else:
            try:
                tables[path.stem] = pd.read_csv(path, keep_default_na=False, na_values=["nan", ""])
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {path}: {error}") from None
    return tables
