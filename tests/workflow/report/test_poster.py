"""The poster: one A1 page of vectors, with the stages and the result, the same bytes each time."""

import json
import re
import zlib
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cnnlib import stages
from cnnlib.errors import UserError
from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from cnnlib.peers import PEERS
from workflow.glue import modules
from workflow.glue.experiment import Experiment
from workflow.report import poster
from workflow.report.browser import find_browser, run, scratch

REFERENCE = ROOT / "results/reference/nvidia-h100"
EXPERIMENT = Experiment(yaml.safe_load((ROOT / "config.yaml").read_text()))
FIGURES = EXPERIMENT.poster_figures
SUMMARY = pd.read_csv(REFERENCE / "tables/summary.csv")
A1 = 594 / 25.4 * 72, 841 / 25.4 * 72
LEGIBLE = 13.0
"""The least size of a figure's type in points: at arm's length it reads like 8 in the hand."""
# The scale of each picture, written into the page's title.
SCALES = """<script>addEventListener("load", () => { document.title = JSON.stringify(
  [...document.images].map(i => Math.min(i.clientWidth / i.naturalWidth,
                                         i.clientHeight / i.naturalHeight)))});</script>"""


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    names = {Path(path).stem for path in EXPERIMENT.poster_tables}
    return modules.read_tables(schema.find(REFERENCE / "tables", name) for name in sorted(names))


@pytest.fixture(scope="module")
def html(tables: dict[str, pd.DataFrame]) -> str:
    return poster.render(FIGURES, tables, REFERENCE / "tables/ladder.md")


def browser() -> str:
    try:
        return find_browser()
    except UserError as error:
        pytest.skip(str(error))


def test_it_says_what_was_found(html: str) -> None:
    best = SUMMARY.loc[SUMMARY["speedup"].idxmax()]
    assert f"{best['stage']} trains LeNet-5" in html
    assert f"at batch {best['batch_size']}" in html
    for stage in stages.LADDER:
        assert f"{stage.title}</td>" in html
    for peer in PEERS:
        assert f"{peer.title}</td>" not in html
    assert re.findall(r'<img alt="(\w+)"', html) == FIGURES
    assert html.count("<h2>") == len(FIGURES)
    assert "batch 64" in html.partition("<h2>")[2].partition("<img")[0]


def test_a_figure_that_is_not_wanted_leaves_no_hole() -> None:
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    left_out = ("speedup", "memory", "race")  # there is no race in config.yaml
    names = [name for name in modules.names("figures") if name not in left_out]
    shown = Experiment({**config, "figures": names}).poster_figures
    assert len(shown) == len(FIGURES)
    assert not {"speedup", "memory"} & set(shown)


def test_without_figures_there_is_a_page(tables: dict[str, pd.DataFrame]) -> None:
    assert "<img" not in poster.render([], tables, REFERENCE / "tables/ladder.md")


def test_figures_are_legible_at_arms_length(html: str) -> None:
    with scratch(browser()) as folder:
        (folder / "poster.html").write_text(html.replace("<head>", "<head>" + SCALES))
        shown = ["--virtual-time-budget=20000", "--dump-dom", (folder / "poster.html").as_uri()]
        out, errors = run(browser(), folder, shown)
    found = re.search(r"<title>(\[.*\])</title>", out)
    assert found, out[-500:] + errors[-500:]
    scales = json.loads(found[1])
    assert len(scales) == len(FIGURES)
    # 10 points is what axes are labelled with
    assert min(scales) * 10 >= LEGIBLE, dict(zip(FIGURES, scales, strict=True))


def test_peers_of_the_same_precision_are_beside_the_result() -> None:
    assert "PyTorch and JAX take 6.1× to 8.9× as long" in poster.result(SUMMARY)
    coarse = [peer.name for peer in PEERS if peer.rounding]
    alone = SUMMARY[~SUMMARY["stage"].isin([peer.name for peer in PEERS])]
    assert "PyTorch" not in poster.result(alone)
    assert "PyTorch" not in poster.result(
        pd.concat([alone, SUMMARY[SUMMARY["stage"].isin(coarse)]])
    )


def test_emulated_kernels_are_no_result() -> None:
    assert poster.result(SUMMARY.assign(device_kind="emulated")) == "No speedup was measured."


def test_without_a_browser_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt-get install chromium"):
        find_browser()


def test_one_page_of_vectors(html: str, tmp_path: Path) -> None:
    browser()
    for name in ("one", "two"):
        poster.print_page(html, tmp_path / name)
    pdf = (tmp_path / "one").read_bytes()
    assert pdf == (tmp_path / "two").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1
    (box,) = re.findall(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert [float(side) for side in box] == pytest.approx(A1, abs=1)
    # fonts are embedded, and no figure is a bitmap
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
