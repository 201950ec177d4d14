"""Tables that other programs made are checked when they are read."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from cnnlib.errors import DataError
from cnnlib.measuring import schema
from tests.workflow.rows import epoch_rows, summarise
from workflow.glue import modules

pytestmark = pytest.mark.quick


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "its columns are not those of workflow/tables/summary.py"),
    "another column": (lambda text: text.replace("stage", "stages", 1), "its columns are not"),
    "no rows": (lambda text: text.partition("\n")[0] + "\n", "its end is missing"),
    "cut off": (lambda text: text[:-30], "its end is missing"),
    "a field too many": (lambda text: text[:-1] + ",1\n", r"line 3 has 30 fields, not 29"),
    "no number": (lambda text: text.replace(",8,", ",eight,", 1), "'eight' as batch_size"),
    "bytes": (lambda text: text.replace("gemm", "g\0mm"), r"'g\\x00mm' as stage"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_summary_is_named_and_not_drawn(tmp_path: Path, damage: str) -> None:
    summary = summarise(epoch_rows("naive", [[2.0]]), epoch_rows("gemm", [[1.0, 1.5]]))
    file = tmp_path / "summary.csv"
    summary.to_csv(file, index=False, na_rep="nan", float_format="%.9g", lineterminator="\n")
    text = file.read_text()
    read = modules.read_tables([file])["summary"]
    assert list(read["speedup"]) == pytest.approx(list(summary["speedup"]))
    change, problem = DAMAGE[damage]
    assert change(text) != text
    file.write_text(change(text))
    with pytest.raises(DataError, match=problem) as caught:
        modules.read_tables([file])
    assert str(file) in str(caught.value)
    assert "made again" in str(caught.value)


@pytest.mark.parametrize("name", ["007", "1e5", "nan", "NA", "None", "true", "1_000", "inf"])
def test_names_that_look_like_numbers_stay_names(tmp_path: Path, name: str) -> None:
    names = {"dataset": name, "network": name, "device": name}
    lines = [epoch_rows("naive", [[2.0]], **names), epoch_rows(name, [[1.0]], **names)]
    summary, epochs = summarise(*lines), pd.concat(map(pd.DataFrame, lines))
    file = tmp_path / "summary.csv"
    summary.to_csv(file, index=False, na_rep="nan", float_format="%.9g", lineterminator="\n")
    read = modules.read_tables([file])["summary"]
    for column in ("dataset", "network", "device", "stage", "baseline"):
        assert list(read[column]) == list(summary[column])
    assert read["speedup"].tolist() == [1, 2]
    ladder = modules.load("tables", "ladder")
    none = {name: pd.DataFrame(columns=[*schema.TABLES[name]]) for name in ("kernels", "probes")}
    shown = ladder.markdown(ladder.make({"summary": read, "epochs": epochs, **none}))
    assert f"**{name} on {name}, batch 8**" in shown


def test_an_unknown_table_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no table that is read has this name"):
        modules.read_tables([tmp_path / "other.csv"])
