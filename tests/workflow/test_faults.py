"""The whole workflow when results cannot be written or a user's stage is broken."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.support.toys import read_only
from tests.workflow.conftest import Checkout

pytestmark = pytest.mark.slow


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error" in line.lower()]


def test_results_that_cannot_be_written(fresh: Checkout, tmp_path: Path) -> None:
    with read_only(tmp_path / "kept") as folder:
        text = fresh.snakemake("figures", "--config", f"results={folder}", code=2)
        assert list(folder.iterdir()) == []
    (line,) = errors(text)
    assert line.startswith(f"error: cannot write {folder}/config.yaml: ")
    assert line.endswith(("Read-only file system", "Permission denied"))
    assert "Traceback" not in text


@pytest.mark.parametrize("place", ["runs", "figures", "logs"])
def test_a_folder_that_cannot_be_written(fresh: Checkout, tmp_path: Path, place: str) -> None:
    """The error comes before the first job, even if only the last would write there."""
    checkout = fresh.copy(tmp_path / "checkout")
    results = checkout.folder / "results"
    results.mkdir()
    with read_only(results / place) as folder:
        text = checkout.snakemake("all", code=2)
        assert list(folder.iterdir()) == []
    (line,) = errors(text)
    assert line.startswith(f"error: cannot write results/{place}/")
    assert line.endswith(("Read-only file system", "Permission denied"))
    assert "Traceback" not in text
    assert sorted(path.name for path in results.iterdir()) == ["config.yaml", place, "tables"]


def test_a_folder_in_place_of_a_figure(fresh: Checkout, tmp_path: Path) -> None:
    checkout = fresh.copy(tmp_path / "checkout")
    (checkout.folder / "results/figures/speedup.svg").mkdir(parents=True)
    text = checkout.snakemake("all", code=2)
    assert errors(text) == ["error: cannot write results/figures/speedup.svg: Is a directory"]
    assert not (checkout.folder / "results/data").exists()


def test_a_file_where_results_should_be(fresh: Checkout, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    text = fresh.snakemake("figures", "--config", f"results={tmp_path}/file", code=2)
    assert errors(text) == [f"error: results: {tmp_path}/file is no folder"]
    assert (tmp_path / "file").read_text() == "precious"


# Stages as users write them: those of the ladder, but for one thing.
RAISES = """
class Engine(gemm.STAGE.engine):
    def train(self, *arguments):
        raise RuntimeError("the third wheel came off")
"""
NOT_A_NUMBER = """
class Engine(gemm.STAGE.engine):
    def gradient(self, images, labels):
        loss, gradient = super().gradient(images, labels)
        return loss, gradient * numpy.nan
"""
CRASHES = """
class Engine(gemm.STAGE.engine):
    def train(self, *arguments):
        ctypes.string_at(0)
"""
LEAVES = """
class Engine(gemm.STAGE.engine):
    def train(self, *arguments):
        os._exit(0)
"""
KILLS = """
class Engine(gemm.STAGE.engine):
    def train(self, *arguments):
        os.killpg(0, 9)
"""
MODULE = '''"""A stage of a user's own."""

import ctypes
import dataclasses
import os

import numpy

from cnnlib.stages import gemm

{engine}

STAGE = dataclasses.replace(gemm.STAGE, name="{name}", title="{name}", engine=Engine)
'''


def add_stage(checkout: Checkout, name: str, engine: str) -> None:
    """As docs/extending/stage.md says: a module is enough."""
    file = checkout.folder / f"cnnlib/stages/{name}.py"
    file.write_text(MODULE.format(name=name, engine=engine))


def run_json(checkout: Checkout, stage: str) -> dict[str, Any]:
    (path,) = checkout.folder.glob(f"results/runs/blobs/tiny/{stage}/b4/r1/run.json")
    return dict(json.loads(path.read_text()))


@pytest.mark.slow(30)
def test_a_users_stages_that_fail_or_end_their_processes(fresh: Checkout, tmp_path: Path) -> None:
    """They fail in the sweep, the profiler and the race; the others' results are drawn."""
    checkout = fresh.copy(tmp_path / "checkout")
    engines = {
        "wheels": RAISES,
        "nowhere": NOT_A_NUMBER,
        "crashes": CRASHES,
        "leaves": LEAVES,
        "kills": KILLS,
    }
    for name, engine in engines.items():
        add_stage(checkout, name, engine)
    settings = yaml.safe_load((checkout.folder / "tests/tiny.yaml").read_text())
    settings["sweep"] |= {"stages": [*engines, "gemm"], "batch_sizes": [4], "repeats": 1}
    settings["race"]["stages"] = ["crashes", "gemm"]
    settings["figures"] = ["speedup", "race"]
    (checkout.folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    text = checkout.snakemake("figures", "results/tables/hotspots.csv", config="mine.yaml")
    assert "nowhere, batch 4: failed: ValidationFailed: stage 'nowhere' fails validation" in text
    why = {
        "wheels": "RuntimeError: the third wheel came off",
        "crashes": "killed by SIGSEGV while validating, in train of cnnlib/stages/crashes.py:14",
        "leaves": "ended its process with exit code 0 while validating",
        "kills": "killed by SIGKILL while validating",
    }
    for name, reason in why.items():
        assert f"{name}, batch 4: failed: {reason}" in text
        assert run_json(checkout, name)["failed"] == reason
    assert "crashes: 0 of 3 trainings (failed)" in text
    status = {stage: run_json(checkout, stage)["status"] for stage in settings["sweep"]["stages"]}
    assert status == dict.fromkeys(engines, "failed") | {"gemm": "ok"}
    tables = checkout.folder / "results/tables"
    summary = pd.read_csv(tables / "summary.csv").set_index("stage")
    assert summary["status"].to_dict() == status
    assert summary["epoch_seconds"].notna().to_dict() == {
        stage: said == "ok" for stage, said in status.items()
    }
    # wrong numbers take as long as right ones
    assert set(pd.read_csv(tables / "hotspots.csv")["stage"]) == {"gemm", "nowhere"}
    for figure in settings["figures"]:
        picture = checkout.folder / f"results/figures/{figure}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
