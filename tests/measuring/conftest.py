"""Fixtures of the tests of measuring."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cnnlib.datasets import Dataset
from cnnlib.engine import Stage
from cnnlib.measuring import run as measuring
from tests.support.toys import toy_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], None]:
    """Make a stage the only one that is found."""

    def install(stage: Stage) -> None:
        monkeypatch.setattr(measuring, "find_stage", lambda name, place: stage)

    return install
