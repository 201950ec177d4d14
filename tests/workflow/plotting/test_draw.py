"""The programs that draw and tabulate: in any environment, and when they fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnnlib.errors import UserError
from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from tests.workflow.conftest import digest
from workflow.glue import modules, tabulate
from workflow.plotting import draw, layout

TABLES = ROOT / "results/reference/nvidia-h100/tables"
FIGURES = TABLES.parent / "figures"
PUSH_PULL = [TABLES / "kernels.csv", TABLES / "epochs.csv"]


@pytest.mark.parametrize(
    "backend",
    ["module://matplotlib_inline.backend_inline", "module://no.such.module", "tkagg", "x"],
)
def test_the_environments_backend_does_not_matter(tmp_path: Path, backend: str) -> None:
    """Notebooks set MPLBACKEND for the programs that they start, installed here or not."""
    out = tmp_path / "push_pull.png"
    command = ["workflow.plotting.draw", "push_pull", "--tables", *PUSH_PULL, "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": backend},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert digest(out) == digest(FIGURES / "push_pull.png")


@pytest.mark.parametrize("wrong", ["drawing", "the second file"])
def test_a_figure_that_fails_leaves_both_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    files = [tmp_path / "old.png", tmp_path / "old.svg"]
    for file in files:
        file.write_text("old")

    def fail(*arguments: object, **options: object) -> None:
        raise UserError("no")

    if wrong == "drawing":
        monkeypatch.setattr(layout, "settle", fail)
    else:
        monkeypatch.setattr("matplotlib.backends.backend_svg.FigureCanvasSVG.print_svg", fail)
    tables = ["--tables", *map(str, PUSH_PULL)]
    monkeypatch.setattr(sys, "argv", ["draw", "push_pull", *tables, "--out", *map(str, files)])
    with pytest.raises(UserError, match="no"):
        draw.main()
    assert [file.read_text() for file in files] == ["old", "old"]
    assert sorted(tmp_path.iterdir()) == files


def test_a_table_that_fails_leaves_both_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "old.csv", tmp_path / "old.md"]
    for file in files:
        file.write_text("old")
    module = modules.load("tables", "ladder")
    monkeypatch.setattr(module, "markdown", lambda frame: 1 / 0)
    monkeypatch.setattr(modules, "load", lambda *name: module)
    options = ["--csv", str(files[0]), "--markdown", str(files[1])]
    read = [schema.find(TABLES, name) for name in module.TABLES]
    tables = ["--tables", *map(str, read)]
    monkeypatch.setattr(sys, "argv", ["tabulate", "ladder", *tables, *options])
    with pytest.raises(ZeroDivisionError):
        tabulate.main()
    assert [file.read_text() for file in files] == ["old", "old"]
