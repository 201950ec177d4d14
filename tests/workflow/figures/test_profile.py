"""Figures of where the time goes: shares that add up, rates and titles that are true."""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from cnnlib.measuring import schema
from tests.workflow.conftest import digest
from workflow.figures import roofline
from workflow.glue import modules
from workflow.plotting import draw, layout, style, wording
from workflow.tables import hotspots

FIGURES = ("profile", "roofline", "transfers")
Tables = dict[str, pd.DataFrame]
# Microseconds of a kernel, launched twice where it says so, of batch 64; ten times more at 640.
KERNELS = {
    ("conv1+activation1", "forward"): 10.0,
    ("conv1+activation1", "backward"): 40.0,
    ("dense1", "forward"): 5.0,
    ("dense1", "backward"): 15.0,
    ("batch", "loss"): 2.0,
    ("batch", "update"): 8.0,
}
IN_ORDER = [10.0, 5.0, 2.0, 40.0, 15.0, 8.0]
"""Microseconds of conv1 and dense1 forward, loss, both backward, and update."""
STEP = 100.0
FLOPS, BYTES = 4e6, 1e6


@pytest.fixture(autouse=True)
def close_figures():
    style.apply()
    yield
    pyplot.close("all")


def table(name: str, rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(schema.TABLES[name]))


def identity(stage: str, kind: str, size: int, repeat: int, network: str) -> dict:
    device = {"cpu": "a cpu, 1 thread", "emulated": "a cpu, g++", "cuda": "a card"}[kind]
    return {
        "dataset": "mnist",
        "network": network,
        "stage": stage,
        "device": device,
        "batch_size": size,
        "seed": repeat,
        "repeat": repeat,
        "device_kind": kind,
        "status": "ok",
        "validated": True,
        "extrapolated": False,
    }


def made_up(
    stages: tuple[str, ...] = ("gemm", "fused", "ring"), kind: str = "cuda", network: str = "lenet5"
) -> Tables:
    """Two batch sizes and three repeats, the last an outlier."""
    kernels, epochs, transfers = [], [], []
    for stage in stages:
        own = "cpu" if stage in ("naive", "gemm") else kind
        for size in (64, 640):
            for repeat, factor in ((1, 1.0), (2, 1.0), (3, 9.0)):
                line = identity(stage, own, size, repeat, network)
                scale = 1e-6 * factor * size / 64
                for (layers, part), time in KERNELS.items():
                    # in two launches of half the time: what counts is their product
                    kernels.append(
                        line
                        | {
                            "layer": layers.partition("+")[0],
                            "kernel": part,
                            "layers": layers,
                            "part": part,
                            "grid": 1,
                            "launches": 2,
                            "kernel_seconds": time * scale / 2,
                            "flops": FLOPS * size / 64,
                            "bytes": BYTES * size / 64,
                        }
                    )
                kernels.append(
                    line
                    | {
                        "layer": "conv1",
                        "kernel": "push",
                        "layers": "conv1",
                        "part": "compared",
                        "grid": 1,
                        "launches": 0,
                        "kernel_seconds": 1.0,
                        "flops": 1.0,
                        "bytes": 1.0,
                    }
                )
                epochs.append(
                    line
                    | {
                        "epoch": 1,
                        "images": 6400,
                        "epoch_seconds": STEP * scale * 6400 / size,
                        "event_seconds": math.nan,
                        "loss": 1.0,
                        "test_accuracy": 0.9,
                    }
                )
        if own != "cpu":
            for resident, seconds in ((64, 3.0), (256, 2.0), (6400, 1.0)):
                for epoch in (1, 2, 3):
                    transfers.append(
                        identity(stage, own, 64, 1, network)
                        | {
                            "resident_images": resident,
                            "epoch": epoch,
                            "images": 6400,
                            "epoch_seconds": seconds,
                            "gather_seconds": 0.2,
                            "upload_seconds": 0.1,
                            "kernel_seconds": 0.8,
                        }
                    )
    return {
        "kernels": table("kernels", kernels),
        "epochs": table("epochs", epochs),
        "transfers": table("transfers", transfers),
        "probes": probes(),
    }


def probes() -> pd.DataFrame:
    found = [
        ("cuda", "copy_device", 1024, 1.0, "GB/s"),
        ("cuda", "copy_device", 2**30, 2000.0, "GB/s"),
        ("cuda", "peak_fp32", 0, 50.0, "TFLOP/s"),
        ("cpu", "copy_cpu", 2**30, 10.0, "GB/s"),
        ("cpu", "blas_all", 0, 1.0, "TFLOP/s"),
    ]
    return table(
        "probes",
        [
            {
                "device": kind,
                "device_kind": kind,
                "probe": name,
                "size_bytes": size,
                "repeat": 1,
                "seconds": 1.0,
                "rate": rate,
                "unit": unit,
                "status": "ok",
            }
            for kind, name, size, rate, unit in found
        ],
    )


def drawn(name: str, tables: Tables) -> Figure:
    wanted = modules.tables_read("figures", name)
    figure = (
        modules.load("figures", name)
        .draw({each: tables[each] for each in wanted}, layout.OWN_PAGE)
        .figure
    )
    figure.canvas.draw()
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in figure.texts]


def everything(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(pyplot.Text))


# numbers -----------------------------------------------------------------------------------------


def bars(figure: Figure, panel: int) -> list[list[float]]:
    """The widths of the parts of each bar, from the top."""
    rows: dict[int, list[float]] = {}
    for patch in figure.axes[panel].patches:
        rows.setdefault(round(patch.get_y() + patch.get_height() / 2), []).append(patch.get_width())
    return [rows[row] for row in sorted(rows)]


def test_bars_are_microseconds_on_one_scale_and_the_rest_is_between_kernels() -> None:
    figure = drawn("profile", made_up())
    fused, ring = bars(figure, 0)
    between = STEP - sum(IN_ORDER)
    assert fused == ring == pytest.approx([*IN_ORDER, between])
    # the last stage once more, enlarged
    (alone,) = bars(figure, 1)
    assert alone == pytest.approx(ring)
    assert figure.axes[1].get_xlim()[1] == pytest.approx(figure.axes[0].get_xlim()[1])
    # on a CPU there is nothing but operators and "the rest", which is not the loss alone
    (gemm,) = bars(figure, 3)
    in_order = [10.0, 5.0, 40.0, 15.0, 2.0, 8.0]
    assert gemm == pytest.approx([time / 80 for time in in_order])


def test_a_stage_twice_as_quick_has_a_bar_half_as_long() -> None:
    tables = made_up()
    for name, column in (("kernels", "kernel_seconds"), ("epochs", "epoch_seconds")):
        tables[name].loc[tables[name]["stage"] == "ring", column] /= 2
    figure = drawn("profile", tables)
    fused, ring = bars(figure, 0)
    assert sum(fused) == pytest.approx(2 * sum(ring))
    assert figure.axes[1].get_xlim()[1] == pytest.approx(figure.axes[0].get_xlim()[1] / 2)


def test_kernels_longer_than_the_step_are_not_rescaled() -> None:
    tables = made_up()
    tables["epochs"]["epoch_seconds"] /= 2
    figure = drawn("profile", tables)
    fused, _ = bars(figure, 0)
    assert fused == pytest.approx(IN_ORDER)
    marks = {float(line.get_xdata()[0]) for line in figure.axes[0].lines}
    assert list(marks) == pytest.approx([STEP / 2])
    assert "between kernels" not in everything(figure)


def test_marks_are_arithmetic_over_the_time_of_all_launches() -> None:
    kernels = made_up()["kernels"]
    marks = roofline.of_parts(kernels[(kernels["batch_size"] == 64) & (kernels["launches"] > 0)])
    mark = marks.set_index(["stage", "layers", "part"]).loc["ring", "dense1", "backward"]
    assert mark["rate"] == pytest.approx(FLOPS / 15e-6)  # not the third repeat
    assert mark["intensity"] == 4
    assert mark["share"] == pytest.approx(15 / 80)


def test_ceilings_are_those_of_the_device_and_of_its_large_copies() -> None:
    assert roofline.ceilings(probes(), "cuda") == ([("float32", 50e12)], 2000e9, "memory:")
    # how fast all cores copy is not known: a line of one thread would be too low for them
    assert math.isnan(roofline.ceilings(probes(), "cpu")[1])
    assert roofline.ceilings(probes(), "one core")[1] == 10e9
    levels, bandwidth, _ = roofline.ceilings(probes().iloc[:0], "cuda")
    assert levels == []
    assert math.isnan(bandwidth)


def test_hotspots_are_the_first_functions_with_their_share() -> None:
    line = identity("naive", "cpu", 64, 1, "lenet5")
    rows = [
        line | {"function": f"f{i}", "calls": 1, "own_seconds": own, "total_seconds": own}
        for i, own in enumerate([6.0, 2.0, 1.0, *[0.1] * 10])
    ]
    other = [rows[0] | {"stage": "gemm"}]
    made = hotspots.make({"cpu_profile": table("cpu_profile", rows + other)})
    assert list(made["stage"]) == ["naive"] * hotspots.MOST + ["gemm"]
    assert list(made["own_percent"])[:3] == [60.0, 20.0, 10.0]
    assert made["own_percent"].iloc[-1] == 100


# titles ------------------------------------------------------------------------------------------


def only_emulated() -> Tables:
    return made_up(("fused", "ring"), kind="emulated")


def test_titles_say_what_the_tables_say() -> None:
    tables = made_up()
    assert texts(drawn("profile", tables))[0] == (
        "A step of ring at batch 64 takes 100 µs, of fused 100 µs; conv1 backward takes longest"
    )
    assert texts(drawn("roofline", tables))[0] == (
        "fused reaches 800 GFLOP/s in dense1 forward, 2 % of the peak (float32)"
    )
    assert texts(drawn("transfers", tables))[0] == (
        "In loads of 64 an image takes ring 469 µs, in loads of 6,400 156 µs"
    )


def test_no_part_takes_longest_where_parts_overlap() -> None:
    tables = made_up()
    tables["kernels"]["kernel_seconds"] *= 2
    assert texts(drawn("profile", tables))[0] == (
        "A step of ring at batch 64 takes 100 µs, of fused 100 µs"
    )


def test_images_of_epochs_of_different_lengths_can_be_compared() -> None:
    tables = made_up()
    rows = tables["transfers"]
    long = rows["stage"] == "ring"
    for column in ("images", "epoch_seconds", "gather_seconds", "upload_seconds", "kernel_seconds"):
        rows[column] = rows[column].where(~long, 2 * rows[column])
    figure = drawn("transfers", tables)
    found = {text.get_text() for text in figure.axes[0].texts}
    assert {"3 fused  156 µs", "4 ring  156 µs"} <= found


def test_a_whole_step_of_a_cpu_is_below_its_peak() -> None:
    """Parts are timed in one of several processes, which add up to more than the cores can do."""
    figure = drawn("roofline", made_up())
    (notes,) = [text for text in texts(figure) if text.startswith("On the CPU")]
    # 4 parts of 4 MFLOP in 100 µs
    assert "gemm reaches 160 GFLOP/s" in notes
    assert len(figure.axes) == 1


def test_waiting_does_not_count_as_the_loss_of_a_cpu() -> None:
    tables = made_up(("naive", "gemm"))
    tables["kernels"].loc[tables["kernels"]["part"] == "loss", "kernel_seconds"] *= 100
    figure = drawn("profile", tables)
    assert texts(figure)[0] == "In a step of gemm at batch 64 the rest takes longest"
    assert "loss" not in everything(figure)


def test_without_epochs_no_step_is_given() -> None:
    tables = made_up() | {"epochs": table("epochs", [])}
    assert texts(drawn("profile", tables))[0] == (
        "In a step of ring at batch 64 conv1 backward takes longest"
    )


def test_without_probes_there_are_no_ceilings_and_it_is_said() -> None:
    figure = drawn("roofline", made_up() | {"probes": table("probes", [])})
    assert "the machine's own limits were not measured" in texts(figure)[1]
    # only those that lead to the names of parts
    upright = [len({*line.get_xdata()}) == 1 for axes in figure.axes for line in axes.lines]
    assert all(upright)
    assert "not measured" not in texts(drawn("roofline", made_up()))[1]


@pytest.mark.parametrize("name", FIGURES)
def test_emulated_kernels_are_named_so(name: str) -> None:
    title = texts(drawn(name, only_emulated()))[0]
    assert wording.EMULATED in title
    assert "peak" not in title  # of what would it be one?


def test_one_load_by_emulated_kernels_is_named_so() -> None:
    tables = only_emulated()
    rows = tables["transfers"]
    tables["transfers"] = rows[rows["resident_images"] == rows["resident_images"].min()]
    assert wording.EMULATED in texts(drawn("transfers", tables))[0]


def test_a_long_device_stays_in_its_panel() -> None:
    tables = made_up(("naive", "gemm", "fused"), kind="emulated")
    for rows in tables.values():
        long = "AMD EPYC (kernels built by g++ 12.2.0)"
        rows["device"] = rows["device"].where(rows["device_kind"] != "emulated", long)
        if "stage" in rows:
            rows["device"] = rows["device"].where(rows["stage"] != "gemm", "a cpu, 2 threads")
    figure = drawn("roofline", tables)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) == 3
    for box in boxes:
        assert box is not None
        assert box.x1 < figure.bbox.width + 1


@pytest.mark.parametrize("name", ["profile", "roofline"])
def test_emulated_kernels_share_no_panel(name: str) -> None:
    figure = drawn(name, made_up(kind="emulated"))
    assert wording.EMULATED not in texts(figure)[0]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert {wording.EMULATED in title for title in titles} == {True, False}
    for axes in figure.axes:
        labels = {label.get_text() for label in axes.get_yticklabels()}
        if name == "profile" and wording.EMULATED in axes.get_title(loc="left"):
            assert labels == {wording.title("fused"), wording.title("ring")}


# whatever the tables hold ------------------------------------------------------------------------


def with_nan() -> Tables:
    tables = made_up()
    for name, column in (
        ("kernels", "kernel_seconds"),
        ("transfers", "epoch_seconds"),
        ("epochs", "epoch_seconds"),
    ):
        tables[name].loc[tables[name]["stage"] == "ring", column] = math.nan
    return tables


def several_networks() -> Tables:
    parts = made_up(), made_up(network="other")
    return {name: pd.concat([part[name] for part in parts]) for name in parts[0]}


TROUBLES: dict[str, Callable[[], Tables]] = {
    "one stage": lambda: made_up(("ring",)),
    "unknown stage": lambda: {
        name: rows.replace({"stage": {"ring": "later"}}) for name, rows in made_up().items()
    },
    "several networks": several_networks,
    "nan": with_nan,
    "emulated only": only_emulated,
    "cpu only": lambda: made_up(("naive", "gemm")),
    "unknown part": lambda: {
        name: rows.replace({"part": {"update": "polish"}}) for name, rows in made_up().items()
    },
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_figures_draw_whatever_the_tables_hold(name: str, trouble: str) -> None:
    figure = drawn(name, TROUBLES[trouble]())
    for word in (" nan", "nan×", " inf"):
        assert word not in everything(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_runs_that_failed_are_no_result(name: str) -> None:
    failed = {name: rows.assign(status="does_not_fit") for name, rows in made_up().items()}
    figure = drawn(name, failed)
    assert not any(axes.has_data() for axes in figure.axes)


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_tables_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    for file in ("a.png", "b.png"):
        draw.draw(name, made_up()).figure.savefig(
            tmp_path / file, dpi=40, metadata=draw.METADATA[".png"]
        )
    assert digest(tmp_path / "a.png") == digest(tmp_path / "b.png")
