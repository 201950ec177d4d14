"""Results that were removed or altered, and data of another specification, are made again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cnnlib.config import Config
from cnnlib.datasets import prepare
from cnnlib.measuring.freshness import MOST_LINES, is_sound
from cnnlib.paths import ROOT
from tests.support.mirrors import arrays, spec_of, write_files
from tests.support.toys import SETTINGS, toy_config, toy_data
from tests.workflow.conftest import Checkout, digest, usual
from workflow.glue import integrity, modules
from workflow.glue.integrity import MADE, Made, data_again

RUNS = "results/runs/blobs/tiny"


def tiny(checkout: Checkout, **changes: Any) -> str:
    """Write the tiny config with some settings changed; returns the name of the file."""
    settings = yaml.safe_load((checkout.folder / "tests/tiny.yaml").read_text())
    for section, change in changes.items():
        settings[section] = settings[section] | change if isinstance(change, dict) else change
    (checkout.folder / "changed.yaml").write_text(yaml.safe_dump(settings))
    return "changed.yaml"


@pytest.mark.slow(60)
def test_all_makes_again_what_is_not_what_was_made(mine: Checkout) -> None:
    """Files are damaged in different ways; Snakemake alone takes altered files for new ones.

    Three figures are drawn again from what was measured again, and the other ones stay.
    """
    config = tiny(mine, figures=["filters", "race", "speedup"])
    results = mine.folder / "results"
    runs = mine.folder / RUNS
    content = {
        path: digest(path)
        for folder in ("figures", "tables")
        for path in (results / folder).iterdir()
        if path.suffix in (".svg", ".md")
    }
    files = [*runs.rglob("run.json"), *results.glob("race/*"), results / "tables/probes.csv"]
    times = {path: path.stat().st_mtime_ns for path in files}
    (runs / "gemm/b4/r1/run.json").write_text('{"status": ')
    (runs / "gemm/b4/r2/steps.csv").write_bytes(b"")
    shutil.rmtree(runs / "gemm/b8/r1")
    (runs / "naive/b8/r2/learning.csv").unlink()
    with open(results / "tables/probes.csv", "a") as table:
        table.write("more\n")
    (results / "tables/limits.md").write_text("")
    (results / "figures/filters.svg").unlink()
    (results / "race/gemm.csv").unlink()
    text = mine.snakemake("all", config=config)
    for line in (
        f"{RUNS}/gemm/b4/r1/run.json is damaged: it is not JSON",
        f"{RUNS}/gemm/b4/r2/steps.csv is not what was measured",
        f"cannot read {RUNS}/naive/b8/r2/learning.csv: No such file or directory",
        "results/race/gemm.csv is missing",
        "results/tables/probes.csv is not what was made",
    ):
        assert text.count(f"made again: {line}\n") == 1, line
    assert "made again: 2 more\n" in text
    ran = {path for path, before in times.items() if path.stat().st_mtime_ns != before}
    assert ran == {
        runs / "gemm/b4/r1/run.json",
        runs / "gemm/b4/r2/run.json",
        runs / "gemm/b8/r1/run.json",
        runs / "naive/b8/r2/run.json",
        results / "race/gemm.csv",
        results / "tables/probes.csv",
    }
    assert all(is_sound(path.parent) for path in times if path.name == "run.json")
    assert {path for path in content if not path.exists()} == set()
    filters = results / "figures/filters.svg"
    assert digest(filters) == content[filters]
    assert "Nothing to be done" in mine.snakemake("all", config=config)


@pytest.mark.slow
def test_runs_that_are_all_gone_are_measured_again(mine: Checkout) -> None:
    """The tables that are left do not count as published ones."""
    shutil.rmtree(mine.folder / "results/runs")
    assert mine.planned("all")["measure"] == 8


@pytest.mark.slow
def test_one_command_measures_a_run_again(mine: Checkout) -> None:
    """The command of docs/first-steps.md."""
    place = f"{RUNS}/gemm/b4/r1/run.json"
    planned = mine.planned("all", "--forcerun", place)
    assert (planned["measure"], planned["combine"]) == (1, 7)
    readme = (ROOT / "docs/first-steps.md").read_text()
    assert "snakemake --cores 2 all --forcerun results/runs/" in readme


@pytest.mark.slow
def test_data_that_another_command_made_are_made_again(mine: Checkout) -> None:
    """`cnnlib train` with another config has written its data where the workflow has its own."""
    other = toy_config(datasets={"blobs": {**SETTINGS["datasets"]["toy"]}}).datasets["blobs"]
    data = mine.folder / "results/data/blobs.npz"
    own = data.read_bytes()
    prepare("blobs", other, mine.folder, data)
    os.utime(data, (1e9, 1e9))  # older than everything that was made of it
    said = mine.snakemake("--dry-run", "results/data/blobs.npz")
    assert "made again: results/data/blobs.npz does not hold data set 'blobs'" in said
    mine.snakemake("results/data/blobs.npz")
    assert data.read_bytes() == own


@pytest.mark.slow
def test_runs_that_cnnlib_sweep_made_with_other_settings(mine: Checkout) -> None:
    """Snakemake has no record of such runs, but their run.json shows that they are stale."""
    shutil.rmtree(mine.folder / ".snakemake")
    changed = tiny(mine, measuring={"latency_steps": 4})
    assert mine.planned("all", config=changed)["measure"] == 8


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    Made(str(tmp_path), paths(tmp_path)).end()
    return tmp_path


def paths(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("a", "b", "c", "d")]


def test_what_was_made_is_known(made: Path) -> None:
    assert Made(str(made), paths(made)).again() == {}
    (made / "a").write_text("A")
    (made / "b").unlink()
    (made / "c").unlink()
    (made / "c").mkdir()
    (made / "d").write_text("new")
    assert Made(str(made), paths(made)).again() == {
        str(made / "a"): f"{made / 'a'} is not what was made",
        str(made / "b"): f"{made / 'b'} is missing",
        str(made / "c"): f"{made / 'c'} is missing",
    }


def test_what_was_altered_stays_so_until_it_is_made_again(made: Path) -> None:
    """This holds also after a call for another file, or one that was killed."""
    (made / "a").write_text("A")
    (made / "b").write_text("B")
    first = Made(str(made), paths(made))
    first.begin()
    assert set(Made(str(made), paths(made)).again()) == {str(made / "a"), str(made / "b")}
    (made / "c").write_text("remade")
    (made / "b").write_text("b")
    first.end()
    assert set(Made(str(made), paths(made)).again()) == {str(made / "a")}


def test_a_killed_call_takes_nothing_new_for_altered(made: Path) -> None:
    Made(str(made), paths(made)).begin()
    (made / "a").write_text("made by a job")
    assert Made(str(made), paths(made)).again() == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\0", '{"a": [1]}'])
def test_a_damaged_record_is_none(made: Path, text: str) -> None:
    (made / integrity.MADE).write_text(text)
    Made(str(made), paths(made)).again()
    Made(str(made), paths(made)).end()
    assert set(json.loads((made / integrity.MADE).read_text())) == set(paths(made)[:3])


def test_downloaded_files_that_are_gone_are_fetched_again(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "data/toy", arrays(60, 20, 8, 3))
    (folder / ".downloaded").touch()
    spec = spec_of(folder, [], shape=[1, 8, 8], classes=3)
    config = toy_config(datasets={"toy": spec.model_dump()})
    path = tmp_path / "data/toy.npz"
    prepare("toy", spec, folder, path)

    def again() -> dict[str, str]:
        return data_again(config, str(tmp_path))

    assert again() == {}
    labels = folder / "train-labels"
    whole = labels.read_bytes()
    labels.unlink()
    assert again() == {}, "they are not needed"
    labels.write_bytes(whole[:-1] + b"\1")
    path.unlink()
    assert set(again()) == {str(folder / ".downloaded")}
    assert "another checksum than datasets.toy.files" in again()[str(folder / ".downloaded")]
    labels.unlink()
    assert again() == {str(folder / ".downloaded"): f"{labels} is missing"}
    labels.write_bytes(whole)
    assert again() == {}
    path.write_bytes(b"")
    assert set(again()) == {str(path)}


def test_data_of_the_race_count_too(tmp_path: Path) -> None:
    raced = SETTINGS["datasets"]["toy"]
    settings = toy_config(datasets={"raced": raced}).model_dump(mode="json")
    settings["race"] = {
        "dataset": "raced",
        "network": "small",
        "stages": ["gemm"],
        "batch_size": 4,
        "training": {"learning_rate": 0.1, "epochs": 1},
    }
    config = Config.model_validate(settings)
    (tmp_path / "data").mkdir()
    made, _ = toy_data(tmp_path)
    shutil.copy(made, tmp_path / "data/raced.npz")
    assert data_again(config, str(tmp_path)) == {}
    (tmp_path / "data/raced.npz").write_bytes(b"PK")
    assert set(data_again(config, str(tmp_path))) == {str(tmp_path / "data/raced.npz")}


def test_few_lines_are_said_of_many_files() -> None:
    many = {str(number): f"{number} is missing" for number in range(1000)} | {"silent": ""}
    said = list(integrity.lines(many))
    assert said[0] == "to be made again: 0 is missing"
    assert said[-1] == "to be made again: 995 more"
    assert len(said) == MOST_LINES + 1


@pytest.mark.slow
def test_every_figure_and_table_is_recorded(finished: Checkout) -> None:
    made = json.loads((finished.folder / "results" / MADE).read_text())
    files = {Path(path).name for path in made}
    for name in usual("figures"):
        assert {f"{name}.png", f"{name}.svg"} <= files
        for read in modules.raw_tables("figures", name):
            assert f"{read}.csv" in files
    for name in usual("tables"):
        assert {f"{name}.csv", f"{name}.md"} <= files
