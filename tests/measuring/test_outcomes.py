"""Runs that end otherwise: what cannot run, diverges, fails or hangs."""

import ctypes
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.device import KernelError
from cnnlib.engine import Stage
from cnnlib.engine.plans import Plans
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported
from cnnlib.measuring import schema
from cnnlib.measuring.freshness import is_sound
from cnnlib.measuring.record import summary
from cnnlib.measuring.run import ValidationFailed, measure
from cnnlib.measuring.runs import Run
from cnnlib.stages import naive, tuned
from tests.support.runs import failing, run, tables
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


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
def test_no_stage_stands_in_for_another(
    data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that a plan cannot take does not get results of another without saying so."""
    config = toy_config(networks={"wide": WIDE}, sweep={"device": "emulated", "networks": ["wide"]})
    for stage in ("ring", "tuned"):
        measure(config, Run("toy", "wide", stage, 8, 1), data, folder / stage)
    epochs, _, facts = tables(folder / "tuned")
    assert set(epochs.status) == {"ok"}
    assert (facts["engine"], facts["chosen_plan"]) == ("GraphEngine", "graph")
    assert "36,928 weights is summed in registers" in facts["plans_declined"]["persistent"]
    assert facts["plan"][-1] == "dense1: GraphDense"
    kernels = schema.read(folder / "tuned" / "kernels.csv", "kernels")
    assert {"forward", "run", "update"} <= set(kernels.kernel)  # of layers, of the head, of all
    with monkeypatch.context() as without:
        only = Plans({"persistent": tuned.PERSISTENT})
        without.setitem(vars(tuned.STAGE), "options", only)
        measure(config, Run("toy", "wide", "tuned", 8, 1), data, folder / "none")
    epochs, _, facts = tables(folder / "none")
    assert list(epochs.status) == ["unavailable"]
    assert "its 36,928 weights is summed in registers" in epochs.reason[0]
    assert facts["unavailable"] == epochs.reason[0]
    assert "plan" not in facts
    assert not len(schema.read(folder / "none" / "kernels.csv", "kernels"))
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
            how(600.0)
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
    for limit in (1.0, 5.0, 25.0, 125.0):
        config, folder = toy_config(measuring={"limit_seconds": limit}), tmp_path / f"{limit}"
        hangs.unlink(missing_ok=True)
        began = time.monotonic()
        code = in_a_process(lambda to=folder, of=config: measure(of, run(), data, to, mark=True))
        if hangs.exists() and not folder.exists():
            break
    assert code == 1
    assert time.monotonic() - began < 60 + limit
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
