"""The cost of few images on the GPU per load: sizes, rows, and the time that may be taken."""

from pathlib import Path

import pandas as pd
import pytest

from cnnlib.config import Config
from cnnlib.engine.gpu import GpuEngine
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported
from cnnlib.measuring import schema
from cnnlib.measuring.runs import Run
from cnnlib.measuring.transfers import EPOCHS, loads, measure_transfers
from tests.support.toys import toy_config, toy_data

pytestmark = pytest.mark.quick


def test_loads_grow_fourfold_from_a_batch_to_all() -> None:
    assert loads(16, 100) == [16, 64, 96]
    assert loads(16, 64) == [16, 64]
    assert loads(64, 64) == [64]
    assert loads(256, 60_000) == [256, 1024, 4096, 16384, 59904]


COUNT = 88
"""Images of the toy data in whole batches."""


def transfers(config: Config, stage: str, out: Path) -> pd.DataFrame:
    _, dataset = toy_data(out)
    run = Run("toy", "small", stage, 4, 1)
    measure_transfers(config, run, dataset, out / "transfers.csv")
    return schema.read(out / "transfers.csv", "transfers")


def test_every_load_is_timed_on_the_same_images(tmp_path: Path) -> None:
    config = toy_config(sweep={"device": "emulated"})
    rows = transfers(config, "fused", tmp_path)
    sizes = [4, 16, 64, COUNT]
    assert list(rows.resident_images) == [size for size in sizes for _ in range(EPOCHS)]
    assert list(rows.epoch) == list(range(1, EPOCHS + 1)) * len(sizes)
    assert (rows.images == COUNT).all()
    parts = rows[["gather_seconds", "upload_seconds", "kernel_seconds"]]
    assert (parts > 0).all(axis=None)
    assert (rows.epoch_seconds > rows.gather_seconds).all()
    assert set(rows.device_kind) == {"emulated"}


def test_what_would_take_long_is_timed_on_fewer_images(tmp_path: Path) -> None:
    measuring = {"budget_seconds": 1e-6, "sample_seconds": 1e-6}
    rows = transfers(
        toy_config(sweep={"device": "emulated"}, measuring=measuring), "fused", tmp_path
    )
    assert set(rows.images) == {4}
    assert len(rows) == EPOCHS


@pytest.mark.parametrize(
    ("problem", "status", "reason"),
    [
        (Unsupported("conv1 is too large"), "unavailable", "conv1 is too large"),
        (DoesNotFit("3 GB wanted"), "does_not_fit", "3 GB wanted"),
        (MemoryError(), "does_not_fit", "out of memory"),
    ],
)
@pytest.mark.parametrize("where", ["__init__", "train_timed"])
def test_what_cannot_run_is_one_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    problem: Exception,
    status: str,
    reason: str,
) -> None:
    """The workflow gets its figures although a stage does not take the network."""

    def fail(self: object, *arguments: object) -> None:
        raise problem

    monkeypatch.setattr(GpuEngine, where, fail)
    rows = transfers(toy_config(sweep={"device": "emulated"}), "fused", tmp_path)
    assert list(rows.status) == [status]
    assert list(rows.reason) == [reason]
    assert rows.epoch_seconds.isna().all()


def test_a_stage_that_loads_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'gemm' loads nothing onto a GPU"):
        transfers(toy_config(), "gemm", tmp_path)
    assert not (tmp_path / "transfers.csv").exists()
