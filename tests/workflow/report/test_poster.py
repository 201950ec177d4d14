"""The poster: one A1 page of vectors, with the stages and the result, the same bytes each time."""

import base64
import itertools
import json
import re
import zlib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from matplotlib import pyplot

from cnnlib import stages
from cnnlib.errors import UserError
from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from cnnlib.peers import PEERS
from workflow.glue import modules
from workflow.glue.experiment import Experiment
from workflow.plotting import draw, layout, wording
from workflow.plotting.ladder import own_rows
from workflow.report import poster
from workflow.report.browser import find_browser, run, scratch

REFERENCE = ROOT / "results/reference/nvidia-h100"
EXPERIMENT = Experiment(
    yaml.safe_load((ROOT / "config.yaml").read_text())
    | {"results": str(REFERENCE), "address": "https://example.org/a?b=c&d"}
)
ADDRESS = str(EXPERIMENT.config.address)
FIGURES = EXPERIMENT.poster_figures
(LADDER,) = modules.read_tables([REFERENCE / "tables/ladder.csv"]).values()
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
    return poster.render(FIGURES, tables, ADDRESS)


def browser() -> str:
    try:
        return find_browser()
    except UserError as error:
        pytest.skip(str(error))


def test_it_says_what_was_found(html: str) -> None:
    assert FIGURES == ["speedup", "discern", "race", "profile", "roofline", "memory"]
    best = LADDER[(LADDER["stage"] == "tuned") & (LADDER["batch_size"] == 64)].iloc[0]
    assert f"tuned trains an epoch of LeNet-5 in {best['epoch_seconds'] * 1e3:.1f} ms" in html
    for stage in stages.LADDER:
        assert f"<td>{stage.title}</td><td>" in html
        assert poster.WHY[stage.name] in html
    # the best library in float32 and in TF32, and no others
    known = [peer.title for peer in PEERS if f"<td>{peer.title}</td>" in html]
    at = LADDER[LADDER["batch_size"] == 64].set_index("stage")["epoch_seconds"]
    exact, rounded = (
        at.reindex([peer.name for peer in PEERS if (peer.rounding is None) == kind]).idxmin()
        for kind in (True, False)
    )
    assert set(known) == {wording.title(exact), wording.title(rounded)}
    assert re.findall(r'<img alt="(\w+)"', html) == FIGURES
    assert html.count("<h2>") == len(FIGURES)
    # the devices are said once on the page
    assert html.count("NVIDIA H100") == 1


def test_its_address_is_there_as_text_and_as_a_code(html: str) -> None:
    assert "https://example.org/a?b=c&amp;d</p>" in html
    (code,) = re.findall(r'QR code of the address" src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert base64.b64decode(code).startswith(b"<?xml")
    assert code == poster.qr_code(ADDRESS)
    assert code != poster.qr_code(ADDRESS + "e")
    assert poster.qr_code("") == ""


def test_without_an_address_there_is_no_code(tables: dict[str, pd.DataFrame]) -> None:
    assert "QR code" not in poster.render([], tables)


def test_a_figure_that_is_not_wanted_leaves_no_hole() -> None:
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    left_out = ("speedup", "memory", "race")
    names = [name for name in modules.names("figures") if name not in left_out]
    shown = Experiment({**config, "figures": names}).poster_figures
    assert len(shown) == len(FIGURES)
    assert not {"speedup", "memory"} & set(shown)


def test_without_figures_there_is_a_page(tables: dict[str, pd.DataFrame]) -> None:
    assert "<img" not in poster.render([], tables)


def test_figures_are_legible_at_arms_length(html: str) -> None:
    with scratch(browser()) as folder:
        (folder / "poster.html").write_text(html.replace("<head>", "<head>" + SCALES))
        shown = ["--virtual-time-budget=20000", "--dump-dom", (folder / "poster.html").as_uri()]
        out, errors = run(browser(), folder, shown)
    found = re.search(r"<title>(\[.*\])</title>", out)
    assert found, out[-500:] + errors[-500:]
    scales = json.loads(found[1])
    assert len(scales) == len(FIGURES) + 1  # the code of the address
    # 10 points is what axes are labelled with
    assert min(scales[:-1]) * 10 >= LEGIBLE, dict(zip(FIGURES, scales, strict=False))


def test_words_of_a_small_figure_do_not_overlap(tables: dict[str, pd.DataFrame]) -> None:
    width, height = (side / 25.4 / poster.LARGER for side in poster.PLACE_MM)
    sheet = layout.Sheet((width, height))
    for name in ("profile", "roofline", "memory"):
        own = {each: tables[each] for each in modules.tables_read("figures", name)}
        if name not in poster.WITH_LIBRARIES:
            own = {name: own_rows(rows) if "stage" in rows else rows for name, rows in own.items()}
        figure = draw.draw(name, own, sheet).figure
        figure.draw_without_rendering()
        width, height = figure.bbox.width, figure.bbox.height
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 > -1
            assert box.x1 < width + 1
        for axes in figure.axes:
            for text in axes.texts:
                assert text.get_window_extent().x1 < width + 1, text
            inside = axes.get_window_extent()
            words = [each for each in axes.get_yticklabels() if each.get_text()]
            places = [word.get_window_extent() for word in words]
            places = [box for box in places if inside.y0 <= box.y0 and box.y1 <= inside.y1]
            for one, other in itertools.combinations(places, 2):
                assert not one.overlaps(other), (name, one, other)
            marks = [
                axes.transData.transform(point)
                for each in axes.collections
                for point in each.get_offsets()
            ]
            for name_of_part in (text for text in axes.texts if text.get_rotation() == 90):
                box = name_of_part.get_window_extent()
                assert not any(box.contains(*point) for point in marks), name_of_part
            assert 0 < inside.height < height
        pyplot.close(figure)


def test_the_best_library_is_beside_the_result() -> None:
    own = LADDER[(LADDER["stage"] == "tuned") & (LADDER["batch_size"] == 64)].iloc[0]
    best = f"{wording.times(own['library_ratio'])} as fast as {wording.said(own['library'])}"
    assert f"{best}, the best library" in poster.result(LADDER)
    alone = LADDER[~LADDER["stage"].isin([peer.name for peer in PEERS])]
    assert "the best library" not in poster.result(
        alone.assign(library="", library_ratio=float("nan"))
    )


def test_emulated_kernels_are_no_result() -> None:
    assert poster.result(LADDER.assign(device_kind="emulated")) == "No stage was measured."


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
