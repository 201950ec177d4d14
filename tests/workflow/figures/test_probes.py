"""The figure and the table of the machine's own limits: levels found, words that are true."""

import math
from collections.abc import Iterable

import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from cnnlib.measuring import schema
from workflow.glue import modules
from workflow.plotting import layout, style

KIB, MIB = 2**10, 2**20
SIZES = [2**k * KIB for k in range(21)]


def h100(size: int) -> float:
    """Latency of three levels with a step between."""
    for most, latency in ((128 * KIB, 22e-9), (256 * KIB, 103e-9), (16 * MIB, 143e-9)):
        if size <= most:
            return latency
    return 262e-9 if size <= 32 * MIB else 344e-9


def rows(probe: str, size: int, values: Iterable[float], kind: str = "cuda", **changes) -> list:
    """One row for each value, a latency unless `changes` give another unit."""
    return [
        {
            "device": "a card" if kind == "cuda" else "a cpu, 2 threads",
            "device_kind": kind,
            "probe": probe,
            "size_bytes": size,
            "repeat": repeat,
            "seconds": value,
            "rate": value,
            "unit": "s",
            "status": "ok",
            **changes,
        }
        for repeat, value in enumerate(values, 1)
    ]


def failed(probe: str, kind: str = "cuda") -> list:
    return rows(probe, 0, [math.nan], kind, unit="", status="unavailable")


def of_gpu() -> list:
    chased = [row for size in SIZES for row in rows("chase_global", size, [h100(size)] * 3)]
    shared = [row for size in SIZES[:8] for row in rows("chase_shared", size, [14e-9])]
    copied = []
    for size in (4, 4096, 2**28):
        seconds = 9e-6 + size / 50e9
        copied += rows("copy_up_pinned", size, [seconds], rate=size / seconds / 1e9, unit="GB/s")
    return chased + shared + copied


def of_cpu() -> list:
    chased = [
        row
        for size in SIZES[3:19]
        for row in rows("chase_cpu", size, [2e-9 if size < MIB else 90e-9], "cpu")
    ]
    copied = rows("copy_cpu", MIB, [1e-4], "cpu", rate=10.0, unit="GB/s")
    return chased + copied + rows("copy_cpu", 8 * MIB, [2e-3], "cpu", rate=4.0, unit="GB/s")


def table(*parts: list) -> pd.DataFrame:
    found = [row for part in parts for row in part]
    return pd.DataFrame(found, columns=list(schema.TABLES["probes"]))


def draw(*parts: list) -> Figure:
    style.apply()
    return (
        modules.load("figures", "memory_latency")
        .draw({"probes": table(*parts)}, layout.OWN_PAGE)
        .figure
    )


def written(figure: Figure) -> list[str]:
    """All texts, title first, after a check that none overlaps another of its panel."""
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
    texts = [text.get_text() for text in figure.texts]
    texts += [text.get_text() for axes in figure.axes for text in axes.texts]
    pyplot.close(figure)
    return texts


def test_a_gpu_with_three_levels_has_them_named() -> None:
    texts = written(draw(of_gpu(), of_cpu()))
    assert texts[0] == "The GPU waits 14.0 ns for its nearest memory, 344 ns for its farthest"
    assert "a card; a cpu, 2 threads" in texts[1]
    assert {"L1 22.0 ns", "L2 143 ns", "GPU memory  344 ns", "2.00 ns"} <= set(texts)
    assert {"CPU memory  90.0 ns", "GPU shared  14.0 ns", "within CPU memory  4 GB/s"} <= set(texts)


def test_another_number_of_levels_is_not_given_names() -> None:
    flat = [row for size in SIZES for row in rows("chase_global", size, [1e-7])]
    texts = written(draw(flat))
    assert not any("L1" in text.split() or "L2" in text.split() for text in texts)
    assert "GPU memory  100 ns" in texts


def test_a_cpu_alone() -> None:
    texts = written(draw(of_cpu()))
    assert texts[0] == "The CPU waits 2.00 ns for its nearest memory, 90.0 ns for its farthest"
    assert "GPU" not in " ".join(texts)


def test_what_failed_is_left_out() -> None:
    texts = written(draw(of_gpu(), failed("chase_cpu", "cpu"), failed("copy_cpu", "cpu")))
    assert not any("nan" in text or "CPU memory" in text for text in texts)
    assert written(draw(failed("chase_global")))[0] == "Memory latency was not measured"


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        ([20, 21, 22, 100, 140, 141, 142], [[20, 21, 22], [140, 141, 142]]),
        ([24, 8, 8.6, 34], []),  # a fall is no level either
        ([10, 11, 12, 13], []),  # nor is a slope
        ([5, 5], []),
    ],
)
def test_levels(latencies: list[float], expected: list[list[float]]) -> None:
    levels = modules.load("figures", "memory_latency").levels
    found = levels(pd.Series(latencies, index=[2**k for k in range(len(latencies))], dtype=float))
    assert [list(level) for level in found] == expected


def test_the_table_of_limits() -> None:
    limits = modules.load("tables", "limits")
    launch = rows("launch", 0, [5e-6, 7e-6, 6e-6])
    frame = limits.make({"probes": table(of_gpu(), launch, failed("peak_tf32"), of_cpu())})
    assert list(frame.columns) == limits.COLUMNS
    # in the order of the words, not of the rows; of many sizes the first and the last
    assert list(frame["probe"][:3]) == ["launch", "chase_shared", "chase_shared"]
    assert list(frame.loc[frame["probe"] == "chase_global", "size_bytes"]) == [SIZES[0], SIZES[-1]]
    first = frame.iloc[0]
    assert (first["median"], first["low"], first["high"], first["n"]) == (6e-6, 5e-6, 7e-6, 3)
    up = frame[frame["probe"] == "copy_up_pinned"]
    assert list(up["unit"]) == ["s", "GB/s"]
    assert up["median"].iloc[0] == pytest.approx(9e-6, rel=1e-3)
    text = limits.markdown(frame)
    assert (
        "| launch of a kernel, one of many in a row |  | 6.00 µs | 5.00 µs to 7.00 µs | 3 |" in text
    )
    assert "| products of matrices in TF32 by mma.sync |  | unavailable |  |  |" in text
    assert text.index("**a card**") < text.index("**a cpu, 2 threads**")
    assert "nan" not in text


def test_the_table_without_rows_says_so() -> None:
    limits = modules.load("tables", "limits")
    frame = limits.make({"probes": table()})
    assert list(frame.columns) == limits.COLUMNS
    assert limits.markdown(frame) == "The machine's own limits were not measured.\n"
