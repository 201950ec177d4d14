"""Figures of memory and energy: what is distinguished, what is left out, titles that are true."""

import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cnnlib.measuring import schema
from tests.workflow.conftest import digest
from workflow.glue import modules
from workflow.plotting import draw as painting
from workflow.plotting import style, wording

# Phase -> readings, ten milliseconds apart.
PHASES = {"open": 4, "validate": 6, "warm_up": 3, "train": 20, "evaluate": 2, "close": 1}
CARD = 81920
EPOCH = 60000
# MiB of the process at batch 16, and how it grows with the batch; joules and watts.
GPU = {"gemm_cuda": (600, 0.2, 20.0, 400.0), "fused": (580, 0.05, 5.0, 250.0)}


@pytest.fixture(autouse=True)
def house_style() -> Iterator[None]:
    style.apply()
    yield
    pyplot.close("all")


def identity(stage: str, kind: str, size: int, repeat: int, **changes: object) -> dict:
    device = {"cpu": "a cpu, 1 thread", "emulated": "a cpu, g++", "cuda": "a card"}[kind]
    return {
        "dataset": "mnist",
        "network": "lenet5",
        "stage": stage,
        "device": device,
        "batch_size": size,
        "seed": repeat,
        "repeat": repeat,
        "device_kind": kind,
        "status": "ok",
        "validated": True,
        "extrapolated": False,
        **changes,
    }


def samples_of(
    stage: str, kind: str = "cuda", size: int = 64, repeat: int = 1, memory: float = 600, **changes
) -> list[dict]:
    """One run, whose memory grows until it trains. On a CPU only host memory is known."""
    names = [name for name, count in PHASES.items() for _ in range(count)]
    rows = []
    for i, phase in enumerate(names):
        own = memory * min(1.0, (i + 1) / 8)
        gpu = own if kind == "cuda" else math.nan
        rows.append(
            identity(stage, kind, size, repeat)
            | {"sample": i + 1, "time_seconds": 0.01 * i, "phase": phase}
            | {
                "device_memory_mib": gpu + 500,
                "device_memory_total_mib": gpu * 0 + CARD,
                "process_memory_mib": gpu,
                "utilization_percent": math.nan,
                "power_watts": math.nan,
                "energy_joules": math.nan,
                "sm_clock_mhz": math.nan,
                "temperature_celsius": math.nan,
                "host_memory_mib": own,
                "status": "ok" if kind == "cuda" else "unavailable",
            }
            | changes
        )
    return rows


def epoch_of(stage: str, kind: str = "cuda", size: int = 64, repeat: int = 1, **changes) -> dict:
    times = {"epoch_seconds": 1.0, "event_seconds": math.nan, "loss": 1.0, "test_accuracy": 0.9}
    return identity(stage, kind, size, repeat) | {"epoch": 1, "images": EPOCH} | times | changes


def energy_of(
    stage: str, size: int, repeat: int, joules: float, watts: float, **changes: object
) -> dict:
    """One run that trained for half a second, with the given energy per image and power."""
    return identity(stage, "cuda", size, repeat) | {
        "images": round(0.5 * watts / joules * EPOCH),
        "window_seconds": 0.5,
        "energy_joules": 0.5 * watts,
        "idle_watts": 70.0,
        **changes,
    }


def draw(name: str, **tables: list[dict]) -> Figure:
    wanted = modules.tables_read("figures", name)
    frames = {
        table: pd.DataFrame(tables.get(table, []), columns=list(schema.TABLES[table]))
        for table in wanted
    }
    return painting.draw(name, frames).figure


def sweep(stages: dict[str, str], sizes: tuple[int, ...] = (16, 256), repeats: int = 3) -> dict:
    """Samples and epochs of several stages (stage -> kind)."""
    runs = [
        (stage, kind, size, repeat + 1)
        for stage, kind in stages.items()
        for size in sizes
        for repeat in range(repeats)
    ]
    samples = []
    for stage, kind, size, repeat in runs:
        base, slope, *_ = GPU.get(stage, (200, 0.1))
        samples += samples_of(stage, kind, size, repeat, base + slope * size + repeat)
    return {"samples": samples, "epochs": [epoch_of(*run) for run in runs]}


def said(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.texts)


def headings(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def peaks(figure: Figure, row: int = 0) -> list[Axes]:
    """The panels of measured stages, one a batch size, or those of emulated ones below."""
    found = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("Peak")]
    return found[2 * row : 2 * row + 2]


def names(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_memory_is_that_of_the_process_without_the_context() -> None:
    figure = draw("memory", **sweep({"naive": "cpu", "fused": "cuda", "gemm_cuda": "cuda"}))
    # the least that a process begins with: the first of eight readings that is no longer small
    context = min(580 + 0.05 * 16 + 1, 600 + 0.2 * 16 + 1) / 8
    # median of three repeats; 580 + 0.05 x 256 + 2 MiB, 600 + 0.2 x 256 + 2 MiB
    assert figure.texts[0].get_text() == (
        f"fused needs {594.8 - context:.0f} MB beside the context at batch 256, "
        f"gemm_cuda {653.2 - context:.0f} MB"
    )
    assert "median of 3 repeats" in said(figure)
    assert "The card has 80 GB." in said(figure)
    assert "naive" not in said(figure)  # it takes nothing of the card
    assert headings(figure) == [
        "Peak at batch 16 (90.0 % recognised after 1 epoch)",
        "Peak at batch 256 (90.0 % recognised after 1 epoch)",
    ]
    left, right = peaks(figure)
    assert names(left) == [wording.title("gemm_cuda"), wording.title("fused")]
    assert texts(right)[1].startswith("595 MB ")
    # grey and coloured make the whole; the axis begins at nothing and has no empty decades
    grey, coloured = [bar for bar in right.patches if round(bar.get_y() + 0.33) == 1]
    assert grey.get_width() == pytest.approx(context * 2**20, rel=1e-3)
    assert grey.get_width() + coloured.get_width() == pytest.approx(594.8 * 2**20, rel=1e-3)
    assert right.get_xlim()[0] == 0
    assert right.get_xlim()[1] < 2 * 653 * 2**20


def test_bars_are_of_batches_that_all_stages_have() -> None:
    rows = sweep({"fused": "cuda", "gemm_cuda": "cuda"})
    rows["samples"] += samples_of("fused", size=4096, memory=2000)
    rows["epochs"] += [epoch_of("fused", size=4096)]
    figure = draw("memory", **rows)
    assert "at batch 256, gemm_cuda" in said(figure)
    assert [text.split(" (")[0] for text in headings(figure)] == [
        "Peak at batch 16",
        "Peak at batch 256",
    ]
    apart = sweep({"fused": "cuda"}, sizes=(16,))
    apart["samples"] += samples_of("gemm_cuda", size=32)
    apart["epochs"] += [epoch_of("gemm_cuda", size=32)]
    assert "at batch 32" in draw("memory", **apart).texts[0].get_text()


def test_a_batch_that_learns_too_little_is_in_no_title() -> None:
    rows = sweep({"fused": "cuda", "gemm_cuda": "cuda"})
    for row in rows["epochs"]:
        row["test_accuracy"] = 0.9 if row["batch_size"] == 16 else 0.88
    figure = draw("memory", **rows)
    assert " at batch 16, gemm_cuda" in figure.texts[0].get_text()
    assert headings(figure)[1] == "Peak at batch 256 (88.0 % recognised after 1 epoch)"
    # nor one at which a stage was not measured, which might be the one that takes least
    watts = [row for row in watched() if (row["stage"], row["batch_size"]) != ("fused", 16)]
    assert said(draw("energy", energy=watts, epochs=epochs_of(watts))).startswith("At batch 256 ")


def test_where_there_is_no_gpu_memory_is_the_hosts() -> None:
    figure = draw("memory", **sweep({"naive": "cpu", "gemm": "cpu"}))
    assert " on the host at batch 256" in said(figure)
    assert "of the process and its children on the host" in said(figure)
    assert "card" not in said(figure)
    assert "context" not in said(figure)
    assert wording.EMULATED not in said(figure) + "".join(headings(figure))


def test_emulated_kernels_have_a_panel_of_their_own() -> None:
    figure = draw("memory", **sweep({"naive": "cpu", "gemm": "cpu", "fused": "emulated"}))
    measured, built = peaks(figure)[0], peaks(figure, 1)[0]
    assert wording.EMULATED not in measured.get_title(loc="left")
    assert wording.EMULATED in built.get_title(loc="left")
    assert names(built) == [wording.title("fused")]
    assert "fused" not in figure.texts[0].get_text()
    alone = draw("memory", **sweep({"fused": "emulated"}))
    assert wording.EMULATED in alone.texts[0].get_text()


def test_a_run_that_did_not_train_is_named_and_not_drawn() -> None:
    rows = sweep({"fused": "cuda", "gemm_cuda": "cuda"})
    rows["samples"] += samples_of("gemm_cuda", size=8192, memory=99)
    rows["epochs"] += [epoch_of("gemm_cuda", size=8192, status="does_not_fit")]
    figure = draw("memory", **rows)
    assert "Left out: gemm_cuda does not fit at batch 8192." in said(figure)
    assert "8192" not in " ".join(headings(figure))
    failed = [epoch_of("fused", status="diverged")]
    figure = draw("memory", samples=samples_of("fused"), epochs=failed)
    assert "No memory samples" in said(figure)


def test_all_stages_show_the_memory_of_the_same_owner() -> None:
    """A run whose process NVML does not know must not be compared with one that it knows."""
    rows = sweep({"fused": "cuda"})
    rows["samples"] += samples_of("gemm_cuda", size=256, process_memory_mib=math.nan)
    rows["epochs"] += [epoch_of("gemm_cuda", size=256)]
    figure = draw("memory", **rows)
    assert "in use on the device" in said(figure)
    assert [text.split("   ")[0] for text in texts(peaks(figure)[-1])] == ["1.07 GB", "1.07 GB"]
    # a first sample, before NVML knows the process, is left out
    early = sweep({"fused": "cuda"})
    early["samples"][0]["process_memory_mib"] = math.nan
    assert "of the process on the device" in said(draw("memory", **early))


def test_a_card_that_reports_only_its_processes() -> None:
    """A card shared by MIG may report only this: the process's memory is drawn, no capacity."""
    rows = sweep({"fused": "cuda", "gemm_cuda": "cuda"})
    for row in rows["samples"]:
        row["device_memory_mib"] = row["device_memory_total_mib"] = math.nan
    assert "of the process on the device" in said(draw("memory", **rows))


def test_a_first_network_and_an_unknown_stage() -> None:
    rows = sweep({"fused": "cuda", "mystery": "cuda"})
    other = [row | {"network": "wide"} for row in rows["samples"]]
    figure = draw("memory", samples=rows["samples"] + other, epochs=rows["epochs"])
    assert "LeNet-5 on MNIST" in said(figure)
    assert names(figure.axes[0])[1] == "mystery"


def watched(sizes: tuple[int, ...] = (16, 256)) -> list[dict]:
    return [
        energy_of(stage, size, repeat, joules * 16 / size + 0.1 * repeat, watts)
        for stage, (_, _, joules, watts) in GPU.items()
        for size in sizes
        for repeat in (1, 2, 3)
    ]


def epochs_of(rows: list[dict]) -> list[dict]:
    return [epoch_of(row["stage"], "cuda", row["batch_size"], row["repeat"]) for row in rows]


def test_energy_of_an_epoch_and_power() -> None:
    rows = watched()
    figure = draw("energy", energy=rows, epochs=epochs_of(rows))
    # 5 + 0.2 J and 20 + 0.2 J, the values of the middle repeat, at one batch size
    assert figure.texts[0].get_text() == "At batch 16 an epoch takes fused 5.2 J, gemm_cuda 20 J"
    assert "over 0.5 s of training; median of 3 repeats" in said(figure)
    left, right = figure.axes
    assert any(text.endswith("0.51 J") for text in texts(left))
    assert {text.split("  ")[1] for text in texts(right) if "  " in text} == {
        "400 W",
        "250 W",
        "70 to 70 W",
    }
    # bars are quartiles over the repeats
    assert len(left.containers) == 2


def test_a_line_that_ends_early_says_where() -> None:
    rows = [row for row in watched() if row["stage"] == "fused" or row["batch_size"] == 16]
    figure = draw("energy", energy=rows, epochs=epochs_of(rows))
    assert f"{wording.title('gemm_cuda')}  400 W at 16" in texts(figure.axes[1])


def test_an_epoch_is_of_whole_batches() -> None:
    rows = watched((16,))
    epochs = [row | {"images": EPOCH // 2} for row in epochs_of(rows)]
    assert "takes fused 2.6 J" in said(draw("energy", energy=rows, epochs=epochs))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"status": "unavailable", "energy_joules": math.nan, "images": 0}, "not measured"),
        ({"extrapolated_epochs": True}, "whole epoch"),
    ],
)
def test_without_energy_it_is_said(changes: dict, word: str) -> None:
    scaled = bool(changes.pop("extrapolated_epochs", False))
    rows = [row | changes for row in watched()]
    epochs = [row | {"extrapolated": scaled} for row in epochs_of(rows)]
    figure = draw("energy", energy=rows, epochs=epochs)
    assert word in said(figure)
    assert not figure.axes


def test_energy_of_one_run_alone() -> None:
    rows = [energy_of("fused", 64, 1, 5.0, 250.0, idle_watts=math.nan)]
    figure = draw("energy", energy=rows, epochs=epochs_of(rows))
    assert figure.texts[0].get_text() == "At batch 64 an epoch takes fused 5.0 J"
    assert "median of 1 repeat," in said(figure)
    assert "waiting" not in "".join(texts(figure.axes[1]))


@pytest.mark.parametrize("name", ["memory", "energy"])
def test_the_same_tables_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    rows = watched()
    tables = sweep({"fused": "cuda", "gemm_cuda": "cuda"}) | {"energy": rows}
    for file in ("a.png", "b.png"):
        draw(name, **tables).savefig(tmp_path / file, dpi=40, metadata=painting.METADATA[".png"])
    assert digest(tmp_path / "a.png") == digest(tmp_path / "b.png")
