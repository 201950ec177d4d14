"""Tables: what was written is read again, and anything else is refused."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnlib.errors import DataError
from cnnlib.measuring import schema

pytestmark = pytest.mark.quick

EPOCH: dict[str, Any] = dict(
    dataset="mnist",
    network="lenet5",
    stage="gemm",
    device="Some CPU, 2 threads",
    batch_size=64,
    seed=1,
    repeat=1,
    epoch=1,
    images=59968,
    epoch_seconds=3.25,
    event_seconds=math.nan,
    loss=0.5,
    test_accuracy=0.97,
    device_kind="cpu",
    status="ok",
    validated=True,
    extrapolated=False,
)
STEP: dict[str, Any] = {k: v for k, v in EPOCH.items() if k in schema.TABLES["steps"]} | dict(
    step=1, step_seconds=0.01
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def test_every_table_begins_with_identity_and_ends_with_standing() -> None:
    for table, columns in schema.TABLES.items():
        if set(schema.IDENTITY) <= set(columns):
            assert list(columns)[: len(schema.IDENTITY)] == list(schema.IDENTITY), table
            assert list(columns)[-len(schema.STANDING) :] == list(schema.STANDING), table


def test_the_file_is_plain(path: Path) -> None:
    schema.write(path, "steps", [STEP])
    assert path.read_text() == (
        "dataset,network,stage,device,batch_size,seed,repeat,step,step_seconds,"
        "device_kind,status,validated,extrapolated\n"
        'mnist,lenet5,gemm,"Some CPU, 2 threads",64,1,1,1,0.01,cpu,ok,true,false\n'
    )


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20).map(lambda text: " ".join(text.split()))
KINDS: dict[type, st.SearchStrategy[Any]] = {
    str: TEXTS,
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(),
    bool: st.booleans(),
}
ROWS = {
    table: st.lists(
        st.fixed_dictionaries(
            {
                column: st.sampled_from(schema.CHOICES[column])
                if column in schema.CHOICES
                else KINDS[kind]
                for column, kind in columns.items()
            }
        ),
        max_size=4,
    )
    for table, columns in schema.TABLES.items()
}


@settings(max_examples=40)
@given(data=st.data(), table=st.sampled_from(sorted(schema.TABLES)))
def test_what_is_written_is_read(
    data: st.DataObject, table: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("round") / "table.csv"
    rows = data.draw(ROWS[table])
    schema.write(path, table, rows)
    frame = schema.read(path, table)
    assert list(frame.columns) == list(schema.TABLES[table])
    for row, read in zip(rows, frame.to_dict("records"), strict=True):
        for column, value in row.items():
            assert read[column] == value or (math.isnan(value) and math.isnan(read[column]))
    schema.write(path, table, frame.to_dict("records"))
    pd.testing.assert_frame_equal(schema.read(path, table), frame)


def test_types_hold_even_without_rows(path: Path) -> None:
    schema.write(path, "epochs", [])
    empty = schema.read(path, "epochs")
    schema.write(path, "epochs", [EPOCH])
    full = schema.read(path, "epochs")
    assert dict(empty.dtypes) == dict(full.dtypes)
    assert full.epoch_seconds.dtype == "float64"
    assert full.batch_size.dtype == "int64"
    assert full.validated.dtype == bool


LATER = [(t, c) for t, columns in schema.TABLES.items() for c in columns if c in schema.LATER]


@pytest.mark.parametrize(("table", "later"), LATER)
def test_tables_from_before_there_was_a_column_are_read(path: Path, table: str, later: str) -> None:
    """The published results are such tables."""
    columns = schema.TABLES[table]
    row = {c: {str: "ok", int: 1, float: 0.5, bool: True}[k] for c, k in columns.items()}
    if "device_kind" in row:
        row["device_kind"] = "cuda"
    del row[later]
    schema.write(path, table, [row, row])
    new = path.read_text()
    lines = [line.split(",") for line in new.splitlines()]
    place = lines[0].index(later)
    old = "".join(",".join(line[:place] + line[place + 1 :]) + "\n" for line in lines)
    assert later not in old
    path.write_text(old)
    frame = schema.read(path, table)
    assert [str(value) for value in frame[later]] == [schema.LATER[later]] * 2
    if "seed" not in columns:
        return
    schema.combine([path], table, path.with_name("both.csv"))
    assert path.with_name("both.csv").read_text() == new
    path.write_text(old.replace("ok", "ok,ok", 1))
    with pytest.raises(DataError):
        schema.read(path, table)


def test_a_name_is_one_line(path: Path) -> None:
    schema.write(path, "steps", [STEP | {"device": "a\r\nb\tc"}])
    assert schema.read(path, "steps").device[0] == "a b c"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({k: v for k, v in EPOCH.items() if k != "loss"}, "loss"),
        (EPOCH | {"speed": 1}, "speed"),
        (EPOCH | {"status": "fine"}, "status"),
        (EPOCH | {"device_kind": "tpu"}, "device_kind"),
        (EPOCH | {"batch_size": 1.5}, "batch_size"),
        (EPOCH | {"seed": "x"}, "x"),
    ],
)
def test_a_row_that_does_not_fit_is_not_written(
    path: Path, row: dict[str, Any], problem: str
) -> None:
    with pytest.raises((KeyError, ValueError), match=problem):
        schema.write(path, "epochs", [EPOCH, row])
    assert not path.exists()


def refused(path: Path, content: str | bytes, table: str = "steps") -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=str(path)) as raised:
        schema.read(path, table)
    return str(raised.value)


def test_foreign_and_empty_files_are_refused(path: Path) -> None:
    schema.write(path, "steps", [STEP])
    good = path.read_text()
    header, row = good.splitlines()
    assert "is empty" in refused(path, "")
    assert "columns missing" in refused(path, "\n")
    assert "columns missing" in refused(path, "a,b\n1,2\n")
    assert "step" in refused(path, good, "epochs")
    assert "columns missing" in refused(path, row + "\n")
    assert "columns missing" in refused(path, header.replace("seed,repeat", "repeat,seed") + "\n")
    assert "columns missing" in refused(path, header + ",more\n" + row + ",1\n")
    assert "row 2" in refused(path, header + "\n" + row + ",1\n")
    assert "not a steps table" in refused(path, b"\xff\xfe\x00binary")
    assert "row 2" in refused(path, header + "\n\x00\n")
    assert "not a steps table" in refused(path, header + '\n"mnist')
    assert "status 'fine'" in refused(path, good.replace(",ok,", ",fine,"))
    assert "column batch_size" in refused(path, good.replace(",64,", ",sixty,"))
    assert "column batch_size" in refused(path, good.replace(",64,", ",64.0,"))
    assert "column batch_size" in refused(path, good.replace(",64,", f",{2**70},"))
    assert "column step_seconds" in refused(path, good.replace(",0.01,", ",,"))
    assert "column validated" in refused(path, good.replace(",true,", ",True,"))


def test_no_cut_file_is_taken_for_a_whole_one(path: Path) -> None:
    schema.write(path, "steps", [STEP, STEP | {"step": 2}])
    whole = path.read_bytes()
    rows_end = {len(whole) - 1}  # only the last line's end is lost
    rows_end |= {i + 1 for i, byte in enumerate(whole) if byte == ord("\n")}
    rows_end |= {i - 1 for i in rows_end}
    for length in range(len(whole)):
        if length not in rows_end:
            refused(path, whole[:length])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*nothing.*No such file"):
        schema.read(tmp_path / "nothing.csv", "epochs")
    with pytest.raises(DataError, match="Is a directory"):
        schema.read(tmp_path, "epochs")


def test_combine_keeps_order(tmp_path: Path) -> None:
    for repeat in (2, 1):
        rows = [STEP | {"repeat": repeat, "step": step} for step in (1, 2)]
        schema.write(tmp_path / f"r{repeat}.csv", "steps", rows)
    paths = [tmp_path / "r2.csv", tmp_path / "r1.csv"]
    assert schema.combine(paths, "steps", tmp_path / "both.csv") == 4
    both = schema.read(tmp_path / "both.csv", "steps")
    assert list(both.repeat) == [2, 2, 1, 1]
    assert list(both.step) == [1, 2, 1, 2]


def test_combine_refuses_the_same_run_twice(tmp_path: Path) -> None:
    one, copy = tmp_path / "one.csv", tmp_path / "copy.csv"
    schema.write(one, "steps", [STEP])
    schema.write(copy, "steps", [STEP | {"step": 2}])
    with pytest.raises(
        DataError, match=r"one\.csv and .*copy\.csv both hold the run dataset mnist"
    ):
        schema.combine([one, copy], "steps", tmp_path / "both.csv")
    with pytest.raises(DataError, match="no steps files"):
        schema.combine([], "steps", tmp_path / "both.csv")
    assert not (tmp_path / "both.csv").exists()


PREDICTION: dict[str, Any] = {k: v for k, v in EPOCH.items() if k in schema.IDENTITY} | dict(
    images=64,
    train_seconds=0.5,
    image_index=340,
    label=3,
    probabilities="0.1 0.9",
    device_kind="emulated",
    status="ok",
    validated=True,
    extrapolated=False,
)


@pytest.mark.parametrize("table", ["digits", "predictions"])
def test_tables_of_earlier_versions_are_read_under_the_names_of_today(
    table: str, tmp_path: Path
) -> None:
    today, former = tmp_path / "predictions.csv", tmp_path / "digits.csv"
    schema.write(today, "predictions", [PREDICTION])
    text = today.read_text()
    former.write_text(text.replace("image_index", "digit").replace("emulated", "host"))
    assert former.read_text() != text
    read = schema.read(former, table)
    assert list(read.columns) == list(schema.TABLES["predictions"])
    assert read.to_dict("records") == [PREDICTION]
    schema.combine([former], table, tmp_path / "combined.csv")
    assert (tmp_path / "combined.csv").read_text() == text


def test_a_table_is_found_by_its_former_name(tmp_path: Path) -> None:
    today, former = tmp_path / "cpu_profile.csv", tmp_path / "functions.csv"
    assert schema.find(tmp_path, "cpu_profile") == today
    former.touch()
    assert schema.find(tmp_path, "cpu_profile") == former
    today.touch()
    assert schema.find(tmp_path, "cpu_profile") == today
    assert schema.find(tmp_path, "epochs") == tmp_path / "epochs.csv"


def test_former_names_lead_to_names_of_today() -> None:
    assert {*schema.FORMER.tables.values(), *schema.FORMER.columns} <= {*schema.TABLES}
    assert not {*schema.FORMER.tables} & {*schema.TABLES}
    for table, columns in schema.FORMER.columns.items():
        assert {*columns.values()} <= {*schema.TABLES[table]}
        assert not {*columns} & {*schema.TABLES[table]}
    for column, values in schema.FORMER.values.items():
        assert {*values.values()} <= {*schema.CHOICES[column]}
        assert not {*values} & {*schema.CHOICES[column]}
