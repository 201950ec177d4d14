"""Figures of what was learned when: completed lines, predictions, titles that are true."""

import itertools
import math
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib import pyplot
from matplotlib.figure import Figure

from cnnlib.measuring import schema
from cnnlib.paths import ROOT
from tests.workflow.conftest import digest
from workflow.glue import modules
from workflow.glue.experiment import Experiment
from workflow.plotting import draw, layout, recognition, style, wording

FIGURES = ("learning", "discern", "discern_images", "parting")
IMAGES = (0, 64, 128, 256, 512, 960, 1920)
EPOCH = 960
ACCURACY = (0.10, 0.12, 0.30, 0.80, 0.90, 0.95, 0.97)
# Seconds an image; two of the ladder's stages were timed on a part, and one of these not evaluated.
PACE = {"naive": 0.1, "gemm": 1e-4, "gemm_cuda": 1e-5, "ring": 1e-6}
WATCHED = {"gemm": 7, "gemm_cuda": 3, "ring": 7}


def identity(stage: str, kind: str | None = None, **changes) -> dict:
    kind = kind or ("cpu" if stage in ("naive", "gemm") else "cuda")
    device = {"cpu": "a cpu, 1 thread", "emulated": "a cpu, g++", "cuda": "a card"}[kind]
    return {
        "dataset": "mnist",
        "network": "lenet5",
        "stage": stage,
        "device": device,
        "batch_size": 64,
        "seed": 1,
        "repeat": 1,
        "device_kind": kind,
        "status": "ok",
        "validated": True,
        "extrapolated": stage in ("naive", "gemm_cuda"),
        **changes,
    }


def table(name: str, rows: Iterable[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(schema.TABLES[name]))


def epoch_rows(stage: str, **changes) -> list[dict]:
    line = identity(stage, **changes)
    rest = {"event_seconds": math.nan, "loss": 1.0, "test_accuracy": 0.9}
    images = 8 if line["extrapolated"] else EPOCH
    return [
        line | rest | {"epoch": epoch, "images": images, "epoch_seconds": seconds * EPOCH}
        for epoch, seconds in enumerate([PACE[stage], PACE[stage], 9 * PACE[stage]], 1)
    ]


def points(stage: str, count: int) -> list[tuple[int, float]]:
    return [(images, images * PACE[stage]) for images in IMAGES[:count]]


def learning_rows(stage: str, count: int, **changes) -> list[dict]:
    return [
        identity(stage, **changes)
        | {"images": i, "train_seconds": s, "test_images": 1000, "test_accuracy": accuracy}
        for (i, s), accuracy in zip(points(stage, count), ACCURACY, strict=False)
    ]


# Test image -> its label, and the probability of it at each of IMAGES; the rest is class 0's.
DIGITS = {
    3: (2, (0.1, 0.4, 0.9, 0.95, 0.96, 0.97, 0.98)),
    8: (1, (0.1, 0.2, 0.6, 0.3, 0.2, 0.7, 0.8)),
    9: (1, (0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3)),
}


def spelled(label: int, chance: float, classes: int) -> str:
    chances = np.zeros(classes)
    chances[0] = 1 - chance
    chances[label] += chance
    return " ".join(f"{each:.4f}" for each in chances)


def digit_rows(stage: str, count: int, classes: int = 10, **changes) -> list[dict]:
    return [
        identity(stage, **changes)
        | {"images": i, "train_seconds": s, "image_index": digit, "label": label}
        | {"probabilities": spelled(label, chance, classes)}
        for digit, (label, chances) in DIGITS.items()
        for (i, s), chance in zip(points(stage, count), chances, strict=False)
    ]


def picture_rows() -> list[dict]:
    random = np.random.default_rng(0)
    return [
        {
            "dataset": "mnist",
            "image_index": digit,
            "label": label,
            "channels": 1,
            "height": 6,
            "width": 5,
            "pixels": random.bytes(30).hex(),
        }
        for digit, (label, _) in DIGITS.items()
    ]


def made_up(stages: Iterable[str] = PACE, classes: int = 10, **changes) -> dict[str, pd.DataFrame]:
    """All tables of a sweep that did not evaluate naive, and gemm_cuda not to the end."""
    stages = list(stages)
    watched = [(stage, WATCHED[stage]) for stage in stages if stage in WATCHED]
    epochs = [row for stage in stages for row in epoch_rows(stage, **changes)]
    learning = [row for each in watched for row in learning_rows(*each, **changes)]
    predictions = [row for each in watched for row in digit_rows(*each, classes=classes, **changes)]
    return {
        "epochs": table("epochs", epochs),
        "learning": table("learning", learning),
        "predictions": table("predictions", predictions),
        "pictures": table("pictures", picture_rows()),
    }


def drawn(name: str, tables: dict[str, pd.DataFrame]) -> Figure:
    style.apply()
    figure = modules.load("figures", name).draw(tables, layout.OWN_PAGE).figure
    pyplot.close(figure)
    return figure


def texts(figure: Figure) -> list[str]:
    """All words outside the axes: title, subtitle and notes, on one line each."""
    return [" ".join(text.get_text().split()) for text in figure.texts]


# completing lines -------------------------------------------------------------------------------


def test_seconds_an_image_are_the_median_epoch_over_the_images_of_a_full_one() -> None:
    rows = epoch_rows("naive") + epoch_rows("gemm") + epoch_rows("naive", batch_size=100)
    rows += epoch_rows("gemm", dataset="other", extrapolated=True)
    # only other batch sizes were timed in full: 900 of the 960 images make whole batches. A stage
    # that takes one image at a time has one time per image, of all its runs
    pooled = np.median([0.1, 0.1, 0.9, *(0.1 * 960 / 900 * np.array([1, 1, 9]))])
    found = recognition.paces(table("epochs", rows)).set_index(["dataset", "stage", "batch_size"])
    assert found["pace"].to_dict() == {
        ("mnist", "naive", 64): pytest.approx(pooled),
        ("mnist", "gemm", 64): pytest.approx(1e-4),
        ("mnist", "naive", 100): pytest.approx(pooled),
    }


def line_of(completed: pd.DataFrame, stage: str) -> pd.DataFrame:
    return completed[completed["stage"] == stage]


def test_a_line_is_completed_from_another_stage_by_its_own_time_per_image() -> None:
    tables = made_up()
    completed = recognition.complete(tables["learning"], tables["epochs"])
    assert list(dict.fromkeys(completed["stage"])) == list(PACE)
    for stage in PACE:
        line = line_of(completed, stage)
        assert tuple(line["images"]) == IMAGES
        assert tuple(line["test_accuracy"]) == ACCURACY
        assert list(line["train_seconds"]) == pytest.approx([i * PACE[stage] for i in IMAGES])
        assert list(line["borrowed"]) == [i >= WATCHED.get(stage, 0) for i in range(len(IMAGES))]
        assert set(line["source"][line["borrowed"]]) <= {"gemm"}
        assert line["whole"].all()
    assert set(line_of(completed, "naive")["device"]) == {"a cpu, 1 thread"}


def test_the_clock_of_a_training_that_was_looked_at_does_not_count() -> None:
    """It stops and goes on again with every look; whole epochs say how fast a stage is."""
    tables = made_up()
    tables["learning"]["train_seconds"] *= 1.7
    for stage in PACE:
        line = line_of(recognition.complete(tables["learning"], tables["epochs"]), stage)
        assert list(line["train_seconds"]) == pytest.approx([i * PACE[stage] for i in IMAGES])


def test_lines_that_cannot_be_completed_stay_as_they_are() -> None:
    """Rows are not validated, diverged, of another seed, or no stage was evaluated to the end."""
    tables = made_up()
    epochs = tables["epochs"]
    for change in ({"validated": False}, {"status": "diverged"}, {"seed": 2}):
        changed = epochs.assign(
            **{k: epochs[k].mask(epochs["stage"] == "naive", v) for k, v in change.items()}
        )
        completed = recognition.complete(tables["learning"], changed)
        assert "naive" not in set(completed["stage"]), change
    diverged = epochs.assign(
        status=epochs["status"].mask(epochs["stage"] == "gemm_cuda", "diverged")
    )
    line = line_of(recognition.complete(tables["learning"], diverged), "gemm_cuda")
    assert (len(line), line["whole"].any()) == (WATCHED["gemm_cuda"], False)
    short = made_up(["gemm", "naive"], extrapolated=True)
    completed = recognition.complete(short["learning"], short["epochs"])
    assert set(completed["stage"]) == {"gemm"}
    assert not completed["whole"].any()


# beliefs ----------------------------------------------------------------------------------------


def test_beliefs_are_the_likeliest_class_of_what_has_been_trained() -> None:
    rows = table("predictions", digit_rows("gemm", 7))
    rows.loc[1, "probabilities"] = " ".join(["nan"] * 10)
    found = recognition.beliefs(rows)
    assert len(found) == len(rows) - len(DIGITS) - 1
    first = found[found["image_index"] == 3]
    assert list(first["belief"]) == [2] * 5
    assert list(first["chance"]) == [0.9, 0.95, 0.96, 0.97, 0.98]
    assert recognition.known_from(first)["images"] == 128
    assert (
        recognition.known_from(found[found["image_index"] == 8])["images"] == 960
    )  # doubts in between
    assert recognition.known_from(found[found["image_index"] == 9]) is None


def test_an_easy_a_hard_and_a_never_recognised_digit_are_shown() -> None:
    tables = made_up()
    rows = recognition.beliefs(recognition.complete(tables["predictions"], tables["epochs"]))
    chosen = recognition.choose(rows)
    assert chosen == [(3, "easy"), (8, "hard"), (9, "very hard")]
    assert recognition.choose(rows[rows["image_index"] == 9]) == [(9, "very hard")]
    assert recognition.choose(rows[rows["image_index"] != 9]) == [(3, "easy"), (8, "hard")]


def cells_at(stage: str, times: list[float], tables: dict[str, pd.DataFrame]) -> list:
    rows = recognition.beliefs(recognition.complete(tables["predictions"], tables["epochs"]))
    line = rows[(rows["stage"] == stage) & (rows["image_index"] == 3)]
    return modules.load("figures", "discern").beliefs_at(line, times)


def test_cells_show_what_was_predicted_at_that_time() -> None:
    cells = cells_at("naive", [6.3, 6.5, 60.0, 1e6], made_up())
    assert cells == [
        None,  # the first batch takes 6.4 s
        recognition.Belief(0, 0.6, right=False, borrowed=True),
        recognition.Belief(2, 0.96, right=True, borrowed=True),
        recognition.Belief(2, 0.98, right=True, borrowed=True),
    ]
    assert not any(cell.borrowed for cell in cells_at("gemm", [0.01, 1.0], made_up()))


def test_a_training_that_was_cut_short_is_not_known_afterwards() -> None:
    tables = made_up(["gemm"], extrapolated=True)
    known = cells_at("gemm", [0.19, 0.2], tables)
    assert known[0] is not None
    assert known[1] is None


def test_columns_are_round_times_at_which_something_has_changed() -> None:
    discern = modules.load("figures", "discern")
    tables = made_up()
    rows = recognition.beliefs(recognition.complete(tables["predictions"], tables["epochs"]))
    rows = recognition.named(rows, tables["pictures"])
    times = discern.moments(rows)
    # the first batch of ring takes 64 µs, the whole training by naive 192 s
    assert [style.plain(time) for time in times][:: len(times) - 1] == ["100 µs", "10 min"]
    assert len(times) <= discern.MOST
    line = rows[(rows["stage"] == "naive") & (rows["image_index"] == 3)]
    cells = discern.beliefs_at(line, times)
    assert cells[0] is None
    assert cells[-1] is not None
    lines = [
        discern.beliefs_at(group.sort_values("images"), times)
        for _, group in rows.groupby(["image_index", "stage"])
    ]
    columns = list(zip(*lines, strict=True))
    for one, other in itertools.pairwise(columns[:-1]):
        assert discern.changes(one, other)


def test_the_best_library_has_a_row() -> None:
    tables = made_up()
    for name, rows in tables.items():
        if "stage" in rows:
            other = rows[rows["stage"] == "ring"]
            peers = [other.assign(stage="jax"), other.assign(stage="torch")]
            if "epoch_seconds" in rows:
                peers[1]["epoch_seconds"] *= 3
            tables[name] = pd.concat([rows, *peers])
    words = {text.get_text() for axes in drawn("discern", tables).axes for text in axes.texts}
    assert "JAX" in words
    assert "PyTorch" not in words


def test_columns_of_images_are_few_and_end_with_the_last() -> None:
    columns = modules.load("figures", "discern_images").columns
    steps = [2**k for k in range(12)] + [937, 1874, 2811]
    rows = pd.DataFrame([identity("gemm", images=64 * s, borrowed=False) for s in steps])
    assert columns(rows) == [64, 256, 1024, 4096, 16384, 65536, 179904]
    assert columns(rows[:4]) == [64, 128, 256, 512]
    assert columns(rows[:1]) == [64]


def test_pictures_are_dark_on_light_or_in_their_colours() -> None:
    pixels = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2)
    shared = {"dataset": "mnist", "label": 1, "height": 2, "width": 2}
    pictures = table(
        "pictures",
        [
            {**shared, "image_index": 5, "channels": 1, "pixels": pixels[1].tobytes().hex()},
            {**shared, "image_index": 6, "channels": 3, "pixels": pixels.tobytes().hex()},
        ],
    )
    gray, colour = (recognition.picture_of(pictures, "mnist", digit) for digit in (5, 6))
    assert gray.tolist() == [[251, 250], [249, 248]]
    assert colour.shape == (2, 2, 3)
    assert colour[0, 1].tolist() == [1, 5, 9]
    assert recognition.picture_of(pictures, "mnist", 7) is None


def test_other_images_to_watch_are_other_runs_of_the_same_data() -> None:
    first, second = (Experiment(settings_watching(index)) for index in (7, 8))
    wildcards = SimpleNamespace(
        dataset="mnist", network="lenet5", stage="gemm", batch_size="64", repeat="1"
    )
    assert first.dataset_settings(wildcards) == second.dataset_settings(wildcards)
    assert first.run_settings(wildcards) != second.run_settings(wildcards)


def settings_watching(index: int) -> dict:
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    shipped["datasets"]["mnist"]["hard_images"] = [index]
    return shipped


# titles -----------------------------------------------------------------------------------------


def test_titles_say_what_the_tables_say() -> None:
    tables = made_up()
    assert texts(drawn("learning", tables))[0] == (
        "The same training takes ring 1.92 ms, naive 3.20 min (extrapolated), and recognises 97.0 %"
    )
    found = texts(drawn("discern", tables))
    assert found[0] == "ring recognises this 2 after 128 µs, naive after 12.8 s (extrapolated)"
    assert "Extrapolated (naive, gemm_cuda)" in found[2]
    assert "taken from gemm," in found[2]
    found = texts(drawn("discern_images", tables))
    assert found[0] == (
        "After the same images all stages always agree: probabilities to within 0.01 points"
    )
    assert found[2].startswith("Compared: 3 test images at 6 moments")
    assert "Not evaluated: naive." in found[2]
    found = texts(drawn("discern_images", made_up(["gemm"])))
    assert (found[0], found[2]) == ("What gemm takes the images for", "")


def test_a_difference_between_stages_is_in_the_title() -> None:
    tables = made_up()
    predictions = tables["predictions"]
    for images, chance in ((256, 0.31), (960, 0.8)):
        row = (
            (predictions["stage"] == "ring")
            & (predictions["image_index"] == 9)
            & (predictions["images"] == images)
        )
        predictions.loc[row, "probabilities"] = spelled(1, chance, 10)
    assert texts(drawn("discern_images", tables))[0] == (
        "After the same images all stages agree in 17 of 18 cases: probabilities to within "
        "1 point up to 512 images, 50 points later"
    )


def test_emulated_kernels_are_apart_and_never_in_the_title() -> None:
    tables = made_up(["gemm"])
    emulated = made_up(["ring"], kind="emulated")
    both = {name: pd.concat([tables[name], emulated[name]]) for name in tables}
    both["pictures"] = tables["pictures"]
    figure = drawn("learning", both)
    assert texts(figure)[0] == "The same training takes gemm 192 ms, and recognises 97.0 %"
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[2] == f"LeNet-5 on MNIST\n({wording.EMULATED})"
    assert texts(drawn("discern", both))[0] == "gemm recognises this 2 after 12.8 ms"
    for name in ("learning", "discern"):
        figure = drawn(name, emulated | {"pictures": tables["pictures"]})
        assert wording.EMULATED in texts(figure)[0]


# whatever the tables hold -----------------------------------------------------------------------


def several_networks() -> dict[str, pd.DataFrame]:
    parts = [made_up(), made_up(network="other", classes=12), made_up(batch_size=16)]
    return {name: pd.concat([part[name] for part in parts]) for name in parts[0]}


def with_nan() -> dict[str, pd.DataFrame]:
    tables = made_up()
    tables["learning"].loc[2::3, "test_accuracy"] = math.nan
    tables["predictions"].loc[2::3, "probabilities"] = " ".join(["nan"] * 10)
    tables["epochs"].loc[1, "epoch_seconds"] = math.nan
    return tables


TROUBLES = {
    "none": made_up,
    "one stage": lambda: made_up(["gemm"]),
    "unknown stage": lambda: {
        name: rows.replace({"stage": {"ring": "later"}}) for name, rows in made_up().items()
    },
    "several networks": several_networks,
    "twelve classes": lambda: made_up(classes=12),
    "nan": with_nan,
    "emulated only": lambda: made_up(["gemm_cuda", "ring"], kind="emulated"),
    "nothing in full": lambda: made_up(extrapolated=True),
    "no pictures": lambda: made_up() | {"pictures": table("pictures", [])},
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_figures_draw_whatever_the_tables_hold(name: str, trouble: str) -> None:
    figure = drawn(name, TROUBLES[trouble]())
    if trouble == "several networks":
        subtitle = texts(figure)[1]
        assert name == "learning" or "the first of 2 networks and data sets measured" in subtitle


@pytest.mark.parametrize("name", FIGURES)
def test_without_rows_the_figure_says_so(name: str) -> None:
    empty = {each: rows.iloc[:0] for each, rows in made_up().items()}
    assert texts(drawn(name, empty))[0].startswith("No ")
    failed = made_up(status="does_not_fit", validated=False)
    assert texts(drawn(name, failed))[0].startswith("No ")
    untrained = made_up()
    for each in ("learning", "predictions"):
        untrained[each] = untrained[each][untrained[each]["images"] == 0]
    assert texts(drawn(name, untrained))[0].startswith("No ")


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_tables_give_the_same_bytes(name: str, tmp_path) -> None:
    for file in ("a.png", "b.png"):
        draw.draw(name, made_up()).figure.savefig(
            tmp_path / file, dpi=40, metadata=draw.METADATA[".png"]
        )
    assert digest(tmp_path / "a.png") == digest(tmp_path / "b.png")


@pytest.mark.parametrize("name", ["discern", "discern_images"])
def test_classes_have_their_names(name: str) -> None:
    tables = made_up()
    names = {1: "bird", 2: "automobile"}
    labels = tables["pictures"]["label"]
    tables["pictures"]["class_name"] = labels.map(names)
    figure = drawn(name, tables)
    cells = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"automobi…", "bird", "0"} <= cells
    captions = [axes.get_xlabel() for axes in figure.axes]
    assert any(caption.startswith("automobile, easy") for caption in captions)
    if name == "discern":
        assert "this automobile" in texts(figure)[0]


def test_colour_pictures_that_are_not_square() -> None:
    tables = made_up()
    tables["pictures"]["channels"], tables["pictures"]["width"] = 3, 2
    tables["pictures"]["height"] = 5
    shape = recognition.picture_of(tables["pictures"], "mnist", 3).shape
    assert shape == (5, 2, 3)
    assert drawn("discern", tables)
