"""Runs that are timed while other processes are on their GPU."""

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.engine import Stage
from cnnlib.engine.cpu import MicroBatchEngine
from cnnlib.errors import DoesNotFit
from cnnlib.measuring.freshness import is_sound
from cnnlib.measuring.record import summary
from cnnlib.measuring.run import measure
from cnnlib.stages import gemm
from tests.support.nvml import Changing, Nvml
from tests.support.runs import all_tables, run, tables
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


class OnGpu(MicroBatchEngine):
    """Stage 2 as if on a GPU; in the method `moment` something happens to the GPU."""

    nvml: ClassVar[Changing]
    moment: ClassVar[str] = ""
    happens: ClassVar[str] = "visited"

    def load(self, *arguments: Any) -> None:
        self.nvml.looked_at()
        self._meanwhile("load")
        super().load(*arguments)
        if self.moment == "load":
            raise DoesNotFit("3 GB wanted, 2 GB free")

    def train(self, order: np.ndarray, rates: np.ndarray | None = None) -> float:
        self._meanwhile("train")
        return super().train(order, rates)

    def profile(self) -> Any:
        self.nvml.looked_at()  # no other process is seen around the end of the training
        self._meanwhile("profile")
        return super().profile()

    def _meanwhile(self, method: str) -> None:
        if method == self.moment:
            getattr(self.nvml, self.happens).value = 1
            self.nvml.looked_at()


@pytest.fixture
def measured_on_gpu(
    data: Dataset,
    folder: Path,
    install: Callable[[Stage], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    """Measure OnGpu into `folder`; returns the contents of run.json."""

    class Fake:
        name, kind, pci_bus_id, built = "Some GPU", "cuda", "0000:01:00.0", "nvcc"

        def close(self) -> None:
            pass

    nvml = Changing(visitor=os.getppid())
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("cnnlib.training.target.open_device", lambda choice: Fake())

    def measured(moment: str, happens: str = "visited") -> dict[str, Any]:
        namespace = {"nvml": nvml, "moment": moment, "happens": happens}
        engine = type("Engine", (OnGpu,), namespace)
        install(dataclasses.replace(gemm.STAGE, engine=engine, runs_on="cuda"))
        config = toy_config(measuring={"energy_seconds": 0.1, "sample_interval": 0.001})
        measure(config, run(), data, folder)
        return tables(folder)[2]

    return measured


@pytest.mark.parametrize(
    ("moment", "disturbed"),
    [
        ("", set()),
        ("train", {"epochs", "steps", "kernels", "learning", "predictions", "energy"}),
        ("profile", {"kernels", "learning", "predictions", "energy"}),
    ],
)
def test_what_is_timed_while_others_are_on_the_gpu_is_disturbed(
    measured_on_gpu: Callable[..., dict[str, Any]], folder: Path, moment: str, disturbed: set[str]
) -> None:
    facts = measured_on_gpu(moment)
    found = all_tables(folder)
    timed = {name: set(table.status) for name, table in found.items() if name != "samples"}
    assert timed == {name: {"disturbed" if name in disturbed else "ok"} for name in timed}
    assert facts["status"] == ("disturbed" if "epochs" in disturbed else "ok")
    others = [{"process": os.getppid(), "name": "/usr/bin/other", "memory_mib": 3072.0}]
    assert facts.get("disturbed", []) == (others if disturbed else [])
    assert "unwatched" not in facts
    assert (found["epochs"].epoch_seconds > 0).all()
    assert is_sound(folder) == (not disturbed), "the sweep measures it again"
    assert ("/usr/bin/other" in summary(folder)) == bool(disturbed)


def test_what_does_not_fit_beside_others_might_have(
    measured_on_gpu: Callable[..., dict[str, Any]], folder: Path
) -> None:
    facts = measured_on_gpu("load")
    assert list(tables(folder)[0].status) == ["disturbed"]
    assert facts["does_not_fit"] == "3 GB wanted, 2 GB free"
    assert len(facts["disturbed"]) == 1
    assert not is_sound(folder)


def test_nvml_that_is_lost_in_the_middle(
    measured_on_gpu: Callable[..., dict[str, Any]], folder: Path
) -> None:
    """The run ends as usual, and later readings are unavailable."""
    assert measured_on_gpu("train", "lost")["status"] == "ok"
    found = all_tables(folder)
    assert set(found["epochs"].status) == set(found["kernels"].status) == {"ok"}
    # Readings before NVML was initialised, while it answered, and since it was lost.
    in_turn = [status for status, _ in itertools.groupby(found["samples"].status)]
    assert in_turn == ["unavailable", "ok", "unavailable"]
    assert set(found["energy"].status) == {"unavailable"}
    assert found["energy"].energy_joules.isna().all()


def test_a_gpu_whose_processes_are_not_listed_is_unwatched(
    measured_on_gpu: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Changing, "looked_at", lambda nvml, times=0: None)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("nvmlDeviceGetComputeRunningProcesses"))
    facts = measured_on_gpu("")
    assert facts["status"] == "ok"
    assert "others would not be noticed" in facts["unwatched"]
