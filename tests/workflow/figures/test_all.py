"""Every figure copes with tables that hold nothing, and says so."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib import pyplot

from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from tests.workflow.conftest import digest
from workflow.glue import modules
from workflow.plotting import layout, style

REFERENCE = ROOT / "results/reference/nvidia-h100"

RAW = [
    name
    for name in modules.names("figures")
    if set(modules.tables_read("figures", name)) <= set(schema.TABLES)
]


@pytest.mark.parametrize("name", RAW)
def test_without_rows_it_is_said(name: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{table}.csv" for table in modules.tables_read("figures", name)]
    for path in paths:
        schema.write(path, path.stem, [])
    style.apply()
    figure = modules.load("figures", name).draw(modules.read_tables(paths), layout.OWN_PAGE).figure
    texts = [text.get_text() for text in figure.texts]
    pyplot.close(figure)
    assert len(texts[0]) > 10
    assert not any("nan" in text for text in texts)
    assert not any(axes.has_data() for axes in figure.axes)


@pytest.mark.parametrize("name", modules.names("figures"))
def test_its_caption_says_what_to_see(name: str) -> None:
    caption = modules.docstring("figures", name)
    assert len(caption.split()) > 25
    assert caption.splitlines()[0].endswith(".")


def test_the_last_bits_of_a_layout_do_not_matter() -> None:
    def places(nudge: float) -> list[list[float]]:
        style.apply()
        figure, _ = pyplot.subplots(2, 2, layout="constrained")
        figure.get_layout_engine().set(rect=(0.1 + nudge, 0.1, 0.8, 0.8))
        layout.settle(figure)
        figure.draw_without_rendering()
        pyplot.close(figure)
        return [list(axes.get_position().extents) for axes in figure.axes]

    assert places(0) == places(3e-15)
    assert places(0) != places(1e-3)


@pytest.mark.parametrize("width", [12.0, 4.0, 2.0])
def test_numbers_of_an_axis_do_not_run_into_each_other(width: float) -> None:
    sizes = [2**power for power in range(4, 15)]
    style.apply()
    figure, axes = pyplot.subplots(figsize=(width, 3), layout="constrained")
    axes.plot(sizes, sizes)
    style.batch_axis(axes, sizes)
    layout.settle(figure)
    texts = [label.get_text() for label in axes.get_xticklabels()]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    pyplot.close(figure)
    assert texts[-1] == str(sizes[-1])
    assert (len(texts) == len(sizes)) == (width == 12)
    assert all(box.x1 < later.x0 for box, later in pairwise(boxes))


def test_figures_for_a_sheet_have_its_size_and_no_words() -> None:
    style.apply()
    small, large = (
        layout.nothing(sheet, "A title", "A reason")
        for sheet in (layout.Sheet((5.0, 3.0)), layout.OWN_PAGE)
    )
    for drawing in (small, large):
        assert drawing.headline.title == "A title"
        pyplot.close(drawing.figure)
    assert list(small.figure.get_size_inches()) == [5.0, 3.0]
    assert not small.figure.texts
    assert large.figure.texts


MATPLOTLIBRC = "savefig.bbox: tight\nfont.size: 20\nsvg.fonttype: none\naxes.titlesize: 30\n"


@pytest.mark.parametrize(
    "surroundings",
    [
        {"MPLCONFIGDIR": "here"},
        {"NPY_DISABLE_CPU_FEATURES": "X86_V3"},
        {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "12345"},
    ],
    ids=lambda surroundings: next(iter(surroundings)),
)
def test_where_it_is_drawn_does_not_matter(tmp_path: Path, surroundings: dict[str, str]) -> None:
    (tmp_path / "matplotlibrc").write_text(MATPLOTLIBRC)
    if "MPLCONFIGDIR" in surroundings:
        surroundings = {"MPLCONFIGDIR": str(tmp_path)}
    files = [tmp_path / "filters.png", tmp_path / "filters.svg"]
    command = [sys.executable, "-m", "workflow.plotting.draw", "filters"]
    command += ["--tables", str(REFERENCE / "tables/features.csv"), "--out", *map(str, files)]
    subprocess.run(command, cwd=ROOT, env=os.environ | surroundings, check=True, timeout=60)
    for file in files:
        assert digest(file) == digest(REFERENCE / "figures" / file.name), file.name
