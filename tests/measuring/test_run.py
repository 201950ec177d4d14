"""One measurement: the rows that it leaves, and what it never takes for a result."""

import ctypes
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

from cnnlib.datasets import Dataset
from cnnlib.device import KernelError
from cnnlib.engine import Order, Stage
from cnnlib.engine.cpu import MicroBatchEngine
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported, UserError
from cnnlib.layers import Dense
from cnnlib.measuring import budgets, schema
from cnnlib.measuring import run as measuring
from cnnlib.measuring.freshness import is_sound
from cnnlib.measuring.record import summary
from cnnlib.measuring.run import ValidationFailed, measure
from cnnlib.measuring.runs import Run
from cnnlib.stages import gemm, naive
from cnnlib.training.loop import epoch_order
from tests.support.nvml import Changing, Nvml
from tests.support.toys import toy_config, toy_data

pytestmark = pytest.mark.quick

COUNT = 90


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def run(stage: str = "gemm", batch_size: int = 8, repeat: int = 1) -> Run:
    return Run("toy", "small", stage, batch_size, repeat)


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    facts = json.loads((folder / "run.json").read_text())
    return (
        schema.read(folder / "epochs.csv", "epochs"),
        schema.read(folder / "steps.csv", "steps"),
        facts,
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], None]:
    """Make a stage the only one that is found."""

    def install(stage: Stage) -> None:
        monkeypatch.setattr(measuring, "find_stage", lambda name, place: stage)

    return install


@pytest.mark.parametrize("stage", ["naive", "gemm"])
def test_whole_epochs(data: Dataset, folder: Path, stage: str) -> None:
    assert measure(toy_config(), run(stage, repeat=2), data, folder) == folder
    epochs, steps, facts = tables(folder)
    assert list(epochs.epoch) == [1, 2]
    assert list(epochs.images) == [88, 88]
    assert list(steps.step) == [1, 2, 3]
    for table in (epochs, steps):
        assert set(table.dataset) == {"toy"}
        assert set(table.network) == {"small"}
        assert set(table.stage) == {stage}
        assert set(table.batch_size) == {8}
        assert set(table.seed) == {2}
        assert set(table.repeat) == {2}
        assert set(table.status) == {"ok"}
        assert set(table.device_kind) == {"cpu"}
        assert table.validated.all()
        assert not table.extrapolated.any()
    assert (epochs.epoch_seconds > 0).all()
    assert (steps.step_seconds > 0).all()
    assert epochs.event_seconds.isna().all()
    assert epochs.test_accuracy.between(0, 1).all()
    assert epochs.loss[1] < epochs.loss[0]
    assert facts["status"] == "ok"
    assert facts["seed"] == 2
    assert facts["run"]["stage"] == stage
    assert len(facts["plan"]) >= 1
    assert "numpy" in facts["libraries"]


def all_tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {name: schema.read(folder / f"{name}.csv", name) for name in schema.RUN_TABLES}


def test_what_is_recorded_off_the_clock(data: Dataset, folder: Path) -> None:
    found = all_tables(measure(toy_config(), run(), data, folder))
    kernels = found["kernels"]
    assert {"forward", "backward", "loss", "update"} <= set(kernels.part)
    assert (kernels.kernel_seconds > 0).all()
    samples = found["samples"]
    assert list(samples["sample"]) == list(range(1, len(samples) + 1))
    assert samples.time_seconds.is_monotonic_increasing
    assert (samples.host_memory_mib > 1).any()
    phases = {"open", "validate", "warm_up", "train", "evaluate", "profile", "learn"}
    assert set(samples.phase) <= phases  # so short a run need not show all of them
    assert len(samples)
    assert len(found["energy"]) == 1
    learning, predictions = found["learning"], found["predictions"]
    assert learning.images[0] == 0
    assert learning.images.iloc[-1] == 2 * 88
    assert learning.train_seconds.is_monotonic_increasing
    assert set(predictions.images) == set(learning.images)
    assert len(predictions) == len(learning) * predictions.image_index.nunique()
    # The curve ends where the timed epochs did, because it is the same training.
    epochs = found["epochs"]
    assert learning.test_images.iloc[-1] == len(data.test_labels)
    assert learning.test_accuracy.iloc[-1] == epochs.test_accuracy.iloc[-1]


def test_a_curve_is_recorded_once(data: Dataset, folder: Path) -> None:
    found = all_tables(measure(toy_config(), run(repeat=2), data, folder))
    assert not len(found["learning"])
    assert not len(found["predictions"])
    assert len(found["kernels"])


def test_a_part_of_the_batch_learns_nothing(data: Dataset, folder: Path) -> None:
    """Stage 1 that is timed on 4 of 8 images has made no step of the real training."""
    config = toy_config(
        training={"epochs": 1000}, measuring={"budget_seconds": 0.05, "budget_images": 4}
    )
    found = all_tables(measure(config, run("naive"), data, folder))
    assert found["epochs"].extrapolated.all()
    assert not found["kernels"].extrapolated.any()
    assert not len(found["learning"])


def test_all_stages_see_the_same_training(data: Dataset, tmp_path: Path) -> None:
    """This also holds where stage 1 could be timed on a part of a batch."""
    config = toy_config(measuring={"budget_images": 2})
    losses = []
    for stage in ("naive", "gemm"):
        epochs, _, _ = tables(measure(config, run(stage, batch_size=16), data, tmp_path / stage))
        assert not epochs.extrapolated.any()
        assert list(epochs.images) == [80, 80]
        losses.append(epochs.loss)
    np.testing.assert_allclose(*losses, rtol=1e-4)


class Recording(naive.OneByOne):
    """An engine that records the orders it was given."""

    asked: ClassVar[list[np.ndarray]] = []

    def train(self, order: np.ndarray, rates: np.ndarray | None = None) -> float:
        self.asked.append(order)
        return super().train(order, rates)


def test_the_order_is_that_of_the_seed(
    data: Dataset, folder: Path, install: Callable[[Stage], None]
) -> None:
    Recording.asked = []
    install(dataclasses.replace(naive.STAGE, engine=Recording))
    measure(toy_config(), run(repeat=3), data, folder)
    whole = [order for order in Recording.asked if len(order) == COUNT // 8 * 8]
    for epoch in (1, 2):
        expected = epoch_order(COUNT, 3, epoch)[: COUNT // 8 * 8]
        assert any((order == expected).all() for order in whole)


def test_beyond_the_budget_it_is_scaled(data: Dataset, folder: Path) -> None:
    config = toy_config(
        training={"epochs": 1000}, measuring={"budget_seconds": 0.05, "budget_images": 4}
    )
    measure(config, run("naive", batch_size=16), data, folder)
    epochs, steps, facts = tables(folder)
    assert epochs.extrapolated.all()
    assert steps.extrapolated.all()
    assert epochs.validated.all()
    assert len(epochs) == len(steps) >= 1
    assert set(epochs.images) == {4}  # stage 1 trains on a part of the batch
    assert epochs.test_accuracy.isna().all()
    np.testing.assert_allclose(epochs.epoch_seconds, steps.step_seconds * (COUNT // 16))
    assert facts["status"] == "ok"


def test_kernels_compiled_for_the_cpu_have_a_budget_of_their_own(
    data: Dataset, tmp_path: Path
) -> None:
    """Emulated runs are scaled like stage 1; what the network has learned by then is recorded."""
    config = toy_config(
        training={"epochs": 5000},
        measuring={"emulated_seconds": 0.05},
        sweep={"device": "emulated"},
    )
    found = all_tables(measure(config, run("gemm_cuda"), data, tmp_path / "gemm_cuda"))
    assert set(found["epochs"].device_kind) == {"emulated"}
    assert found["epochs"].extrapolated.all()
    assert found["epochs"].validated.all()
    assert (found["learning"].train_seconds < 0.05).sum() == len(found["learning"]) - 1
    assert not found["learning"].extrapolated.any()
    assert set(found["predictions"].images) == set(found["learning"].images)
    assert found["learning"].images.max() >= 8

    # The curve is drawn at one batch size, which is the sweep's here.
    other = all_tables(measure(config, run("gemm_cuda", 16), data, tmp_path / "other"))
    assert other["epochs"].extrapolated.all()
    assert not len(other["learning"])
    assert not len(other["predictions"])

    config = toy_config(measuring={"emulated_seconds": 1e-6})
    epochs, _, _ = tables(measure(config, run("gemm"), data, tmp_path / "gemm"))
    assert set(epochs.device_kind) == {"cpu"}
    assert not epochs.extrapolated.any()


@pytest.mark.parametrize(
    ("kind", "changes", "seconds"),
    [
        ("cpu", {}, 20.0),
        ("cuda", {}, 20.0),
        ("emulated", {}, 3.0),
        ("emulated", {"budget_seconds": 2.0}, 2.0),
        ("emulated", {"full": True}, math.inf),
        ("cpu", {"full": True}, math.inf),
    ],
)
def test_the_budget_of_a_run(kind: str, changes: dict[str, Any], seconds: float) -> None:
    assert budgets.epochs_budget(toy_config(measuring=changes), kind) == seconds


@pytest.mark.parametrize(
    ("kind", "batch_size", "extrapolated", "seconds"),
    [
        ("cpu", 8, False, math.inf),
        ("emulated", 8, False, math.inf),
        ("emulated", 8, True, 3.0),
        ("cuda", 8, True, 5.0),
        ("cpu", 8, True, 20.0),  # at the batch size of the sweep, which is drawn
        ("cpu", 16, True, 5.0),
    ],
)
def test_the_budget_of_a_learning_curve(
    kind: str, batch_size: int, extrapolated: bool, seconds: float
) -> None:
    found = budgets.learning_budget(toy_config(), batch_size, kind, extrapolated=extrapolated)
    assert found == seconds


class Steady(naive.OneByOne):
    """An engine that takes 2 ms per image and 4 ms per update, by a clock of its own."""

    now: ClassVar[float] = 0.0

    def train(self, order: np.ndarray, rates: np.ndarray | None = None) -> float:
        Steady.now += 0.002 * len(order) + 0.004
        return super().train(order, rates)

    def time_update(self) -> float:
        return 0.004


def test_scaled_times_are_right(
    data: Dataset,
    folder: Path,
    install: Callable[[Stage], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Timed on 4 images, 16 images take four times as long, except for the single update."""
    install(dataclasses.replace(naive.STAGE, engine=Steady))
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: Steady.now))
    config = toy_config(training={"epochs": 1000}, measuring={"budget_seconds": 0.05})
    measure(config, run(batch_size=16), data, folder)
    epochs, steps, _ = tables(folder)
    expected = 16 * 0.002 + 0.004
    assert list(steps.step_seconds) == pytest.approx([expected] * len(steps))
    assert list(epochs.epoch_seconds) == pytest.approx([5 * expected] * len(steps))


def test_in_full_nothing_is_scaled(data: Dataset, folder: Path) -> None:
    config = toy_config(measuring={"budget_seconds": 1e-6, "full": True})
    measure(config, run("naive"), data, folder)
    epochs, _, _ = tables(folder)
    assert not epochs.extrapolated.any()
    assert list(epochs.images) == [88, 88]


@pytest.mark.parametrize("stage", ["naive", "gemm"])
@pytest.mark.parametrize("budget", [20.0, 1e-6])
def test_a_loss_that_is_not_finite(data: Dataset, folder: Path, stage: str, budget: float) -> None:
    config = toy_config(training={"learning_rate": 1e200}, measuring={"budget_seconds": budget})
    with np.errstate(all="ignore"):
        measure(config, run(stage), data, folder)
    epochs, steps, facts = tables(folder)
    assert epochs.status.iloc[-1] == "diverged"
    assert not math.isfinite(epochs.loss.iloc[-1])
    assert (epochs.status == "diverged").sum() == 1
    assert facts["status"] == "diverged"
    if budget > 1:
        assert len(steps) == 0


def failing(error: BaseException, where: str) -> type[naive.OneByOne]:
    """An engine that raises `error` in one of its methods."""

    class Failing(naive.OneByOne):
        pass

    def fail(self: object, *arguments: object) -> None:
        raise error

    setattr(Failing, where, fail)
    return Failing


@pytest.mark.parametrize("where", ["load", "train", "gradient"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DoesNotFit("3 GB wanted, 2 GB free"), "does_not_fit"),
        (MemoryError("Unable to allocate"), "does_not_fit"),
        (Unsupported("conv1 is too large"), "unavailable"),
    ],
)
def test_what_cannot_run_is_a_result(
    data: Dataset,
    folder: Path,
    install: Callable[[Stage], None],
    where: str,
    error: Exception,
    status: str,
) -> None:
    install(dataclasses.replace(naive.STAGE, engine=failing(error, where)))
    measure(toy_config(), run(), data, folder)
    epochs, steps, facts = tables(folder)
    assert list(epochs.status) == [status]
    assert epochs.epoch_seconds.isna().all()
    assert list(epochs.validated) == [False]
    assert len(steps) == 0
    assert facts["status"] == status
    assert facts[status] == str(error)
    assert list(epochs.reason) == [str(error)]
    assert f": {status}: {error}, on " in summary(folder)
    if where == "load":
        assert "plan" not in facts  # nothing has run


WIDE = [
    {"conv": {"maps": 64, "kernel": 3}},
    {"activation": "relu"},
    {"conv": {"maps": 64, "kernel": 3}},
    {"activation": "relu"},
    {"dense": 3},
]


@pytest.mark.slow
def test_no_stage_stands_in_for_another(data: Dataset, folder: Path) -> None:
    """A network that stage tuned cannot take does not get results of stage ring in its name."""
    config = toy_config(networks={"wide": WIDE}, sweep={"device": "emulated", "networks": ["wide"]})
    for stage in ("ring", "tuned"):
        measure(config, Run("toy", "wide", stage, 8, 1), data, folder / stage)
    epochs, _, facts = tables(folder / "tuned")
    assert list(epochs.status) == ["unavailable"]
    assert "its 36,928 weights is summed in registers" in epochs.reason[0]
    assert facts["unavailable"] == epochs.reason[0]
    assert "plan" not in facts
    assert not len(schema.read(folder / "tuned" / "kernels.csv", "kernels"))
    epochs, _, facts = tables(folder / "ring")
    assert set(epochs.status) == {"ok"}
    assert set(epochs.reason) == {""}
    assert facts["engine"] == "GpuEngine"
    assert facts["resident_images"] == 88
    level = os.environ.get("CNNLIB_OPTIMIZE", "3")
    assert re.match(rf"\S+ [\d.]+ .*-O{level}\b", facts["built"])
    assert facts["plan"] == [
        "conv1+activation1: RingConv",
        "conv2+activation2: RingConv",
        "dense1: FusedDense",
    ]


class Doubled(gemm.MatrixDense):
    """An operator that only the engine knows about."""


def test_the_plan_is_that_of_the_engine_that_ran(
    data: Dataset, folder: Path, install: Callable[[Stage], None]
) -> None:
    class Other(MicroBatchEngine):
        def __init__(self, stage: Stage, *arguments: Any) -> None:
            operators = {**stage.operators, (Dense,): Doubled}
            super().__init__(dataclasses.replace(stage, operators=operators), *arguments)

    install(dataclasses.replace(gemm.STAGE, engine=Other))
    facts = tables(measure(toy_config(), run(), data, folder))[2]
    assert facts["engine"] == "Other"
    assert facts["plan"][-1] == "dense1: Doubled"
    assert facts["plan"][0] == "conv1: MatrixConv"


class EveryLoss(MicroBatchEngine):
    """An engine that gives the loss of every step of a call, as those of other libraries do."""

    def train(self, order: Order, rates: Any = None) -> float:
        size = self.setup.batch_size
        steps = len(order) // size
        due = self.rates_of(steps, rates)
        losses = [
            super(EveryLoss, self).train(order[i * size : (i + 1) * size], due[i : i + 1])
            for i in range(steps)
        ]
        self.step_losses = np.array(losses)
        return float(np.mean(losses))


@pytest.mark.parametrize(
    ("measuring", "count"),
    [
        ({"latency_steps": 3}, 3),
        ({"budget_seconds": 1e-6, "sample_seconds": 0.2}, 11),
        ({"budget_seconds": 1e-6, "full": True, "latency_steps": 3}, 3),
    ],
    ids=["epochs", "blocks", "checkpoints"],
)
def test_stages_whose_bits_do_not_repeat_are_compared_by_every_step(
    data: Dataset,
    folder: Path,
    install: Callable[[Stage], None],
    measuring: dict[str, Any],
    count: int,
) -> None:
    install(dataclasses.replace(gemm.STAGE, engine=EveryLoss, repeatable=False))
    config = toy_config(measuring=measuring)
    epochs, steps, _ = tables(measure(config, run(), data, folder, checkpoints=folder / "saved"))
    assert set(epochs.status) == {"ok"}
    assert epochs.validated.all()
    assert 1 < len(steps) <= count


def test_a_part_of_a_batch_is_said_to_be_one(data: Dataset, folder: Path) -> None:
    config = toy_config(
        training={"epochs": 1000}, measuring={"budget_seconds": 0.05, "budget_images": 4}
    )
    facts = tables(measure(config, run("naive"), data, folder))[2]
    assert facts["engine_batch_size"] == 4
    assert facts["run"]["batch_size"] == 8


def test_what_cannot_be_judged_is_a_result(
    data: Dataset, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """If no image differs from the mean, nothing depends on the first weights."""
    grey = dataclasses.replace(data, train_images=np.full_like(data.train_images, 7), mean=7.0)
    measure(toy_config(), run(), grey, folder, mark=True)
    epochs, steps, facts = tables(folder)
    assert list(epochs.status) == ["unjudged"]
    assert list(epochs.validated) == [False]
    assert epochs.epoch_seconds.isna().all()
    assert len(steps) == 0
    assert facts["status"] == "unjudged"
    assert re.fullmatch(
        r"network 'small' cannot be judged: the gradient of conv1\.weight is zero .*; change "
        r"networks\.small \(.*\) or training\.seed",
        facts["unjudged"],
    )
    assert summary(folder).startswith(f"gemm, batch 8: unjudged: {facts['unjudged']}, on ")
    assert is_sound(folder)  # measuring it again would change nothing
    assert capfd.readouterr().err == ""


def test_what_does_not_fit_names_the_device_it_does_not_fit(
    data: Dataset,
    folder: Path,
    install: Callable[[Stage], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fake:
        name, kind, pci_bus_id, built = "Some GPU", "cuda", None, "nvcc"

        def close(self) -> None:
            pass

    monkeypatch.setattr("cnnlib.training.target.open_device", lambda choice: Fake())
    engine = failing(DoesNotFit("too large"), "load")
    install(dataclasses.replace(naive.STAGE, engine=engine, runs_on="cuda"))
    measure(toy_config(), run(), data, folder)
    epochs, _, facts = tables(folder)
    assert list(epochs.device) == ["Some GPU"]
    assert list(epochs.device_kind) == ["cuda"]
    assert facts["device"] == "Some GPU"


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


class Wrong(naive.OneByOne):
    """An engine whose gradient is a thousandth too large."""

    def gradient(self, images: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = super().gradient(images, labels)
        return loss, gradient * 1.001


def test_a_wrong_stage_leaves_no_rows(
    data: Dataset, folder: Path, install: Callable[[Stage], None]
) -> None:
    install(dataclasses.replace(naive.STAGE, name="wrong", engine=Wrong))
    with pytest.raises(ValidationFailed, match=r"stage 'wrong' fails validation .* gradient of "):
        measure(toy_config(), run(), data, folder)
    assert not folder.exists()


class NotANumber(Wrong):
    """An engine that is right until it is trained."""

    def gradient(self, images: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
        return naive.OneByOne.gradient(self, images, labels)

    def train(self, order: np.ndarray, rates: np.ndarray | None = None) -> float:
        raise FloatingPointError("a NaN in conv1")


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (Wrong, r"ValidationFailed: stage 'mine' fails validation .* gradient of "),
        (NotANumber, "FloatingPointError: a NaN in conv1"),
        (failing(RuntimeError("no such kernel"), "load"), "RuntimeError: no such kernel"),
        (failing(KernelError("step: the GPU is lost"), "train"), "KernelError: step: the GPU is"),
    ],
    ids=["wrong", "nan", "raises", "a GPU that disappears"],
)
def test_a_stage_that_fails_is_marked(
    data: Dataset, folder: Path, install: Callable[[Stage], None], engine: type, why: str
) -> None:
    install(dataclasses.replace(naive.STAGE, name="mine", engine=engine))
    with pytest.raises(Exception, match=why.partition(": ")[2]):
        measure(toy_config(), run(), data, folder)
    assert not folder.exists()
    measure(toy_config(), run(), data, folder, mark=True)
    epochs, steps, facts = tables(folder)
    assert list(epochs.status) == ["failed"]
    assert list(epochs.validated) == [False]
    assert epochs.epoch_seconds.isna().all()
    assert len(steps) == 0
    assert facts["status"] == "failed"
    assert re.match(why, facts["failed"])


def test_what_the_user_asked_for_wrongly_is_no_failure(
    data: Dataset, folder: Path, install: Callable[[Stage], None]
) -> None:
    engine = failing(ConfigError("no such thing"), "load")
    install(dataclasses.replace(naive.STAGE, engine=engine))
    with pytest.raises(ConfigError, match="no such thing"):
        measure(toy_config(), run(), data, folder, mark=True)
    assert not folder.exists()


def hanging(how: Callable[[float], object]) -> type[naive.OneByOne]:
    class Hanging(naive.OneByOne):
        def train(self, order: np.ndarray, rates: np.ndarray | None = None) -> float:
            how(60.0)
            raise AssertionError("it was to be ended")

    return Hanging


def in_a_process(work: Callable[[], object]) -> int:
    """Do the work in a forked process and return its exit code."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("mark", [True, False])
def test_a_stage_that_hangs_is_ended(
    data: Dataset, folder: Path, install: Callable[[Stage], None], mark: bool
) -> None:
    install(dataclasses.replace(naive.STAGE, name="mine", engine=hanging(time.sleep)))
    config = toy_config(measuring={"limit_seconds": 1.0})
    code = in_a_process(lambda: measure(config, run("mine"), data, folder, mark=mark))
    assert code == (0 if mark else 1)
    assert folder.exists() == mark
    if mark:
        epochs, _, facts = tables(folder)
        assert list(epochs.status) == ["failed"]
        assert "stage 'mine' hangs" in facts["failed"]
        assert "limit_seconds, 1 s" in facts["failed"]


def test_a_stage_that_hangs_in_a_library_is_ended(
    data: Dataset,
    tmp_path: Path,
    install: Callable[[Stage], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library never releases Python's lock, so nothing can be written."""
    monkeypatch.setattr("cnnlib.system.interrupts.GRACE", 0.5)
    library, hangs = ctypes.PyDLL(None), tmp_path / "hangs"

    def hang(seconds: float) -> None:
        hangs.touch()
        library.sleep(int(seconds))

    install(dataclasses.replace(naive.STAGE, engine=hanging(hang)))
    # The limit is for the whole run; on a busy machine it may be over before the stage hangs.
    for limit in (1.0, 5.0, 25.0):
        config, folder = toy_config(measuring={"limit_seconds": limit}), tmp_path / f"{limit}"
        began = time.monotonic()
        code = in_a_process(lambda to=folder, of=config: measure(of, run(), data, to, mark=True))
        if hangs.exists():
            break
    assert code == 1
    assert time.monotonic() - began < 30 + limit
    assert not folder.exists()


@pytest.mark.parametrize("stage", ["naive", "gemm"])
def test_a_batch_larger_than_the_data_set(data: Dataset, folder: Path, stage: str) -> None:
    """Only the file shows how many images it holds, not the config."""
    with pytest.raises(ConfigError, match=r"batch size 91 is larger than data set 'toy' \(90"):
        measure(toy_config(), run(stage, batch_size=91), data, folder)
    assert not folder.exists()


def test_unknown_names(data: Dataset, folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown stage 'gem' in --stage"):
        measure(toy_config(), run("gem"), data, folder)
    with pytest.raises(ConfigError, match="unknown network 'other' in --network"):
        measure(toy_config(), Run("toy", "other", "gemm", 8, 1), data, folder)


class Stop(BaseException):
    """An exception like that of a signal in the middle of a measurement."""


def test_stopped_while_writing_no_old_result_is_left(
    data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New rows beside an old run.json would be a result that was never measured."""
    measure(toy_config(), run(), data, folder)
    assert (folder / "run.json").exists()
    write = schema.write

    def stop_at_steps(path: Path, table: str, rows: Any) -> None:
        if table == "steps":
            raise Stop
        write(path, table, rows)

    monkeypatch.setattr(schema, "write", stop_at_steps)
    with pytest.raises(Stop):
        measure(toy_config(), run(), data, folder)
    assert not (folder / "run.json").exists()
    monkeypatch.undo()
    measure(toy_config(), run(), data, folder)
    assert tables(folder)[2]["status"] == "ok"


def test_stopped_before_writing_the_old_result_stays(
    data: Dataset, folder: Path, install: Callable[[Stage], None]
) -> None:
    measure(toy_config(), run(), data, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    install(dataclasses.replace(naive.STAGE, engine=failing(Stop(), "load")))
    with pytest.raises(Stop):
        measure(toy_config(), run(), data, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((UserError, OSError), match="file"):
        measure(toy_config(), run(), data, tmp_path / "file" / "inside")
    assert os.listdir(tmp_path) == ["file"]


def test_settled_is_about_the_median() -> None:
    assert not measuring.is_settled([1.0] * 4)
    assert measuring.is_settled([1.0] * 5)
    assert not measuring.is_settled([1.0, 2.0, 1.0, 2.0, 1.0])
