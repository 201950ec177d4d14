"""Runs of the toy network: their tables, and engines that fail."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from cnnlib.measuring import schema
from cnnlib.measuring.runs import Run
from cnnlib.stages import naive

COUNT = 90


def run(stage: str = "gemm", batch_size: int = 8, repeat: int = 1) -> Run:
    return Run("toy", "small", stage, batch_size, repeat)


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    facts = json.loads((folder / "run.json").read_text())
    return (
        schema.read(folder / "epochs.csv", "epochs"),
        schema.read(folder / "steps.csv", "steps"),
        facts,
    )


def all_tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {name: schema.read(folder / f"{name}.csv", name) for name in schema.RUN_TABLES}


def failing(error: BaseException, where: str) -> type[naive.OneByOne]:
    """An engine that raises `error` in one of its methods."""

    class Failing(naive.OneByOne):
        pass

    def fail(self: object, *arguments: object) -> None:
        raise error

    setattr(Failing, where, fail)
    return Failing
