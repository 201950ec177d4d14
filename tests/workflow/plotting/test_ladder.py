"""Stages from outside the repository have a place, a title and a mark in figures and tables."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from cnnlib.errors import DataError
from cnnlib.peers import PEERS
from cnnlib.stages import ALL
from workflow.plotting import ladder, style, wording

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def known_before() -> Iterator[None]:
    yield
    ladder.take_in([])


def entry(name: str, **fields: object) -> dict[str, object]:
    plain = {"title": f"my {name}", "change": "a", "color": "", "marker": "", "rounding": None}
    return {"name": name, **plain, **fields}


def take_in(folder: Path, *entries: dict[str, object]) -> None:
    (folder / "stages.json").write_text(json.dumps(entries))
    ladder.take_in([folder / "summary.csv", folder / "epochs.csv"])


def test_they_come_between_the_ladder_and_the_peers(tmp_path: Path) -> None:
    take_in(tmp_path, entry("second"), entry("first"))
    names = ["torch", "unknown", "first", "naive", "second", "fused_pull"]
    assert ladder.ordered(names) == ["naive", "fused_pull", "second", "first", "torch", "unknown"]
    assert wording.title("first") == "my first"
    rows = pd.DataFrame({"stage": names})
    assert set(ladder.own_rows(rows)["stage"]) == set(names) - {"torch"}


def test_each_has_a_colour_and_mark_that_no_other_stage_has(tmp_path: Path) -> None:
    names = [f"mine{n}" for n in range(len(style.OTHERS))]
    take_in(tmp_path, *(entry(name) for name in names))
    marks = [style.mark(name) for name in names]
    assert len(set(marks)) == len(names)
    shipped = {style.Mark(stage.color, stage.marker) for stage in ALL}
    assert not shipped & set(marks)


def test_those_of_the_record_are_kept(tmp_path: Path) -> None:
    ring = next(stage for stage in ALL if stage.name == "ring")
    take_in(
        tmp_path,
        entry("own", color="#123456", marker="*"),
        entry("inherited", color=ring.color, marker=ring.marker),
        entry("half", color="#654321"),
    )
    assert style.mark("own") == style.Mark("#123456", "*")
    assert style.mark("ring") == style.Mark(ring.color, ring.marker)
    assert style.mark("inherited") in style.OTHERS
    assert style.mark("half").color == "#654321"


def test_without_a_file_only_shipped_ones_are_known(tmp_path: Path) -> None:
    take_in(tmp_path, entry("mine"))
    ladder.take_in([tmp_path / "elsewhere/summary.csv"])
    assert wording.title("mine") == "mine"
    assert [stage.name for stage in ladder.known()][-1] == PEERS[-1].name


@pytest.mark.parametrize("text", ["{", "[1]", '[{"name": "x"}]', "3"])
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(DataError, match=r"cannot read .*stages\.json"):
        ladder.take_in([tmp_path / "summary.csv"])
