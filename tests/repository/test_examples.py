"""The examples run as they are; the notebook is one for Jupyter, and each of its cells runs."""

import re
import runpy
import warnings
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pytest

import cnnlib
from cnnlib.paths import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "notebook.py"
COURSE = sorted(EXAMPLES.glob("course/*.py"))
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path != NOTEBOOK)

SAID = {
    "quickstart": ["accuracy 1.000", "the loaded network's accuracy 1.000"],
    "own_data": ["validation accuracy 0.9", "ConfigError: images have shape (600, 16, 16, 3)"],
    "compare_stages": ["gemm on ", "fused on ", "parameters: "],
    "pytorch": ["logits"],
}
"""Script -> what it prints, among others."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the examples, which may write files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_example_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for words in SAID[script.stem]:
        assert words in printed


def run_cells(path: Path) -> int:
    """Run a notebook cell by cell; returns the number of its figures."""
    notebook = jupytext.read(path)
    assert notebook.metadata.kernelspec.language == "python"
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert kinds.count("code") > 4
    names: dict[str, object] = {"__name__": "__main__"}
    plt.close("all")
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), names)
    figures = len(plt.get_fignums())
    plt.close("all")
    return figures


def test_the_notebook_runs_cell_by_cell(folder: Path) -> None:
    assert run_cells(NOTEBOOK) == 4
    assert [path.name for path in folder.iterdir()] == ["rings.safetensors"]


LED = {
    "naive_to_gemm": (2, ["times as fast", "weights: "]),
    "on_a_gpu": (1, ["gemm_cuda  loss", "fused      loss", "ring       loss", "tuned      loss"]),
}
"""Notebook of the course -> its figures, and what it prints, among others."""


@pytest.mark.slow
@pytest.mark.parametrize("notebook", COURSE, ids=lambda path: path.stem)
def test_the_courses_notebooks_run(
    notebook: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNLIB_OPTIMIZE", "1")
    figures, words = LED[notebook.stem]
    assert run_cells(notebook) == figures
    printed = capsys.readouterr().out
    for each in words:
        assert each in printed
    if "NO GPU" in printed:
        assert "ms an epoch" not in printed
        losses = re.findall(r"loss (\d\.\d{4})", printed)
        assert len(losses) == 4
        assert len(set(losses)) == 1


def test_the_lines_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"(?ms)^```python\n(.*?)^```", readme)
    assert len(lines.splitlines()) <= 10
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (128, 28, 28), dtype=np.uint8)
    labels = random.integers(0, 10, 128)
    given = {"cnnlib": cnnlib, "images": images, "labels": labels}
    given |= {"test_images": images, "test_labels": labels}
    exec(compile(lines, "README.md", "exec"), given)
    *epochs, accuracy = capsys.readouterr().out.splitlines()
    assert len(epochs) == 2
    assert 0 <= float(accuracy) <= 1


def test_every_example_is_on_the_page_of_the_library() -> None:
    page = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    for script in [*SCRIPTS, NOTEBOOK]:
        assert f"examples/{script.name}" in page
