"""Commands that fetch and convert data sets and combine tables."""

import os
import re
from pathlib import Path

import pytest
import yaml

from cnnlib.measuring.record import run_files
from tests.support import formats
from tests.support.command_line import (
    MEASURE,
    Home,
    changed,
)

pytestmark = pytest.mark.quick


def test_prepare_makes_what_measure_reads(home: Home) -> None:
    home("download", "--dataset", "toy", "--folder", "files")
    home("prepare", "--dataset", "toy", "--folder", "files", "--out", "again/toy.npz")
    assert (home.folder / "again/toy.npz").read_bytes() == (home.folder / "toy.npz").read_bytes()
    said = home(*changed(MEASURE, "--data", "again/toy.npz"))
    assert re.fullmatch(
        r"gemm, batch 8: ok, \S+ s an epoch, test accuracy \d+\.\d\d %, on .*\n", said
    )
    assert sorted(os.listdir("run")) == sorted(path.name for path in run_files(Path()))


def test_combine(home: Home) -> None:
    for repeat in ("1", "2"):
        home(*changed(changed(MEASURE, "--repeat", repeat), "--out", f"r{repeat}"))
    said = home("combine", "--table", "steps", "--out", "t/all.csv", "r1/steps.csv", "r2/steps.csv")
    assert said == "t/all.csv: 6 rows of 2 files\n"
    whole = (home.folder / "t/all.csv").read_text().splitlines()
    parts = [(home.folder / f"r{r}/steps.csv").read_text().splitlines() for r in (1, 2)]
    assert whole == parts[0] + parts[1][1:]
    (home.folder / "list").write_text("r1/steps.csv\n\nr2/steps.csv\n")
    home("combine", "--table", "steps", "--out", "listed.csv", "--list", "list")
    assert (home.folder / "listed.csv").read_text().splitlines() == whole
    (home.folder / "list").write_text("")
    home("combine", "--table", "steps", "--out", "none.csv", "--list", "list")
    assert (home.folder / "none.csv").read_text().splitlines() == whole[:1]


def test_combine_refuses(home: Home) -> None:
    home(*MEASURE)
    combine = ("combine", "--table", "epochs", "--out", "all.csv")
    assert "unknown table 'epoch' in --table; known: epochs" in home.fails(
        *changed(combine, "--table", "epoch"), "run/epochs.csv"
    )
    assert "no epochs files" in home.fails(*combine)
    assert "not a epochs table" in home.fails(*combine, "run/steps.csv")
    assert "cannot read nothing.csv" in home.fails(*combine, "run/epochs.csv", "nothing.csv")
    assert "both hold the run" in home.fails(*combine, "run/epochs.csv", "run/epochs.csv")
    assert "cannot read nolist" in home.fails(*combine, "--list", "nolist")
    (home.folder / "binary").write_bytes(b"\xff\xfe")
    assert "binary is not a list" in home.fails(*combine, "--list", "binary")
    (home.folder / "cut.csv").write_bytes((home.folder / "run/epochs.csv").read_bytes()[:-9])
    assert "cut.csv" in home.fails(*combine, "cut.csv")
    assert not (home.folder / "all.csv").exists()


def test_the_command_prints_what_can_be_pasted(home: Home) -> None:
    formats.pictures(home.folder / "birds")
    text = home("checksum", "birds", "--name", "birds")
    assert re.match(r"datasets:\n  birds:\n    kind: folder\n", text)
    settings = yaml.safe_load(text)["datasets"]["birds"]
    config = yaml.safe_load((home.folder / "config.yaml").read_text())
    config["datasets"]["birds"] = settings
    (home.folder / "config.yaml").write_text(yaml.safe_dump(config))
    home("download", "--dataset", "birds", "--folder", "raw")
    home("prepare", "--dataset", "birds", "--folder", "raw", "--out", "birds.npz")
    (home.folder / "birds/train/cat/001.png").write_bytes(b"x")
    said = home.fails("checksum", "birds")
    assert "birds/train/cat/001.png is no picture" in said
    assert "--name" in home.fails("checksum", "birds", "--name", "")
