"""The training loop: its order, its end, and checkpoints that change nothing."""

import dataclasses
import itertools
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import Engine, Stage
from cnnlib.engine.learning_rate import Schedule
from cnnlib.errors import ConfigError, DataError, DeviceError
from cnnlib.stages import find_stage, naive
from cnnlib.system.interrupts import Stopped
from cnnlib.training.checkpoint import Checkpoint, State
from cnnlib.training.loop import Epoch, accuracy, batches, epoch_order, start, train_epochs
from cnnlib.training.target import Target, open_engine, open_target, setup_of
from tests.support.toys import toy_config, toy_data

pytestmark = pytest.mark.quick

COUNT, SIZE, SEED = 90, 8, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


@contextmanager
def opened(
    data: Dataset, stage: str = "gemm", size: int = SIZE, config: Config | None = None
) -> Iterator[Engine]:
    config = config or toy_config()
    network, chosen = config.network("small", "toy", "here"), find_stage(stage, "here")
    with (
        open_target(chosen, config.sweep.device) as target,
        open_engine(chosen, setup_of(config, network, data, size), target, data) as engine,
    ):
        start(engine, SEED)
        yield engine


def trained(data: Dataset, epochs: int, **options: Any) -> tuple[np.ndarray, list[Epoch]]:
    with opened(data) as engine:
        done = list(train_epochs(engine, COUNT, epochs, SEED, **options))
        return engine.parameters, done


def test_an_order_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(COUNT, seed, epoch) for seed in (1, 2) for epoch in (1, 2)]
    for order in orders:
        assert sorted(order) == list(range(COUNT))
    for a, b in itertools.combinations(orders, 2):
        assert (a != b).any()
    np.testing.assert_array_equal(orders[0], epoch_order(COUNT, 1, 1))


def test_batches_walk_through_an_order_with_its_rates() -> None:
    order, rates = epoch_order(COUNT, 1, 1), np.arange(COUNT // SIZE) / 10
    whole = list(batches(order, rates, size=SIZE))
    assert len(whole) == COUNT // SIZE
    for step, chunk in enumerate(whole):
        np.testing.assert_array_equal(chunk.order, order[step * SIZE : (step + 1) * SIZE])
        assert chunk.rates is not None
        np.testing.assert_array_equal(chunk.rates, rates[step : step + 1])
        assert (chunk.first, chunk.end) == (step * SIZE, (step + 1) * SIZE)
    assert all(chunk.rates is None for chunk in batches(order, size=SIZE))


def test_chunks_are_as_long_as_the_caller_asks_when_they_are_due() -> None:
    """Each length is asked for late, the last chunk ends with the last whole batch, and a rate
    belongs to the chunk in which its step ends.
    """
    order, rates, asked = epoch_order(COUNT, 1, 1), np.arange(COUNT // SIZE), [3, 30, 2]

    def lengths() -> Iterator[int]:
        while True:
            yield asked.pop(0)

    found = []
    for chunk in batches(order, rates, size=SIZE, lengths=lengths(), first=5):
        assert chunk.rates is not None
        found.append((chunk.first, chunk.end, chunk.rates.tolist()))
        asked.append(60)
    assert found == [
        (5, 8, [0]),
        (8, 38, [1, 2, 3]),
        (38, 40, [4]),
        (40, 88, [5, 6, 7, 8, 9, 10]),
    ]


def test_the_loop_is_plain_gradient_descent(data: Dataset) -> None:
    """v <- momentum v + gradient, w <- w - rate v, batch by batch, the rest left out."""
    with opened(data, "naive") as engine, opened(data, "naive") as other:
        rate, momentum = engine.setup.learning_rate, engine.setup.momentum
        weights, velocity = other.parameters, np.zeros_like(other.parameters)
        losses = []
        for epoch in (1, 2):
            order = epoch_order(COUNT, SEED, epoch)
            for batch in np.split(order[: COUNT // SIZE * SIZE], COUNT // SIZE):
                other.parameters = weights
                loss, gradient = other.gradient(data.train_images[batch], data.train_labels[batch])
                velocity = momentum * velocity + gradient
                weights = weights - rate * velocity
                losses.append(loss)
        done = list(train_epochs(engine, COUNT, 2, SEED))
        np.testing.assert_allclose(engine.parameters, weights, rtol=1e-12)
    steps = COUNT // SIZE
    assert [epoch.epoch for epoch in done] == [1, 2]
    assert [epoch.images for epoch in done] == [88, 88]
    assert [epoch.loss for epoch in done] == pytest.approx(
        [np.mean(losses[:steps]), np.mean(losses[steps:])]
    )
    assert all(epoch.seconds > 0 and not epoch.diverged for epoch in done)


def test_the_toy_is_learnt(data: Dataset) -> None:
    with opened(data) as engine:
        before = accuracy(engine, data.test_images, data.test_labels)
        done = list(train_epochs(engine, COUNT, 10, SEED))
        after = accuracy(engine, data.test_images, data.test_labels)
    assert done[-1].loss < done[0].loss / 2
    assert after > max(0.9, before)


def test_reporting_changes_nothing(data: Dataset) -> None:
    plain, _ = trained(data, 3)
    said: list[tuple[int, int]] = []
    reported, _ = trained(
        data, 3, report=lambda state, steps: said.append((state.epoch, state.step))
    )
    np.testing.assert_array_equal(plain, reported)
    assert [step for epoch, step in said if epoch == 1][-1] == COUNT // SIZE
    assert {epoch for epoch, _ in said} == {1, 2, 3}


class Killed(BaseException):
    """What a signal does to a training."""


@pytest.mark.parametrize("stage", ["naive", "gemm"])
@pytest.mark.parametrize("kill_at", [1, 7, 11, 12, 33])
def test_a_training_resumes_bit_for_bit(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, kill_at: int
) -> None:
    """A training that is killed and resumes from its checkpoint ends with the same bits."""
    with opened(data, stage) as engine:
        list(train_epochs(engine, COUNT, 3, SEED))
        expected = engine.parameters, engine.velocity
    monkeypatch.setattr("cnnlib.training.loop.CHUNK_SECONDS", 0.0)  # one step at a time
    checkpoint = tmp_path / "checkpoint.npz"
    blocks = itertools.count(1)

    def kill(state: State, steps: int) -> None:
        if next(blocks) == kill_at:
            raise Killed

    options: dict[str, Any] = dict(checkpoint=checkpoint, seconds_between=0.0)
    with opened(data, stage) as engine:
        epochs = train_epochs(engine, COUNT, 3, SEED, report=kill, **options)
        with pytest.raises(Killed):
            list(epochs)
    with opened(data, stage) as engine:
        if checkpoint.exists():
            engine.parameters = np.full_like(engine.parameters, np.nan)  # all comes from the file
        again = list(train_epochs(engine, COUNT, 3, SEED, **options))
        np.testing.assert_array_equal(engine.parameters, expected[0])
        np.testing.assert_array_equal(engine.velocity, expected[1])
    assert again[-1].epoch == 3
    assert all(epoch.images == 88 and epoch.seconds > 0 for epoch in again)


def test_a_finished_training_has_nothing_left(data: Dataset, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.npz"
    weights, _ = trained(data, 2, checkpoint=checkpoint)
    again, done = trained(data, 2, checkpoint=checkpoint)
    assert done == []
    np.testing.assert_array_equal(again, weights)
    further, done = trained(data, 3, checkpoint=checkpoint)
    assert [epoch.epoch for epoch in done] == [3]
    np.testing.assert_array_equal(further, trained(data, 3)[0])


@pytest.mark.parametrize("stage", ["naive", "gemm"])
def test_a_loss_that_is_not_finite_ends_it(data: Dataset, tmp_path: Path, stage: str) -> None:
    config = toy_config(training={"learning_rate": 1e30})
    checkpoint = tmp_path / "checkpoint.npz"
    with opened(data, stage, config=config) as engine, np.errstate(all="ignore"):
        done = list(train_epochs(engine, COUNT, 5, SEED, checkpoint=checkpoint))
        assert math.isnan(accuracy(engine, data.test_images, data.test_labels))
    assert len(done) == 1
    assert done[0].diverged
    assert not checkpoint.exists()


ONE_CYCLE = toy_config(training={"schedule": "one_cycle", "warmup": 0.25})


@pytest.mark.parametrize("stage", ["naive", "gemm"])
def test_one_cycle(data: Dataset, tmp_path: Path, stage: str) -> None:
    """Step by step, in blocks and from a checkpoint the rates are those of the schedule."""
    steps, checkpoint = COUNT // SIZE, tmp_path / "checkpoint.npz"
    with opened(data, stage, config=ONE_CYCLE) as engine:
        rates = Schedule(engine.setup.learning_rate, 0.25)
        for epoch in (1, 2):
            order, due = epoch_order(COUNT, SEED, epoch), rates.rates(epoch, 2, steps)
            for step in range(steps):
                engine.train(order[step * SIZE : (step + 1) * SIZE], due[step : step + 1])
        expected = engine.parameters
    with opened(data, stage, config=ONE_CYCLE) as engine:
        list(train_epochs(engine, COUNT, 2, SEED))
        np.testing.assert_allclose(engine.parameters, expected, rtol=1e-12)
    seen = 0

    def stop() -> int:
        nonlocal seen
        seen += 1
        return signal.SIGTERM if seen == 2 else 0

    with opened(data, stage, config=ONE_CYCLE) as engine, pytest.raises(Stopped):
        list(train_epochs(engine, COUNT, 2, SEED, checkpoint=checkpoint, stop=stop))
    with opened(data, stage, config=ONE_CYCLE) as engine:
        list(train_epochs(engine, COUNT, 2, SEED, checkpoint=checkpoint))
        np.testing.assert_allclose(engine.parameters, expected, rtol=1e-12)
    with opened(data, stage, config=ONE_CYCLE) as engine:
        problem = "another training: epochs differs"
        with pytest.raises(DataError, match=problem):
            list(train_epochs(engine, COUNT, 3, SEED, checkpoint=checkpoint))


def saved_checkpoint(data: Dataset, path: Path) -> None:
    with opened(data) as engine:
        Checkpoint(path, engine, COUNT, SEED, 2).save(State(epoch=2, step=3))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(stage="naive"), "stage"),
        (dict(size=9), "batch_size"),
        (dict(config=toy_config(training={"learning_rate": 0.2})), "learning_rate"),
        (dict(config=toy_config(training={"momentum": 0.0})), "momentum"),
        (dict(config=toy_config(training={"schedule": "one_cycle"})), "warmup"),
        (
            dict(
                config=toy_config(
                    networks={"small": [{"conv": {"maps": 3, "kernel": 3}}, {"dense": 3}]}
                )
            ),
            "layers",
        ),
    ],
)
def test_a_checkpoint_of_another_training(
    data: Dataset, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    path = tmp_path / "checkpoint.npz"
    saved_checkpoint(data, path)
    problem = rf"checkpoint\.npz belongs to another training: {name} differs; remove it"
    with opened(data, **change) as engine, pytest.raises(DataError, match=problem):
        next(train_epochs(engine, COUNT, 3, SEED, checkpoint=path))
    with opened(data) as engine, pytest.raises(DataError, match="seed differs"):
        next(train_epochs(engine, COUNT, 3, SEED + 1, checkpoint=path))
    with opened(data) as engine, pytest.raises(DataError, match="images differs"):
        next(train_epochs(engine, COUNT - 1, 3, SEED, checkpoint=path))


def test_a_checkpoint_of_other_labels(data: Dataset, tmp_path: Path) -> None:
    """Mean and deviation do not show it, and old checkpoints hold no digest of the labels."""
    path = tmp_path / "checkpoint.npz"
    with opened(data) as engine:
        Checkpoint(path, engine, COUNT, SEED, 2).save(State(epoch=2))
    other = dataclasses.replace(data, train_labels=data.train_labels[::-1].copy())
    with opened(other) as engine:
        checkpoint = Checkpoint(path, engine, COUNT, SEED, 2)
        with pytest.raises(DataError, match="another training: labels differs; remove it"):
            checkpoint.load()
        with np.load(path) as saved:
            np.savez(path, **{name: saved[name] for name in saved.files if name != "labels"})
        assert checkpoint.load().epoch == 2


def test_damaged_checkpoints(data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    saved_checkpoint(data, path)
    whole = path.read_bytes()
    with np.load(path) as saved:
        arrays = dict(saved)

    def refused(problem: str) -> None:
        with opened(data) as engine:
            before = engine.parameters
            with pytest.raises(DataError, match=problem):
                next(train_epochs(engine, COUNT, 3, SEED, checkpoint=path))
            np.testing.assert_array_equal(engine.parameters, before)

    for content in (b"", b"foreign", whole[:100], whole[:-30]):
        path.write_bytes(content)
        refused(r"checkpoint .*checkpoint\.npz is damaged")
    for name, value in (
        ("epoch", 0),
        ("epoch", "one"),
        ("epoch", math.inf),
        ("step", -1),
        ("step", 12),
        ("step", [1, 2]),
        ("parameters", arrays["parameters"][:-1]),
        ("velocity", arrays["velocity"][np.newaxis]),
        ("parameters", arrays["parameters"].astype(np.float64)),
        ("velocity", np.full(arrays["velocity"].shape, "x")),
    ):
        np.savez(path, **(arrays | {name: value}))
        refused(r"checkpoint\.npz is damaged; remove it to start again")
    np.savez(path, **{name: value for name, value in arrays.items() if name != "velocity"})
    refused("lacks velocity")


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    data: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Exception, match="cannot write .*file/checkpoint"):
        trained(data, 1, checkpoint=tmp_path / "file" / "checkpoint.npz")


def test_a_batch_larger_than_the_data_set(data: Dataset) -> None:
    with (
        pytest.raises(ConfigError, match=r"batch size 91 is larger than data set 'toy' \(90 train"),
        opened(data, size=91),
    ):
        pass


def test_a_batch_as_large_as_the_data_set(data: Dataset) -> None:
    with opened(data, size=COUNT) as engine:
        (done,) = train_epochs(engine, COUNT, 1, SEED)
    assert done.images == COUNT


class Ignoring(naive.OneByOne):
    """An engine of a stage that wants a GPU."""


GPU_STAGE = Stage("fake_gpu", "fake", "nothing", "cuda", Ignoring, naive.STAGE.operators)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnlib.device.cuda import missing_parts

    if not missing_parts():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError), open_target(GPU_STAGE, "cuda"):
        pass


def test_a_cpu_stage_opens_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnlib.training.target.open_device", lambda choice: 1 / 0)
    with open_target(naive.STAGE, "cuda") as target:
        assert target == Target(target.name, "cpu", None)
        assert target.name.endswith("1 thread")


def test_a_device_is_closed_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Fake:
        name, kind, pci_bus_id = "fake", "emulated", None

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr("cnnlib.training.target.open_device", lambda choice: Fake())
    with pytest.raises(Killed), open_target(GPU_STAGE) as target:  # noqa: PT012
        assert (target.name, target.kind) == ("fake", "emulated")
        raise Killed
    assert closed == [True]
