"""kill -9 at random moments: a training that resumes from its checkpoint ends with the same bits.

Each training is killed in a process forked from this one: no time goes into starting Python.
`CNNLIB_KILLS=300` kills that often in all, at other moments each time.
"""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.measuring.run import measure
from cnnlib.measuring.runs import Run
from cnnlib.stages import LADDER
from cnnlib.system.interrupts import Stopped
from cnnlib.system.machine import usable_cores
from cnnlib.training.loop import Epoch, start, train_epochs
from cnnlib.training.target import open_engine, open_target, setup_of
from tests.support.toys import toy_config, toy_data

COUNT, SIZE, SEED, EPOCHS = 90, 8, 5, 4
CASES = [(stage, momentum) for stage in LADDER for momentum in (0.0, 0.9)]
AFTER_SECONDS = 0.08
"""In which a training takes several steps and saves each."""
KILLS = int(os.environ.get("CNNLIB_KILLS", "60"))
"""In all; shared out to the cases."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


def train(data: Dataset, stage: Any, momentum: float, checkpoint: Path | None) -> tuple[Any, ...]:
    """The state at the end and what each epoch did, trained unit by unit and saved after each."""
    config = toy_config(training={"momentum": momentum}, sweep={"device": "emulated"})
    network = config.network("small", "toy", "here")
    epochs: list[Epoch] = []
    with (
        open_target(stage, config.sweep.device) as target,
        open_engine(stage, setup_of(config, network, data, SIZE), target, data) as engine,
    ):
        start(engine, SEED)
        for done in train_epochs(
            engine,
            COUNT,
            EPOCHS,
            SEED,
            checkpoint=checkpoint,
            seconds_between=0.0,
            report=lambda state, steps: None,
        ):
            epochs.append(done)
        return engine.parameters, engine.velocity, {e.epoch: e.loss for e in epochs}


def forked(call: Any) -> int:
    """Pid of a process that makes the call; its exit code is 0 if that came to its end."""
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # it has done so itself, and may have ended
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)  # with its own children, it is killed as a whole
        call()
        code = 0
    finally:
        os._exit(code)


def saved_at(checkpoint: Path) -> int:
    """When it was saved; 0 if it is not there."""
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


def kill(child: int, after: float, checkpoint: Path, saved: int | None) -> bool:
    """kill -9 so many seconds after the checkpoint was next saved (`saved`: when it was last; None:
    not waited for); False if it had come to its end before.
    """
    deadline = time.monotonic() + 60
    ended, status = 0, 0
    while saved is not None and not ended and saved_at(checkpoint) == saved:
        assert time.monotonic() < deadline, "nothing is saved"
        time.sleep(0.0005)
        ended, status = os.waitpid(child, os.WNOHANG)
    time.sleep(after)
    if not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        assert status == 0, "it failed by itself"
        return False
    os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def where(checkpoint: Path) -> tuple[int, int, int]:
    """(epoch, images done, whether within a step) in a checkpoint; zeros where there is none."""
    if not checkpoint.exists():
        return 0, 0, 0
    with np.load(checkpoint) as saved:  # a damaged one would fail here
        images = int(saved["images_done"])
        return int(saved["epoch"]), images, images % SIZE


@pytest.mark.parametrize(
    ("stage", "momentum"), CASES, ids=[f"{stage.name}-{momentum}" for stage, momentum in CASES]
)
def test_the_same_bits_after_kills(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any, momentum: float
) -> None:
    monkeypatch.setattr("cnnlib.training.loop.CHUNK_SECONDS", 0.0)
    seed = 7 if "CNNLIB_KILLS" not in os.environ else random.SystemRandom().randrange(2**32)
    print(f"moments drawn from seed {seed}")
    moments = random.Random(f"{seed} {stage.name} {momentum}")
    checkpoint = tmp_path / "checkpoint.npz"
    train(data, stage, momentum, tmp_path / "other.npz")  # so that kernels are compiled
    began = time.perf_counter()
    expected = train(data, stage, momentum, None)
    seconds = time.perf_counter() - began
    begun_again, within, killed, wanted = 0, 0, 0, -(-KILLS // len(CASES))
    # on a machine so quick that each of them came before or after all that is looked for, some more
    while killed < wanted or (
        killed < wanted + 50 and not (begun_again and (within or stage.name != "naive"))
    ):
        for _ in range(200):
            before, saved = where(checkpoint), saved_at(checkpoint)
            child = forked(lambda: train(data, stage, momentum, checkpoint))
            # one in six at any moment, also before anything is saved
            early = moments.random() < 1 / 6
            after = moments.uniform(0, seconds if early else AFTER_SECONDS)
            if kill(child, after, checkpoint, None if early else saved):
                break
            checkpoint.unlink()  # it had come to its end: from the start again
        else:
            pytest.fail("it always came to its end before it could be killed")
        killed += 1
        begun_again += before != (0, 0, 0)
        within += before[2] != 0
    weights, velocity, losses = train(data, stage, momentum, checkpoint)
    np.testing.assert_array_equal(weights, expected[0])
    np.testing.assert_array_equal(velocity, expected[1])
    assert losses.items() <= expected[2].items()
    print(f"{killed} kills, {begun_again} of resumed trainings, {within} within a step")
    assert begun_again > 0, "no training was killed that had resumed from a checkpoint"
    assert within > 0 or stage.name != "naive", "none within a step"


def test_a_full_measurement_goes_on(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of epochs that had ended are kept, the others are as undisturbed; nothing is left."""
    monkeypatch.setattr("cnnlib.training.loop.CHUNK_SECONDS", 0.0)
    config = toy_config(
        measuring={"full": True, "budget_seconds": 1e-6},
        training={"epochs": 3},
    )
    run = Run("toy", "small", "naive", 32, 1)
    measure(config, run, data, tmp_path / "undisturbed")
    calls = 0

    def stop_in_the_second_epoch() -> int:
        nonlocal calls
        calls += 1
        return int(signal.SIGUSR1) if calls == 64 + 13 else 0

    folder, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    with pytest.raises(Stopped, match="SIGUSR1"):
        measure(config, run, data, folder, checkpoints=checkpoints, stop=stop_in_the_second_epoch)
    assert not folder.exists()
    (saved,) = checkpoints.rglob("*.npz")
    assert where(saved)[2], "the test is to stop within a step"
    measure(config, run, data, folder, checkpoints=checkpoints)
    assert not list(checkpoints.rglob("*.npz"))
    resumed = [
        json.loads((tmp_path / name / "run.json").read_text()).get("resumed", False)
        for name in ("undisturbed", "run")
    ]
    assert resumed == [False, True]
    rows = [
        [line.split(",") for line in (tmp_path / name / "epochs.csv").read_text().splitlines()]
        for name in ("undisturbed", "run")
    ]
    same = [i for i, name in enumerate(rows[0][0]) if not name.endswith("_seconds")]
    assert len(rows[0]) == 4
    for first, second in zip(*rows, strict=True):
        assert [first[i] for i in same] == [second[i] for i in same]


@pytest.mark.skipif(usable_cores() < 2, reason="one core is one core everywhere")
def test_other_cores_are_warned_of(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemm = next(stage for stage in LADDER if stage.name == "gemm")
    train(data, gemm, 0.0, tmp_path / "c.npz")
    monkeypatch.setattr("cnnlib.training.checkpoint.usable_cores", lambda: 64)
    with pytest.warns(UserWarning, match="here are 64: the last bits may differ"):
        train(data, gemm, 0.0, tmp_path / "c.npz")
