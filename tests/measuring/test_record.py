"""The files of a run: an older result stays until a new one is complete."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnnlib.datasets import Dataset
from cnnlib.engine import Stage
from cnnlib.errors import UserError
from cnnlib.measuring import schema
from cnnlib.measuring.run import measure
from cnnlib.stages import naive
from tests.support.runs import failing, run, tables
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


class Stop(BaseException):
    """An exception like that of a signal in the middle of a measurement."""


def test_stopped_while_writing_no_old_result_is_left(
    data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New rows beside an old run.json would be a result that was never measured."""
    measure(toy_config(), run(), data, folder)
    assert (folder / "run.json").exists()
    write = schema.write

    def stop_at_steps(path: Path, table: str, rows: Any) -> None:
        if table == "steps":
            raise Stop
        write(path, table, rows)

    monkeypatch.setattr(schema, "write", stop_at_steps)
    with pytest.raises(Stop):
        measure(toy_config(), run(), data, folder)
    assert not (folder / "run.json").exists()
    monkeypatch.undo()
    measure(toy_config(), run(), data, folder)
    assert tables(folder)[2]["status"] == "ok"


def test_stopped_before_writing_the_old_result_stays(
    data: Dataset, folder: Path, install: Callable[[Stage], None]
) -> None:
    measure(toy_config(), run(), data, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    install(dataclasses.replace(naive.STAGE, engine=failing(Stop(), "load")))
    with pytest.raises(Stop):
        measure(toy_config(), run(), data, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((UserError, OSError), match="file"):
        measure(toy_config(), run(), data, tmp_path / "file" / "inside")
    assert os.listdir(tmp_path) == ["file"]
