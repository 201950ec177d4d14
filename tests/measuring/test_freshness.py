"""Runs with altered files or other settings are detected and measured again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.errors import DataError
from cnnlib.measuring import freshness, schema
from cnnlib.measuring.freshness import changed_runs, damage, is_sound
from cnnlib.measuring.record import read_facts
from cnnlib.measuring.run import measure
from cnnlib.measuring.runs import Run, runs, settings_digest
from tests.support.toys import toy_config, toy_data

RUN = Run("toy", "small", "gemm", 8, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Path:
    """A folder with one measured run."""
    folder = tmp_path_factory.mktemp("once")
    return measure(toy_config(), RUN, data, folder / RUN.folder)


@pytest.fixture
def measured(once: Path, tmp_path: Path) -> Path:
    """The measured run, in a results folder of the test's own."""
    shutil.copytree(once, tmp_path / RUN.folder)
    return tmp_path / RUN.folder


def config_in(folder: Path, **changes: Any) -> Config:
    return toy_config(**changes).model_copy(update={"results": str(folder)})


def test_a_run_that_was_left_alone_is_sound(measured: Path, tmp_path: Path) -> None:
    facts = read_facts(measured)
    assert set(facts["tables"]) == set(schema.RUN_TABLES)
    assert damage(measured) == ""
    assert is_sound(measured)
    assert list(changed_runs(config_in(tmp_path))) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def reorder(path: Path) -> None:
    """Moving the first row to the end leaves a table that is valid in itself."""
    head, row, *rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head, *rows, row]))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [Path.unlink, empty, cut, folder])
@pytest.mark.parametrize("table", schema.RUN_TABLES)
def test_a_table_that_is_no_longer_what_was_measured(
    measured: Path, tmp_path: Path, table: str, change: Callable[[Path], None]
) -> None:
    path = measured / f"{table}.csv"
    change(path)
    assert str(path) in damage(measured)
    assert not is_sound(measured)
    ((run, why),) = changed_runs(config_in(tmp_path))
    assert run == RUN
    assert str(path) in why


def test_rows_in_another_order_are_noticed_too(measured: Path) -> None:
    reorder(measured / "steps.csv")
    assert len(schema.read_columns(measured / "steps.csv", "steps")["step"]) == 3
    assert damage(measured) == f"{measured / 'steps.csv'} is not what was measured"


DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    "7",
    '"ok"',
    "{}",
    '{"status": 5}',
    '{"status": ["ok"]}',
    '{"status": "fine"}',
    '{"status": "ok", "tables": []}',
    '{"status": "ok", "tables": 3}',
    '{"status": "ok", "disturbed": "yes"}',
    '{"status": "failed", "failed": {}}',
    '{"status": "ok", "run": 1}',
    "[" * 100_000,
    '{"status": "ok", "tables": {"epochs": 5}}',
]


@pytest.mark.parametrize("text", [*DAMAGED, b"\xff\xfe", b"\0" * 4096])
def test_a_damaged_description_is_no_result(
    measured: Path, tmp_path: Path, data: Dataset, text: str | bytes
) -> None:
    path = measured / "run.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    why = damage(measured)
    assert why
    assert "\n" not in why
    assert str(measured) in why
    assert not is_sound(measured)
    assert [run for run, _ in changed_runs(config_in(tmp_path))] == [RUN]


def test_every_truncation_of_the_description_is_noticed(measured: Path) -> None:
    path = measured / "run.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="is damaged"):
            read_facts(measured)


def test_a_description_that_is_a_folder(measured: Path) -> None:
    folder(measured / "run.json")
    assert "Is a directory" in damage(measured)
    assert not is_sound(measured)


def test_a_folder_that_is_gone_is_no_result(measured: Path, tmp_path: Path) -> None:
    shutil.rmtree(measured)
    assert not is_sound(measured)
    assert list(changed_runs(config_in(tmp_path))) == []  # it looks as if it was never measured


def test_measuring_again_repairs(measured: Path, tmp_path: Path, data: Dataset) -> None:
    empty(measured / "epochs.csv")
    (measured / "run.json").write_text("{")
    measure(config_in(tmp_path), RUN, data, measured)
    assert is_sound(measured)


def test_runs_without_digests_are_accepted_if_they_are_whole(
    measured: Path, tmp_path: Path
) -> None:
    """Runs of earlier versions have no digests in their run.json."""
    facts = read_facts(measured)
    del facts["tables"], facts["settings"]
    (measured / "run.json").write_text(json.dumps(facts))
    assert is_sound(measured)
    assert list(changed_runs(config_in(tmp_path))) == []
    empty(measured / "samples.csv")
    assert "samples.csv" in damage(measured)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"epochs": 3}},
        {"training": {"momentum": 0.25}},
        {"measuring": {"latency_steps": 4}},
        {"datasets": {"toy": toy_config().datasets["toy"].model_dump() | {"seed": 2}}},
        {"networks": {"small": [{"dense": 3}]}},
    ],
)
def test_a_run_of_other_settings_is_stale(
    measured: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    ((run, why),) = changed_runs(config_in(tmp_path, **changes))
    assert run == RUN
    assert why == f"{measured} was measured with other settings or data"


@pytest.mark.parametrize(
    "changes",
    [
        {"sweep": {"batch_sizes": [4, 8]}},
        {"sweep": {"repeats": 2}},
        {"sweep": {"device": "emulated"}},
        {"measuring": {"resident_images": 64}},
        {"networks": {"other": [{"dense": 3}]}},
    ],
)
def test_what_a_run_does_not_depend_on_keeps_it(
    measured: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_in(tmp_path, **changes)
    assert RUN in runs(config)
    assert list(changed_runs(config)) == []


def test_a_stage_on_a_gpu_depends_on_what_it_holds() -> None:
    few = toy_config(measuring={"resident_images": 64})
    assert settings_digest(few, RUN, "cuda") != settings_digest(toy_config(), RUN, "cuda")
    assert settings_digest(few, RUN, "cpu") == settings_digest(toy_config(), RUN, "cpu")


@pytest.mark.parametrize("names", [("host", "host_seconds"), ("emulated", "emulated_seconds")])
def test_results_from_before_the_emulated_device_had_its_name_are_kept(
    names: tuple[str, str],
) -> None:
    """The digest is that of version 48b3389, where the device was called host."""
    device, seconds = names
    config = toy_config(sweep={"device": device}, measuring={seconds: 3.0})
    assert settings_digest(config, RUN, "cuda") == (
        "7098c82b7e184c5b66b6dc5b217f5d726e8957b8aed4678539ae75ad532f2bff"
    )


def test_a_run_in_the_folder_of_another(measured: Path, tmp_path: Path) -> None:
    other = Run("toy", "small", "gemm", 4, 1)
    shutil.copytree(measured, tmp_path / other.folder)
    config = config_in(tmp_path, sweep={"batch_sizes": [4, 8]})
    ((run, why),) = changed_runs(config)
    assert run == other
    assert why == f"{tmp_path / other.folder / freshness.FACTS} is of another run"
