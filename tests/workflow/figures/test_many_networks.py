"""Figures of many networks, and of things with long names: nothing overlaps, nothing runs off."""

import itertools
import time

import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from workflow.glue import modules
from workflow.plotting import draw, layout, wording

TABLES = ROOT / "results/reference/nvidia-h100/tables"
PANELS = ("speedup", "latency", "learning", "push_pull")
"""Figures with a panel for each network."""
MOST_PANELS = pytest.param(32, "latency", marks=pytest.mark.slow(10))
"""The figure with two panels for each network; all are laid out by the same code."""
FIRST = ("energy", "filters", "memory", "parting", "profile", "roofline", "transfers", "discern")
"""Figures that show the first network alone."""
STAGES = ("naive", "gemm", "fused", "tuned")
PEERS = (*STAGES, "torch", "torch_compile_tf32", "jax_tf32")
LONG = (
    "a_network_whose_name_says_what_its_layers_are_conv6x5_mean2_conv16x5_mean2_dense120_dense84_10"
)
SECONDS = ("epoch_seconds", "step_seconds", "kernel_seconds", "train_seconds")


def published(name: str, stages: tuple[str, ...] = STAGES) -> dict[str, pd.DataFrame]:
    """The tables of a figure as published, of a few stages and batch sizes."""
    found = {}
    for table in modules.tables_read("figures", name):
        (rows,) = modules.read_tables([schema.find(TABLES, table)]).values()
        if "stage" in rows and table not in ("probes", "features"):
            rows = rows[rows["stage"].isin(stages) & rows["batch_size"].isin((16, 64, 1024))]
        found[table] = rows
    return found


def drawing(
    name: str,
    tables: dict[str, pd.DataFrame],
    networks: list[str],
    sheet: layout.Sheet = layout.OWN_PAGE,
) -> layout.Drawing:
    """The figure of these networks, each a little slower than the one before."""
    for table, rows in tables.items():
        if "network" in rows:
            parts = []
            for number, network in enumerate(networks):
                part = rows.assign(network=network)
                for column in {*SECONDS} & {*part}:
                    part[column] *= 1.1**number
                parts.append(part)
            tables[table] = pd.concat(parts, ignore_index=True)
    return draw.draw(name, tables, sheet)


def drawn(name: str, tables: dict[str, pd.DataFrame], networks: list[str]) -> Figure:
    """The figure without the words that it was given."""
    return drawing(name, tables, networks).figure


def boxes(figure: Figure) -> list[Bbox]:
    """The boxes of all panels with their words, and of the texts around them."""
    figure.draw_without_rendering()
    found = [box for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
    return found + [text.get_window_extent() for text in figure.texts if text.get_text()]


def check(figure: Figure) -> None:
    """Nothing overlaps or leaves the figure; panels are large enough to be read."""
    width, height = figure.get_size_inches() * figure.dpi
    found = boxes(figure)
    pyplot.close(figure)
    for box in found:
        assert box.x0 > -1
        assert box.y0 > -1
        assert box.x1 < width + 1
        assert box.y1 < height + 1
    for one, other in itertools.combinations(found, 2):
        apart = max(one.x0 - other.x1, other.x0 - one.x1, one.y0 - other.y1, other.y0 - one.y1)
        assert apart > -2, (one, other)
    for axes in figure.axes:
        inside = axes.get_window_extent()
        assert inside.width > 1.4 * figure.dpi
        assert inside.height > 0.6 * figure.dpi


@pytest.mark.parametrize(
    ("count", "name"),
    [*((count, name) for count in (3, 12) for name in PANELS), MOST_PANELS],
)
def test_many_networks(count: int, name: str) -> None:
    began = time.process_time()
    figure = drawn(name, published(name), [f"network_{number}" for number in range(count)])
    spent = time.process_time() - began
    width, height = figure.get_size_inches()
    assert width < 17
    assert height < 3 + 4 * count
    assert spent < 60
    titles = " ".join(axes.get_title(loc="left") for axes in figure.axes)
    assert all(f"network_{number} on MNIST" in titles for number in range(count))
    check(figure)


@pytest.mark.parametrize("name", PANELS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_long_names_and_many_lines(name: str, count: int) -> None:
    tables = published(name, PEERS)
    for rows in tables.values():
        rows["dataset"] = "a-data-set-with-a-name-as-long-as-this"
        rows["device"] += " with a name that goes on and on, as names of machines sometimes do"
    figure = drawn(name, tables, [f"{LONG}{number}" for number in range(count)])
    titles = "".join(axes.get_title(loc="left") for axes in figure.axes)
    assert LONG in titles.replace("\n", "")
    check(figure)


@pytest.mark.parametrize("name", FIRST)
def test_figures_of_one_network_say_so(name: str) -> None:
    tables = published(name)
    first = drawing(name, tables, [LONG, "other", "third"])
    figure, subtitle = first.figure, first.headline.subtitle
    assert f"{LONG} on MNIST (the first of 3 networks and data sets measured)" in subtitle
    width, _ = figure.get_size_inches() * figure.dpi
    for text in figure.texts:
        assert text.get_window_extent().x1 < width
    pyplot.close(figure)
    alone = drawing(name, published(name), [LONG])
    assert "the first of" not in alone.headline.subtitle
    pyplot.close(alone.figure)


@pytest.mark.parametrize("name", PANELS)
def test_a_sheet_shows_the_first_network_alone(name: str) -> None:
    place = layout.Sheet((7.3, 3.2))
    names = ["network_0"], [f"network_{number}" for number in range(8)]
    one, many = (drawing(name, published(name), each, place).figure for each in names)
    assert len(many.axes) == len(one.axes)
    assert list(many.get_size_inches()) == [7.3, 3.2]
    pyplot.close(one)
    pyplot.close(many)


@pytest.mark.parametrize(
    ("text", "inches", "lines"),
    [
        ("three short words", 9.0, ["three short words"]),
        ("three short words", 0.9, ["three short", "words"]),
        ("a line\nand another", 9.0, ["a line", "and another"]),
        ("name_with-parts/in_it", 0.95, ["name_with-", "parts/in_it"]),
        ("", 1.0, [""]),
    ],
)
def test_lines_are_broken_at_seams(text: str, inches: float, lines: list[str]) -> None:
    assert layout.wrapped(text, inches, 11).split("\n") == lines


def test_a_word_without_any_seam_is_broken_all_the_same() -> None:
    lines = layout.wrapped("x" * 100, 2.0, 11).split("\n")
    assert "".join(lines) == "x" * 100
    assert max(map(len, lines)) < 40


def test_many_lines_above_make_a_figure_higher() -> None:
    few = layout.nothing(layout.OWN_PAGE, "title", "subtitle").figure
    many = layout.nothing(layout.OWN_PAGE, "title " * 80, "subtitle " * 120).figure
    assert many.get_size_inches()[1] > few.get_size_inches()[1] + 1
    check(many)
    pyplot.close(few)


def test_brief_names_keep_their_ends() -> None:
    assert wording.brief("short") == "short"
    assert wording.brief("NVIDIA H100 80GB HBM3, the third of four", 20) == "NVIDIA H100 8…f four"
    assert len(wording.brief("x" * 99, 20)) == 20
