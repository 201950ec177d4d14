"""The poster: one A1 page of vectors, with the stages and the result, the same bytes each time."""

import re
import zlib
from pathlib import Path

import pandas as pd
import pytest

from cnnlib.errors import UserError
from tests.workflow.conftest import ROOT
from workflow import poster

REFERENCE = ROOT / "results/reference/nvidia-h100"
FIGURES = sorted((REFERENCE / "figures").glob("*.svg"))
SUMMARY = pd.read_csv(REFERENCE / "tables/summary.csv")
A1 = 594 / 25.4 * 72, 841 / 25.4 * 72


def render(figures: list[Path] = FIGURES) -> str:
    return poster.render(figures, REFERENCE / "tables/ladder.md", SUMMARY)


def test_it_says_what_was_found() -> None:
    html = render()
    best = SUMMARY.loc[SUMMARY["speedup"].idxmax()]
    assert f"{best['stage']} trains LeNet-5" in html
    assert f"at batch {best['batch_size']}" in html
    for stage in SUMMARY["stage"].unique():
        assert f"{stage}</td>" in html
    assert re.findall(r'<img alt="(\w+)"', html) == list(poster.WANTED[: poster.COUNT])


def test_a_missing_figure_leaves_no_hole() -> None:
    html = render([path for path in FIGURES if path.stem not in ("speedup", "memory")])
    shown = re.findall(r'<img alt="(\w+)"', html)
    assert len(shown) == poster.COUNT
    assert not {"speedup", "memory"} & set(shown)
    assert render([]).count("<img") == 0


def test_host_built_kernels_are_no_result() -> None:
    assert poster.result(SUMMARY.assign(device_kind="host")) == "No speedup was measured."


def test_without_a_browser_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt-get install chromium"):
        poster.find_browser()


def test_one_page_of_vectors(tmp_path: Path) -> None:
    try:
        poster.find_browser()
    except UserError as error:
        pytest.skip(str(error))
    html = render()
    for name in ("one", "two"):
        poster.print_page(html, tmp_path / name)
    pdf = (tmp_path / "one").read_bytes()
    assert pdf == (tmp_path / "two").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1
    (box,) = re.findall(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert [float(side) for side in box] == pytest.approx(A1, abs=1)
    # fonts are in it, and no figure is a photograph of itself
    assert b"/FontFile" in pdf
    pictures = re.findall(rb"/Width (\d+)\s*/Height (\d+)", pdf)
    assert all(int(width) < 400 and int(height) < 400 for width, height in pictures)
    drawn = b""
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            drawn += zlib.decompress(stream)
        except zlib.error:
            continue
    assert drawn.count(b" c\n") > 1000, "there are few curves for so many figures"
