"""The rows of one run: identity, standing, and what happens to them when a run ends otherwise."""

import math
from pathlib import Path

import pytest

from cnnlib.measuring import schema
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import Run

pytestmark = pytest.mark.quick

OF_RUNS = [table for table, columns in schema.TABLES.items() if {*schema.IDENTITY} <= {*columns}]


@pytest.fixture
def rows() -> RunRows:
    return RunRows(Run("toy", "small", "gemm", 8, 2), 5, "a cpu", "cpu")


@pytest.mark.parametrize("table", OF_RUNS)
def test_a_row_without_a_measurement_fits_its_table(
    rows: RunRows, tmp_path: Path, table: str
) -> None:
    row = rows.blank(table, "failed", "it hangs")
    schema.write(tmp_path / "t.csv", table, [row])
    (found,) = schema.read(tmp_path / "t.csv", table).to_dict("records")
    assert [found[column] for column in schema.IDENTITY] == [
        "toy",
        "small",
        "gemm",
        "a cpu",
        8,
        5,
        2,
    ]
    assert (found["status"], found["validated"]) == ("failed", False)
    assert found.get("reason", "it hangs") == "it hangs"
    numbers = {column for column, kind in schema.TABLES[table].items() if kind is float}
    assert all(math.isnan(found[column]) for column in numbers)


def test_rows_are_validated_when_all_checks_have_passed(rows: RunRows) -> None:
    rows.add_step(0.5)
    assert not rows["steps"][0]["validated"]
    rows.vouch()
    rows.add_step(0.25)
    assert [row["validated"] for row in rows["steps"]] == [True, True]
    assert [row["step"] for row in rows["steps"]] == [1, 2]


def test_only_epochs_and_steps_are_extrapolated(rows: RunRows) -> None:
    rows.extrapolated = True
    rows.add_epoch(images=8, epoch_seconds=1.0)
    rows.add_measured("learning", images=8)
    assert rows["epochs"][0]["extrapolated"]
    assert not rows["learning"][0]["extrapolated"]


def test_only_what_was_timed_or_did_not_fit_can_be_disturbed(rows: RunRows) -> None:
    for status in ("ok", "does_not_fit", "diverged"):
        rows.add_epoch(status)
    rows.add_step(0.5)
    rows.disturb("epochs")
    assert [row["status"] for row in rows["epochs"]] == ["disturbed", "disturbed", "diverged"]
    assert rows["steps"][0]["status"] == "ok"


def test_discarded_rows_leave_one_with_the_reason(rows: RunRows) -> None:
    rows.add_epoch(images=8)
    rows.add_step(0.5)
    rows.extrapolated = True
    rows.vouch()
    rows.discard("failed", "it trains wrongly")
    assert [len(table) for table in rows.tables.values() if table] == [1]
    (row,) = rows["epochs"]
    assert (row["epoch"], row["status"], row["reason"]) == (1, "failed", "it trains wrongly")
    assert (row["validated"], row["extrapolated"]) == (False, False)
    assert not rows.trained
