"""The figure of how far correct trainings drift apart: what it compares, draws and says."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from tests.workflow.figures.test_learning import (
    IMAGES,
    digit_rows,
    drawn,
    learning_rows,
    made_up,
    spelled,
    table,
    texts,
)
from workflow.glue import modules
from workflow.plotting import ladder, style

PUBLISHED = ROOT / "results/reference/nvidia-h100/tables"
PARTING = modules.load("figures", "parting")
Tables = dict[str, pd.DataFrame]


def trained(*stages: str, **changes) -> Tables:
    """Tables of stages that were all evaluated to the end and agree."""
    tables = made_up(["gemm"], **changes)
    tables["predictions"] = table(
        "predictions", [r for s in stages for r in digit_rows(s, 7, **changes)]
    )
    tables["learning"] = table(
        "learning", [r for s in stages for r in learning_rows(s, 7, **changes)]
    )
    return tables


def believes(tables: Tables, stage: str, images: int, chance: float) -> None:
    """Change the probability of label 1 for test image 9."""
    predictions = tables["predictions"]
    row = (
        (predictions["stage"] == stage)
        & (predictions["images"] == images)
        & (predictions["image_index"] == 9)
    )
    assert row.any()
    predictions.loc[row, "probabilities"] = spelled(1, chance, 10)


def recognises(tables: Tables, stage: str, images: int, accuracy: float) -> None:
    learning = tables["learning"]
    row = (learning["stage"] == stage) & (learning["images"] == images)
    assert row.any()
    learning.loc[row, "test_accuracy"] = accuracy


def parted() -> Tables:
    """Trainings that differ in a last decimal at 256 images, visibly at 512, in accuracy at 960."""
    tables = trained("gemm", "gemm_cuda", "ring")
    believes(tables, "ring", 256, 0.3001)
    believes(tables, "ring", 512, 0.302)
    believes(tables, "gemm_cuda", 960, 0.2)
    believes(tables, "ring", 960, 0.9)
    recognises(tables, "gemm_cuda", 960, 0.93)
    recognises(tables, "ring", 960, 0.971)
    return tables


def lines_of(tables: Tables) -> tuple[dict[int, dict[int, float]], dict[int, dict[int, float]]]:
    """{images: largest difference} by batch size, of probabilities and of accuracies."""
    predictions, learning = (PARTING.compared(tables[name]) for name in ("predictions", "learning"))
    parts = PARTING.probabilities(predictions), PARTING.accuracy(learning)
    beliefs, accuracies = (
        {size: line.to_dict() for size, line in part.lines.items()} for part in parts
    )
    return beliefs, accuracies


def test_differences_are_the_largest_between_any_two_stages() -> None:
    beliefs, accuracies = lines_of(parted())
    assert beliefs == {64: {64: 0, 128: 0, 256: 1e-4, 512: 0.002, 960: 0.7, 1920: 0}}
    assert accuracies == {64: {64: 0, 128: 0, 256: 0, 512: 0, 960: 4.1, 1920: 0}}


def test_only_the_same_training_in_float32_is_compared() -> None:
    expected = lines_of(parted())
    for stage, changes in {
        "torch": {},
        "jax_tf32": {},
        "tuned": {"validated": False},
        "fused": {"repeat": 2},
        "gemm": {"seed": 2},
        "fused_pull": {"status": "diverged"},
    }.items():
        tables = parted()
        other = trained("ring", extrapolated=False)
        for name in ("predictions", "learning"):
            rows = other[name].assign(stage=stage, **changes)
            if name == "predictions":
                rows["probabilities"] = spelled(7, 0.99, 10)
            else:
                rows["test_accuracy"] = 0.01
            tables[name] = pd.concat([tables[name], rows], ignore_index=True)
        assert lines_of(tables) == expected, stage
    assert {stage.name for stage in ladder.known() if stage.rounding is not None} == {
        "jax_tf32",
        "torch_compile_tf32",
    }


def test_where_only_peers_were_trained_those_in_float32_are_compared() -> None:
    tables = parted()
    names = {"gemm": "torch", "gemm_cuda": "jax", "ring": "jax_tf32"}
    peers = {name: rows.replace({"stage": names}) for name, rows in tables.items()}
    assert set(PARTING.compared(peers["predictions"])["stage"]) == {"torch", "jax"}
    assert lines_of(peers)[1][64][960] == 2.0


def test_a_moment_at_which_one_stage_alone_was_evaluated_has_no_point() -> None:
    tables = parted()
    for name in ("predictions", "learning"):
        rows = tables[name]
        tables[name] = rows[(rows["stage"] == "gemm") | (rows["images"] <= 256)]
    beliefs, accuracies = lines_of(tables)
    assert list(beliefs[64]) == list(accuracies[64]) == [64, 128, 256]
    tables = parted()
    tables["predictions"].loc[tables["predictions"]["stage"] != "gemm", "probabilities"] = "nan nan"
    assert lines_of(tables)[0] == {}


@pytest.mark.parametrize("decimals", [".4f", ".7f", ".3e"])
def test_probabilities_may_be_written_otherwise(decimals: str) -> None:
    tables = parted()
    tables["predictions"]["probabilities"] = [
        " ".join(format(float(each), decimals) for each in text.split())
        for text in tables["predictions"]["probabilities"]
    ]
    assert lines_of(tables)[0][64][512] == pytest.approx(0.002)
    assert "for 256 images" in texts(drawn("parting", tables))[0]


# words ------------------------------------------------------------------------------------------


def test_the_title_says_how_long_they_agree_and_how_far_they_drift_apart() -> None:
    assert texts(drawn("parting", parted()))[0] == (
        "Correct trainings by 3 stages agree to four decimals for 256 images, then drift apart: "
        "test accuracies differ by up to 4.1 points"
    )


def test_the_title_gives_the_range_over_all_batch_sizes() -> None:
    parts = [parted(), trained("gemm", "gemm_cuda", "ring", batch_size=16)]
    believes(parts[1], "ring", 1920, 0.4)
    both = {name: pd.concat([part[name] for part in parts]) for name in parts[0]}
    assert "for 256 to 960 images, then drift apart" in texts(drawn("parting", both))[0]
    believes(parts[1], "ring", 64, 0.4)
    both["predictions"] = pd.concat([part["predictions"] for part in parts])
    assert "for up to 256 images, then drift apart" in texts(drawn("parting", both))[0]


def test_titles_of_trainings_that_never_differ_or_differ_at_once() -> None:
    tables = trained("gemm", "ring")
    assert texts(drawn("parting", tables))[0] == (
        "Correct trainings by 2 stages agree to four decimals for 1,920 images, as far as they "
        "were compared"
    )
    believes(tables, "ring", 64, 0.25)
    assert texts(drawn("parting", tables))[0] == (
        "Correct trainings by 2 stages drift apart within 64 images: probabilities differ by up to "
        "0.050"
    )
    tables = trained("gemm")
    for name in ("predictions", "learning"):
        other = tables[name].assign(device="another cpu")
        tables[name] = pd.concat([tables[name], other], ignore_index=True)
    assert "by gemm on several devices agree" in texts(drawn("parting", tables))[0]


def test_what_was_evaluated_is_said_below() -> None:
    tables = parted()
    for name in ("predictions", "learning"):
        rows = tables[name]
        tables[name] = rows[(rows["stage"] != "gemm") | (rows["images"] <= 128)]
    below = texts(drawn("parting", tables))[2]
    assert "for 3 test images" in below
    assert "the first 1,000 test images" in below
    assert below.endswith("Not evaluated to the end: gemm.")


def test_with_one_stage_nothing_is_compared() -> None:
    figure = drawn("parting", trained("gemm"))
    assert texts(figure)[0] == "No two stages can be compared"
    assert not figure.axes


def test_one_of_the_two_tables_is_enough() -> None:
    for empty, panel in (("predictions", 0), ("learning", 1)):
        tables = parted()
        tables[empty] = tables[empty].iloc[:0]
        figure = drawn("parting", tables)
        assert not figure.axes[panel].lines
        assert figure.axes[panel].texts[0].get_text() == "not evaluated by two stages"
        assert figure.axes[1 - panel].lines
        said = texts(figure)[0]
        if empty == "predictions":
            assert "agree in accuracy for 512 images, then drift apart: test accuracies" in said
        else:
            assert said.endswith("probabilities differ by up to 0.70")


# what is drawn ----------------------------------------------------------------------------------


def drawn_lines(axes: Axes) -> list[Line2D]:
    """The lines of a panel, without those beside its labels."""
    return [line for line in axes.lines if line.get_label() != style.CHIP_LABEL]


def heights(figure: Figure, panel: int) -> list[float]:
    (line,) = drawn_lines(figure.axes[panel])
    assert tuple(line.get_xdata()) == IMAGES[1:]
    return list(line.get_ydata())


def test_what_is_equal_is_in_the_strip_and_what_differs_above() -> None:
    figure = drawn("parting", parted())
    for panel, equal, differing in (
        (0, PARTING.ROUNDED, {512: 0.002, 960: 0.7}),
        (1, 0.05, {960: 4.1}),
    ):
        axes = figure.axes[panel]
        low, high = axes.get_ylim()
        for images, height in zip(IMAGES[1:], heights(figure, panel), strict=True):
            if images in differing:
                assert height == pytest.approx(differing[images])
                assert equal < height < high
            else:
                assert low < height < equal
        assert min(axes.get_yticks()) > equal
        assert axes.get_xscale() == axes.get_yscale() == "log"


def many_sizes(first: int) -> Tables:
    """Nine batch sizes; at one of them the stages differ earlier than at the others."""
    parts = [trained("gemm", "ring", batch_size=2**power) for power in range(4, 13)]
    for part in parts:
        size = part["predictions"]["batch_size"].iloc[0]
        believes(part, "ring", 128 if size == first else 960, 0.5)
    return {name: pd.concat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(
    ("first", "labelled"),
    [
        (16, [16, 64, 256, 1024, 4096]),
        (32, [16, 32, 256, 1024, 4096]),
        (512, [16, 64, 512, 1024, 4096]),
        (2048, [16, 64, 256, 2048, 4096]),
    ],
)
def test_few_batch_sizes_have_labels_among_them_the_first_to_differ(
    first: int, labelled: list[int]
) -> None:
    figure = drawn("parting", many_sizes(first))
    for axes in figure.axes:
        found = [text.get_text() for text in axes.texts if text.get_text().startswith("batch ")]
        assert {text.split(":")[0] for text in found} == {f"batch {size:,}" for size in labelled}
        lines = drawn_lines(axes)
        assert len(lines) == 9
        colors = [line.get_color() for line in lines]
        assert len(set(colors)) == 1 + len(labelled)
    others = [2**power for power in range(4, 13) if 2**power not in labelled]
    assert f"Thin lines: batch {', '.join(f'{size:,}' for size in others)}." in texts(figure)[2]


def test_the_published_trainings_drift_apart_where_they_do() -> None:
    """The differences are computed again from the table, without the code that draws."""
    predictions = schema.read(schema.find(PUBLISHED, "predictions"), "predictions")
    own = ("gemm", "gemm_cuda", "fused", "ring", "tuned")
    rows = predictions[predictions["stage"].isin(own) & (predictions["images"] > 0)]
    first: dict[int, float] = {}
    for (size, images, _), group in rows.groupby(["batch_size", "images", "image_index"]):
        chances = np.array([text.split() for text in group["probabilities"]], dtype=float)
        if np.ptp(chances, axis=0).max() > 1.5e-4:
            first[size] = min(first.get(size, math.inf), images)
    part = PARTING.probabilities(PARTING.compared(predictions))
    assert part.parted == first
    assert (min(part.together), max(part.together)) == (512, 16384)
