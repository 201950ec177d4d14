"""A stage without a result: figures and tables say why, below what they show."""

import math
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import yaml
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text

from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from tests.workflow.conftest import Checkout
from workflow.glue import modules
from workflow.plotting import draw, layout, reasons, wording

Tables = dict[str, pd.DataFrame]

PUBLISHED = ROOT / "results/reference/nvidia-h100/tables"
RAW = [
    "predictions",
    "energy",
    "epochs",
    "features",
    "kernels",
    "learning",
    "pictures",
    "probes",
    "race",
    "samples",
    "steps",
    "transfers",
]
GONE = "tuned"
REASON = (
    "stage 'tuned' cannot take conv2+activation2+subsample1 of network 'lenet5': the gradient of "
    "its 18,496 weights is summed in registers, 96 of each of 256 threads, and a thread has room "
    "for 64; use stage 'ring'"
)
SAYING = [
    "discern",
    "discern_images",
    "energy",
    "latency",
    "learning",
    "memory",
    "parting",
    "profile",
    "race",
    "roofline",
    "speedup",
    "transfers",
]
"""Figures of stages; push_pull is of stage fused alone."""
UNTIMED = {
    "epochs": ("epoch_seconds", "event_seconds", "loss", "test_accuracy"),
    "race": ("train_seconds", "loss", "test_accuracy"),
    "transfers": ("epoch_seconds", "gather_seconds", "upload_seconds", "kernel_seconds"),
}


def fewer(table: pd.DataFrame) -> pd.DataFrame:
    """Two batch sizes and two repeats of the published tables, which are quick to draw."""
    if "batch_size" in table and len(table) > 1000:
        table = table[table["batch_size"].isin((64, 256))]
    return table[table["repeat"] <= 2] if "repeat" in table else table


@pytest.fixture(scope="module")
def published() -> Tables:
    return {name: fewer(schema.read(schema.find(PUBLISHED, name), name)) for name in RAW}


def without(tables: Tables, stage: str, status: str, reason: str) -> Tables:
    """The tables of a sweep in which one stage has no result."""
    found = {}
    for name, table in tables.items():
        if "stage" not in table:
            found[name] = table
            continue
        kept = table[table["stage"] != stage]
        if name in UNTIMED:
            of_stage = table[table["stage"] == stage].groupby(["batch_size", "repeat"]).head(1)
            nothing = dict.fromkeys(UNTIMED[name], math.nan)
            rows = of_stage.assign(
                **nothing, images=0, status=status, reason=reason, validated=False
            )
            kept = pd.concat([kept, rows])
        found[name] = kept
    for name in ("summary", "race_summary", "ladder"):
        found[name] = modules.load("tables", name).make(found)
    return found


@pytest.fixture(scope="module")
def gone(published: Tables) -> Tables:
    return without(published, GONE, "unavailable", REASON)


def drawing(name: str, tables: Tables) -> layout.Drawing:
    return draw.draw(name, {each: tables[each] for each in modules.tables_read("figures", name)})


def drawn(name: str, tables: Tables) -> Figure:
    return drawing(name, tables).figure


def footer(figure: Figure) -> Text | None:
    """The words below the panels."""
    low = [text for text in figure.texts if text.get_position()[1] < 0.1]
    return low[0] if low else None


def plain(text: Text) -> str:
    return text.get_text().replace("\n", " ")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", SAYING)
def test_a_figure_says_why_a_stage_is_missing(name: str, gone: Tables) -> None:
    figure = drawn(name, gone)
    below = footer(figure)
    assert below is not None
    assert f"{wording.title(GONE)}, unavailable: {REASON}" in plain(below)
    # said once, and not a second time without the reason
    assert plain(below).replace(REASON, "").count(GONE) == 1
    figure.draw_without_rendering()
    box = below.get_window_extent()
    width = figure.bbox.width
    assert box.x0 > 0
    assert box.x1 < width
    assert box.y0 >= 0
    for axes in figure.axes:
        assert axes.get_tightbbox().y0 > box.y1, axes.get_title(loc="left")


@pytest.mark.parametrize("name", ["speedup", "latency"])
def test_names_of_what_failed_overlap_nothing(name: str, published: Tables) -> None:
    """Labels of several failed stages are beside the panel and do not overlap."""
    tables = published
    for stage, status in (("tuned", "unavailable"), ("torch", "failed"), ("jax", "unavailable")):
        raw = {each: table for each, table in tables.items() if each in RAW}
        tables = without(raw, stage, status, "a reason")
    figure = drawn(name, tables)
    figure.draw_without_rendering()
    for axes in figure.axes:
        texts = [text for text in axes.texts if text.get_text()]
        words = {text.get_text() for text in texts}
        if name == "speedup":
            # rows of one panel; in the other, libraries are what stages are compared with
            assert {"unavailable", "failed"} <= words or "5 tuned unavailable" in words
        else:
            assert {"5 tuned unavailable", "PyTorch failed", "JAX unavailable"} <= words
        boxes = [text.get_window_extent() for text in (*texts, axes.yaxis.label)]
        for one, other in combinations(boxes, 2):
            assert not one.padded(-1).overlaps(other.padded(-1))


@pytest.mark.parametrize("name", ["speedup", "profile", "discern"])
def test_panels_keep_their_size_above_it(name: str, published: Tables, gone: Tables) -> None:
    """A longer footer makes the figure higher."""
    said = drawn(name, gone)
    silent = drawn(name, {n: t.assign(reason="") if "reason" in t else t for n, t in gone.items()})
    assert said.get_figheight() > silent.get_figheight()
    for one, other in zip(said.axes, silent.axes, strict=True):
        assert one.get_window_extent().height == pytest.approx(
            other.get_window_extent().height, abs=8
        )


def test_push_and_pull_are_of_stage_fused(published: Tables, gone: Tables) -> None:
    assert REASON not in plain(drawn("push_pull", gone).texts[-1])
    words = drawing(
        "push_pull", without(published, "fused", "unavailable", "it keeps a whole image")
    ).headline
    assert "3 fused, unavailable: it keeps a whole image" in words.notes
    assert "not in sweep.stages" not in words.subtitle


def test_the_ladder_says_why_below(gone: Tables, tmp_path: Path) -> None:
    ladder = modules.load("tables", "ladder")
    assert ladder.footnotes(gone) == f"\n5 tuned, unavailable: {REASON}\n"
    assert "| unavailable |" in ladder.markdown(ladder.make(gone))
    assert "reason" not in ladder.make(gone)


def test_published_tables_have_no_footnotes(published: Tables) -> None:
    summary = {"summary": modules.load("tables", "summary").make(published)}
    assert modules.load("tables", "ladder").footnotes(published | summary) == ""
    assert modules.load("tables", "race_summary").footnotes(published) == ""


def rows(*lines: tuple[str, str, str]) -> pd.DataFrame:
    """Rows of (stage, status, reason), each at a batch size of its own."""
    return pd.DataFrame(
        [
            {
                "dataset": "d",
                "network": "n",
                "stage": stage,
                "batch_size": size,
                "status": status,
                "reason": reason,
            }
            for size, (stage, status, reason) in enumerate(lines, 1)
        ]
    )


def test_which_reasons_are_shown() -> None:
    partly = rows(("ring", "ok", ""), ("ring", "does_not_fit", "9 bytes wanted"))
    assert reasons.left_out(partly) == reasons.footnotes(partly) == ""
    failed = rows(("ring", "ok", ""), ("ring", "failed", "ValueError: 3"))
    assert reasons.left_out(failed) == ""
    assert reasons.footnotes(failed) == "\n4 ring, failed: ValueError: 3\n"
    never = rows(("ring", "does_not_fit", "9 bytes"), ("ring", "does_not_fit", "8 bytes"))
    assert reasons.left_out(never) == "4 ring, does not fit: 9 bytes"
    silent = rows(("ring", "diverged", ""), ("mine", "unavailable", math.nan))
    assert reasons.left_out(silent) == reasons.footnotes(silent) == ""
    assert len(reasons.without_left_out(silent)) == 2
    several = rows(("mine", "unavailable", "a"), ("tuned", "unavailable", "b"), ("gemm", "ok", ""))
    assert reasons.left_out(several).split("\n") == [
        "5 tuned, unavailable: b",
        "mine, unavailable: a",
    ]
    assert set(reasons.without_left_out(several)["stage"]) == {"gemm"}
    other = reasons.left_out(several, ("d", "another"))
    assert other == ""


def test_a_reason_of_any_length_is_shown_in_part() -> None:
    text = wording.why_not("ring", "failed", "x " * 5000)
    assert len(text) < 450
    assert text.endswith(" ...")


WIDE = [
    {"conv": {"maps": 64, "kernel": 3}},
    {"activation": "relu"},
    {"conv": {"maps": 64, "kernel": 3}},
    {"dense": 3},
]


@pytest.mark.slow(40)
def test_a_sweep_goes_on_to_its_figures(fresh: Checkout, tmp_path: Path) -> None:
    """This includes the measurements beside the runs, one for each GPU stage."""
    checkout = fresh.copy(tmp_path / "checkout")
    settings = yaml.safe_load((checkout.folder / "tests/tiny.yaml").read_text())
    settings["datasets"]["blobs"] |= {"shape": [1, 16, 16], "train_images": 24, "test_images": 12}
    settings["networks"] = {"wide": WIDE}
    settings["sweep"] |= {
        "networks": ["wide"],
        "stages": ["gemm", "fused"],
        "batch_sizes": [4],
        "repeats": 1,
        "device": "emulated",
    }
    settings["race"] |= {"network": "wide", "stages": ["gemm", "fused"], "seeds": 1}
    settings["race"]["training"]["epochs"] = 1
    settings["training"] = settings["race"]["training"]
    settings["figures"] = ["speedup", "transfers", "race"]
    (checkout.folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    text = checkout.snakemake("figures", "tables", config="mine.yaml")
    assert "fused, batch 4: unavailable: stage 'fused' cannot take conv2 of network" in text
    results = checkout.folder / "results"
    for table in ("ladder", "race_summary"):
        below = (results / f"tables/{table}.md").read_text().splitlines()[-1]
        assert below.startswith("3 fused, unavailable: stage 'fused' cannot take conv2 of network")
        assert "takes 234496 of 232448 bytes" in below
    for name in ("epochs", "race", "transfers"):
        frame = schema.read(results / f"tables/{name}.csv", name)
        assert set(frame.loc[frame["stage"] == "fused", "status"]) == {"unavailable"}
    for figure in settings["figures"]:
        assert (results / f"figures/{figure}.png").exists()
