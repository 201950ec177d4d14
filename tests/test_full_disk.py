"""The disk is full at each single call by which results are written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cnnlib.device.compiler import find_compiler
from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from tests.support.toys import toy_config, toy_data, write_config

TABLES = [f"{name}.csv" for name in schema.RUN_TABLES]

RUN = "--dataset toy --network small --stage gemm --batch-size 8 --data toy.npz"
COMMANDS = {
    "run": f"measure {RUN} --out out",
    "raw table": "combine --table epochs --out out/epochs.csv run/epochs.csv",
    "table": "workflow.glue.tabulate summary --tables run/epochs.csv run/steps.csv"
    " --csv out/summary.csv --markdown out/summary.md",
    "data": "prepare --dataset toy --folder . --out out/toy.npz",
    "weights": f"train {RUN} --epochs 1 --out out/w.npz --checkpoint out/c.npz",
}
WRITTEN = {
    "run": [*TABLES, "run.json"],
    "raw table": ["epochs.csv"],
    "table": ["summary.csv", "summary.md"],
    "data": ["toy.npz"],
    "weights": ["w.npz", "c.npz"],
}


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail."""
    made = tmp_path_factory.mktemp("faults") / "faults.so"
    options = ["-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE", "-o", str(made)]
    source = str(ROOT / "tests/support/faults.cpp")
    subprocess.run([*find_compiler().command, *options, source, "-ldl"], check=True)
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a config and a measured run."""
    folder = tmp_path_factory.mktemp("home")
    write_config(folder / "config.yaml", toy_config())
    toy_data(folder)
    in_folder(folder, "cnnlib", *COMMANDS["run"].split())
    (folder / "out").rename(folder / "run")
    return folder


def in_folder(folder: Path, module: str, *arguments: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        check=True,
        text=True,
        timeout=300,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    ).stdout


@pytest.mark.parametrize(
    ("what", "older"),
    [("run", True), ("raw table", True), ("table", True), ("data", False), ("weights", False)],
)
def test_a_disk_that_is_full_at_any_call(home: Path, preload: Path, what: str, older: bool) -> None:
    written = WRITTEN[what]
    shutil.rmtree(home / "out", ignore_errors=True)
    old = {name: f"older {name}" for name in written if older}
    for name, content in old.items():
        (home / "out").mkdir(exist_ok=True)
        (home / "out" / name).write_text(content)
    output = in_folder(
        home, "tests.support.faults", "out", *COMMANDS[what].split(), LD_PRELOAD=str(preload)
    )
    *failed, whole = (
        json.loads(line) for line in output.splitlines() if line.startswith('{"failed"')
    )
    assert whole["failed"] == ""
    assert (whole["code"], set(whole["left"])) == (0, set(written))
    hit = [attempt["failed"] for attempt in failed]
    # A file is created, opened again, written, flushed to the disk and renamed.
    assert {"open", "write", "fsync", "close", "rename"} <= set(hit)
    assert ("mkdir" in hit) == (not older)
    assert min(hit.count(call) for call in ("write", "fsync", "rename")) >= len(written)
    for number, attempt in enumerate(failed):
        print(number, attempt["failed"], attempt["said"])
        check(attempt, old, whole["left"], home)


def check(attempt: dict[str, Any], old: dict[str, str], whole: dict[str, str], home: Path) -> None:
    """One line names a file, and each file is the old one, the new one, or missing."""
    assert attempt["code"] == 2
    (line,) = attempt["said"].splitlines()
    names = [name for name in whole if line.startswith(f"error: cannot write out/{name}: ")]
    assert len(names) == 1, line
    assert line.endswith("No space left on device")
    left = attempt["left"]
    assert set(left) <= set(whole)
    for name, content in left.items():
        assert content == old.get(name) or same(name, content, whole[name]), f"half of {name}"
    if "run.json" in whole:
        # Where run.json exists, all tables beside it belong to it.
        assert left.get("run.json") is None or left == old
    else:
        assert set(old) <= set(left), "the older file is lost"
        assert names[0] not in left or left[names[0]] == old.get(names[0])


def same(name: str, content: str, whole: str) -> bool:
    """Whether two files have the same content, apart from the times in an archive."""
    return len(content) == len(whole) if name.endswith(".npz") else content == whole
