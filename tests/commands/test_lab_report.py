"""A lab report has the numbers that were measured, and none for what was not."""

import math
from pathlib import Path
from typing import Any

import pytest

from cnnlib.exercises.lab_report import gather
from cnnlib.measuring import schema
from tests.support.command_line import Home

IDENTITY = dict(dataset="mnist", network="lenet5", seed=1, validated=True, extrapolated=False)


def epoch(stage: str, batch: int, seconds: float, repeat: int = 1, **values: Any) -> dict[str, Any]:
    """A row of the table epochs."""
    row: dict[str, Any] = IDENTITY | dict(
        stage=stage,
        device="a processor",
        device_kind="cpu",
        batch_size=batch,
        repeat=repeat,
        epoch=1,
        images=60000,
        epoch_seconds=seconds,
        event_seconds=math.nan,
        loss=0.1,
        test_accuracy=0.975,
        status="ok",
        reason="",
    )
    return row | values


def kernel(stage: str, name: str, seconds: float, launches: int = 1) -> dict[str, Any]:
    """A row of the table kernels."""
    return IDENTITY | dict(
        stage=stage,
        device="a processor",
        device_kind="cpu",
        batch_size=64,
        repeat=1,
        layer="conv1",
        kernel=name,
        layers="conv1",
        part="forward",
        grid=0,
        launches=launches,
        kernel_seconds=seconds,
        flops=1.0,
        bytes=1.0,
        status="ok",
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "measured" / "tables"
    folder.mkdir(parents=True)
    emulated = dict(device_kind="emulated", device="a processor (kernels built by g++)")
    failed = dict(status="failed", reason="it hangs", validated=False, test_accuracy=math.nan)
    schema.write(
        folder / "epochs.csv",
        "epochs",
        [
            *(epoch("naive", 64, 300.0, n, extrapolated=True) for n in (1, 2)),
            *(epoch("gemm", 64, seconds, 1) for seconds in (2.0, 3.0, 4.0)),
            epoch("gemm", 128, 1.5),
            epoch("gemm_cuda", 64, 77.0, **emulated),
            epoch("fused", 64, math.nan, **failed),
            epoch("my_gemm", 64, 6.0),
        ],
    )
    schema.write(
        folder / "kernels.csv",
        "kernels",
        [
            kernel("gemm", "slow", 0.003),
            kernel("gemm", "often", 0.001, launches=5),
            kernel("gemm_cuda", "multiply", 0.007),
        ],
    )
    return folder.parent


def test_the_page_has_what_was_measured_and_nothing_else(home: Home, results: Path) -> None:
    home("lab-report", str(results), "--out", "lab/report.md")
    page = (home.folder / "lab/report.md").read_text(encoding="utf-8")
    assert "| naive | 5.00 min\\* (n = 2, 5.00 min to 5.00 min) | – | – | 97.5 % |" in page
    row = "| gemm | 3.00 s (n = 3, 2.50 s to 3.50 s) | 1.50 s (n = 1) | 100× over naive | 97.5 % |"
    assert row in page
    assert "| gemm_cuda | emulated | – | – | 97.5 % |" in page
    assert "| fused | failed | – | – | – |" in page
    assert "| my_gemm | 6.00 s (n = 1) | – | 0.50× over gemm | 97.5 % |" in page
    assert "Not measured: ring, tuned." in page
    assert "gemm_cuda: ran emulated on the processor" in page
    assert "77.0 s" not in page
    assert "| conv1 often, forward | 5.00 ms | 62 % |" in page
    assert "multiply, forward" not in page
    assert "**gemm_cuda** (emulated: no time)" in page
    assert "**ring** (you have not measured it)" in page
    assert "**gemm** (3.00 s an epoch at batch 64, 100× over naive)" in page
    figure = (home.folder / "lab/report_epochs.svg").read_text(encoding="utf-8")
    assert "(report_epochs.svg)" in page
    assert "gemm_cuda" not in figure
    assert "answers" in home.fails("lab-report", str(results), "--out", "lab/report.md")
    home("lab-report", str(results), "--no-figures")
    assert "svg" not in (home.folder / "report.md").read_text(encoding="utf-8")


def test_a_folder_or_a_network_without_rows_is_named(home: Home, results: Path) -> None:
    assert "nowhere is not there" in home.fails("lab-report", "nowhere")
    said = home.fails("lab-report", str(results), "--network", "other")
    assert said.endswith("measured has no rows of other; it has: mnist, lenet5\n")


def test_the_batch_is_that_of_most_stages(results: Path) -> None:
    report = gather(results)
    assert (report.batch, report.batches) == (64, [64, 128])
    assert report.stages == ["naive", "gemm", "gemm_cuda", "fused", "my_gemm"]
