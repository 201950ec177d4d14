"""Rows of the tables epochs and steps, and the summary made of them."""

import itertools
import math

import pandas as pd

from cnnlib.measuring import schema
from workflow.glue import modules


def epoch_rows(stage: str, seconds: list[list[float]], **changes) -> list[dict]:
    """Rows of one line: a list of epoch times for each repeat."""
    return [
        {
            "dataset": "blobs",
            "network": "tiny",
            "stage": stage,
            "device": "a cpu",
            "batch_size": 8,
            "seed": repeat,
            "repeat": repeat,
            "epoch": epoch,
            "images": 64,
            "epoch_seconds": time,
            "event_seconds": math.nan,
            "loss": 1.0,
            "test_accuracy": 0.5,
            "device_kind": "cpu",
            "status": "ok",
            "validated": True,
            "extrapolated": False,
            **changes,
        }
        for repeat, times in enumerate(seconds, 1)
        for epoch, time in enumerate(times, 1)
    ]


def step_rows(stage: str, seconds: list[float]) -> list[dict]:
    shared = set(schema.TABLES["steps"]) & set(schema.TABLES["epochs"])
    line = {k: v for k, v in epoch_rows(stage, [[1.0]])[0].items() if k in shared}
    return [line | {"step": i, "step_seconds": time} for i, time in enumerate(seconds, 1)]


def summarise(*parts: list[dict], steps: list[dict] | None = None) -> pd.DataFrame:
    tables = {
        "epochs": pd.DataFrame(itertools.chain(*parts), columns=list(schema.TABLES["epochs"])),
        "steps": pd.DataFrame(steps or [], columns=list(schema.TABLES["steps"])),
    }
    return modules.load("tables", "summary").make(tables)


def ladder(*parts: list[dict]) -> pd.DataFrame:
    """The ladder of these lines, without kernels and probes."""
    summary = summarise(*parts)
    tables = {
        name: pd.DataFrame([], columns=list(schema.TABLES[name])) for name in ("kernels", "probes")
    }
    epochs = pd.DataFrame(itertools.chain(*parts), columns=list(schema.TABLES["epochs"]))
    return modules.load("tables", "ladder").make({"summary": summary, "epochs": epochs, **tables})


def line(summary: pd.DataFrame, stage: str) -> pd.Series:
    (found,) = (row for _, row in summary[summary["stage"] == stage].iterrows())
    return found
