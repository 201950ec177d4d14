"""The order of the stages in every figure and table, and which of them are the ladder's own.

Programs that draw know the stages of the repository. What they have to know of others, the workflow
writes beside the tables (OWN_FILE), so that a user's code is not run to draw its figures.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from cnnlib.engine import ImageByImage, Stage
from cnnlib.errors import DataError
from cnnlib.measuring.cards import Card
from cnnlib.peers import PEERS
from cnnlib.stages import ALL

NAMES_OF_PEERS = {stage.name for stage in PEERS}
OWN_FILE = "stages.json"


@dataclass(frozen=True)
class Described:
    """What figures and tables say of a stage from outside the repository."""

    name: str
    title: str
    change: str
    color: str
    marker: str
    rounding: float | None


_own: list[Described] = []


def describe(card: Card) -> dict[str, Any]:
    """An entry of OWN_FILE."""
    return asdict(Described(**{each.name: getattr(card, each.name) for each in fields(Described)}))


def take_in(tables: Iterable[Path]) -> None:
    """Read OWN_FILE beside these tables, if there is one: these stages are known from now on.

    Raises DataError if it cannot be read.
    """
    _own.clear()
    for path in dict.fromkeys(table.parent / OWN_FILE for table in tables):
        if not path.exists():
            continue
        try:
            _own.extend(Described(**entry) for entry in json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"cannot read {path}: {error}") from None


def known() -> list[Stage | Described]:
    """The stages in order: the ladder, its variants, those from outside the repository, peers."""
    peers = [stage for stage in ALL if stage.name in NAMES_OF_PEERS]
    return [*(stage for stage in ALL if stage not in peers), *_own, *peers]


def ordered(stages: Iterable[str]) -> list[str]:
    """Names of stages, each once: those that are `known` in their order, then others by name."""
    names = [stage.name for stage in known()]
    present = set(stages)
    return [name for name in names if name in present] + sorted(present - set(names))


def image_by_image() -> set[str]:
    """Names of the shipped stages whose time per image is the same at every batch size."""
    return {stage.name for stage in ALL if issubclass(stage.engine, ImageByImage)}


def exact_peers() -> list[str]:
    """Names of the peers that compute in float32, as the stages of the ladder do."""
    return [stage.name for stage in PEERS if stage.rounding is None]


def with_best_library(rows: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Rows without those of peers but the one in float32 that is quickest in most of `epochs`.

    Where peers are all there is, their rows stay.
    """
    exact = epochs[epochs["stage"].isin(exact_peers()) & (epochs["status"] == "ok")]
    exact = exact[exact["stage"].isin(rows["stage"])]
    times = exact.groupby(["batch_size", "stage"])["epoch_seconds"].median()
    if not len(times.dropna()):
        return own_rows(rows)
    best = times.dropna().groupby("batch_size").idxmin().map(lambda key: key[1]).mode().iloc[0]
    return rows[~rows["stage"].isin(NAMES_OF_PEERS - {best})]


def own_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without those of peers, if any are left: for figures where peers are too many lines."""
    own = rows[~rows["stage"].isin(NAMES_OF_PEERS)]
    return own if len(own) else rows
