"""The library: fit, evaluate, predict, save and load on arrays, and what it refuses."""

import copy
import dataclasses
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cnnlib
from cnnlib.datasets import Dataset
from cnnlib.engine import Stage
from cnnlib.errors import (
    ConfigError,
    DataError,
    DeviceError,
    Diverged,
    NotFitted,
    Unsupported,
    UserError,
)
from cnnlib.network import Network
from cnnlib.stages import find_stage
from cnnlib.trainer import Trainer
from cnnlib.training import target
from cnnlib.training.loop import start, train_epochs
from cnnlib.training.records import Progress
from cnnlib.training.session import Session
from cnnlib.training.target import open_engine, open_target, setup_of
from tests.support.toys import toy_config, toy_data

pytestmark = pytest.mark.quick

SETTINGS: dict[str, Any] = {"batch_size": 8, "learning_rate": 0.1, "momentum": 0.5, "seed": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


@pytest.fixture(scope="module")
def network() -> Network:
    return toy_config().network("small", "toy", "here")


@pytest.fixture
def make(network: Network) -> Iterator[Callable[..., Trainer]]:
    """Makes trainers that are closed after the test."""
    made = []

    def trainer(**settings: Any) -> Trainer:
        made.append(Trainer(network, **{"stage": "gemm", **SETTINGS, **settings}))
        return made[-1]

    yield trainer
    for each in made:
        each.close()


def test_it_trains_to_the_bit_as_the_command_line_does(
    data: Dataset, network: Network, make: Callable[..., Trainer]
) -> None:
    settings = toy_config(training={"learning_rate": 0.1, "momentum": 0.5})
    stage = find_stage("gemm", "the test")
    setup = setup_of(settings, network, data, 8)
    with open_target(stage) as where, open_engine(stage, setup, where, data) as engine:
        start(engine, 5)
        done = list(train_epochs(engine, 90, 3, 5))
        expected = engine.parameters
    trainer = make()
    records = list(trainer.fit(data.train_images, data.train_labels, epochs=3))
    assert np.array_equal(trainer.parameters, expected)
    assert [r.loss for r in records] == pytest.approx([d.loss for d in done], rel=1e-12)
    assert [(r.epoch, r.images) for r in records] == [(1, 88), (2, 88), (3, 88)]
    assert all(r.images_per_second == r.images / r.seconds for r in records)
    assert (trainer.mean, trainer.deviation) == (data.mean, data.deviation)


@pytest.mark.parametrize("stage", ["naive", "gemm"])
def test_fitting_again_continues(data: Dataset, make: Callable[..., Trainer], stage: str) -> None:
    at_once, twice = make(stage=stage), make(stage=stage)
    list(at_once.fit(data.train_images, data.train_labels, epochs=2))
    first = list(twice.fit(data.train_images, data.train_labels))
    second = list(twice.fit(data.train_images, data.train_labels))
    assert np.array_equal(at_once.parameters, twice.parameters)
    assert [r.epoch for r in first + second] == [1, 2]
    assert twice.epochs == 2


def test_one_cycle_is_one_of_each_fit(data: Dataset, make: Callable[..., Trainer]) -> None:
    constant, cycle = make(), make(schedule="one_cycle", warmup=0.3)
    for trainer in (constant, cycle):
        list(trainer.fit(data.train_images, data.train_labels))
    assert not np.array_equal(constant.parameters, cycle.parameters)


def test_dropout_weight_decay_and_the_loss_are_those_of_the_command_line(
    data: Dataset, tmp_path: Path
) -> None:
    layers = [{"dense": 6}, {"activation": "gelu"}, {"dropout": 0.5}, {"dense": 3}]
    network = Network.from_layers((1, 8, 8), 3, layers, name="small")
    kind = {
        "loss": "mean_squared_error",
        "weight_decay": 0.01,
        "initial_weights": "he",
        "momentum": 0.5,
    }
    settings = toy_config(training={"learning_rate": 0.1, "seed": 5, **kind})
    stage = find_stage("gemm", "the test")
    setup = setup_of(settings, network, data, 8)
    with open_target(stage) as where, open_engine(stage, setup, where, data) as engine:
        start(engine, 5)
        (_, done) = train_epochs(engine, 90, 2, 5)
        expected = engine.parameters
    with Trainer(network, stage="gemm", batch_size=8, seed=5, **kind) as trainer:
        list(trainer.fit(data.train_images, data.train_labels))
        (record,) = trainer.fit(data.train_images, data.train_labels)
        assert np.array_equal(trainer.parameters, expected)
        assert record.loss == pytest.approx(done.loss, rel=1e-12)
        assert trainer.steps == 22
        found = trainer.evaluate(data.test_images, data.test_labels)
        wanted = np.eye(3)[data.test_labels]
        assert found.loss == pytest.approx(
            np.mean((trainer.logits(data.test_images) - wanted) ** 2), rel=1e-6
        )
        with pytest.raises(ConfigError, match="gives no probabilities"):
            trainer.predict_proba(data.test_images)
        trainer.save(tmp_path / "w.npz")
    with Trainer.load(tmp_path / "w.npz", stage="gemm", batch_size=8) as loaded:
        assert loaded.steps == 22
        list(loaded.fit(data.train_images, data.train_labels))
        assert loaded.steps == 33


def test_evaluation_prediction_and_score_agree(data: Dataset, make: Callable[..., Trainer]) -> None:
    trainer = make()
    images, labels = data.test_images, data.test_labels
    (*_, last) = trainer.fit(
        data.train_images, data.train_labels, epochs=3, validation_data=(images, labels)
    )
    found = trainer.evaluate(images, labels)
    assert last.validation == found
    assert (last.validation_accuracy, last.validation_loss) == (found.accuracy, found.loss)
    assert found.images == 30
    assert found.accuracy == trainer.score(images, labels) > 0.5
    assert found.accuracy == np.mean(trainer.predict(images) == labels)
    probabilities = trainer.predict_proba(images)
    assert probabilities.shape == (30, 3)
    assert np.allclose(probabilities.sum(axis=1), 1)
    chosen = probabilities[np.arange(30), labels]
    assert found.loss == pytest.approx(-np.log(chosen).mean(), rel=1e-5)
    assert np.array_equal(trainer.logits(images).argmax(axis=1), trainer.predict(images))
    assert trainer.predict(images[:0]).shape == (0,)


def test_without_validation_data_there_is_no_validation(
    data: Dataset, make: Callable[..., Trainer]
) -> None:
    (record,) = make().fit(data.train_images, data.train_labels)
    assert record.validation is record.validation_accuracy is record.validation_loss is None


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors"])
def test_saved_weights_predict_the_same_and_train_on(
    data: Dataset, make: Callable[..., Trainer], tmp_path: Path, name: str
) -> None:
    trainer = make(class_names=["a", "b", "c"])
    list(trainer.fit(data.train_images, data.train_labels))
    trainer.save(tmp_path / name)
    with Trainer.load(tmp_path / name, stage="gemm", batch_size=4) as loaded:
        assert loaded.network == trainer.network
        assert loaded.class_names == ("a", "b", "c")
        assert np.array_equal(loaded.parameters, trainer.parameters)
        assert np.array_equal(loaded.logits(data.test_images), trainer.logits(data.test_images))
        list(loaded.fit(data.train_images, data.train_labels))
        assert not np.array_equal(loaded.parameters, trainer.parameters)
    with pytest.raises(ValueError, match=r"files that end in one of \.safetensors"):
        trainer.save(tmp_path / "w.weights")
    assert not (tmp_path / "w.weights").exists()
    with pytest.raises(DataError, match=r"none\.npz"):
        Trainer.load(tmp_path / "none.npz")


def test_load_of_one_trainer_is_refused_as_it_would_leave_it_as_it_is(
    data: Dataset, make: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = make()
    list(trainer.fit(data.train_images, data.train_labels))
    trainer.save(tmp_path / "weights.npz")
    with pytest.raises(ConfigError, match=r"load makes a new trainer: .* the weights of this one"):
        trainer.load(tmp_path / "weights.npz")


def test_copies_are_refused_with_what_to_do(make: Callable[..., Trainer]) -> None:
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save\(path\) writes what it has learned"):
            copied(make())


def test_parameters_can_be_set(data: Dataset, make: Callable[..., Trainer]) -> None:
    same = {"mean": data.mean, "deviation": data.deviation}
    one, other = make(**same), make(seed=6, **same)
    assert not np.array_equal(one.parameters, other.parameters)
    list(one.fit(data.train_images, data.train_labels))
    other.parameters = one.parameters
    list(other.fit(data.train_images, data.train_labels))  # from now on there is an engine
    other.parameters = one.parameters
    assert np.array_equal(one.logits(data.test_images), other.logits(data.test_images))
    with pytest.raises(ValueError, match="parameters have shape"):
        other.parameters = np.zeros(3)


def test_a_closed_trainer_keeps_its_parameters(
    data: Dataset, make: Callable[..., Trainer], tmp_path: Path
) -> None:
    with make() as trainer:
        epochs = trainer.fit(data.train_images, data.train_labels, epochs=2)
        next(epochs)
        learned = trainer.parameters
    trainer.close()
    assert np.array_equal(trainer.parameters, learned)
    trainer.save(tmp_path / "w.npz")
    with pytest.raises(ConfigError, match="closed"):
        next(epochs)
    with pytest.raises(ConfigError, match="closed"):
        trainer.fit(data.train_images, data.train_labels)
    with pytest.raises(ConfigError, match="closed"):
        trainer.predict(data.test_images)


def test_processes_end_with_a_trainer_that_is_no_longer_referenced(
    data: Dataset, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = Session.close
    monkeypatch.setattr(Session, "close", lambda self: (close(self), closed.append(self)))
    trainer = Trainer(network, stage="gemm")
    list(trainer.fit(data.train_images, data.train_labels))
    assert not closed
    del trainer
    assert len(closed) == 1


def test_a_device_that_has_gone_before_the_trainer_is_no_error(
    data: Dataset, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of a program, which closes a GPU first."""
    trainer = Trainer(network, stage="gemm")
    list(trainer.fit(data.train_images, data.train_labels))

    def gone(engine: object) -> np.ndarray:
        raise DeviceError("its device is closed")

    monkeypatch.setattr(type(trainer._session._engine), "parameters", property(gone))
    trainer._close()


def test_a_forked_process_leaves_the_trainer_alone(
    data: Dataset, make: Callable[..., Trainer]
) -> None:
    trainer = make(batch_size=32)  # for which two processes compute, where there are two cores
    list(trainer.fit(data.train_images, data.train_labels))
    if not (child := os.fork()):
        trainer.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    list(trainer.fit(data.train_images, data.train_labels))
    assert trainer.epochs == 2


def test_a_fit_that_is_dropped_warns(data: Dataset, make: Callable[..., Trainer]) -> None:
    trainer = make()
    before = trainer.parameters
    with pytest.warns(UserWarning, match="nothing was trained: fit"):
        trainer.fit(data.train_images, data.train_labels)
    assert np.array_equal(trainer.parameters, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in trainer.fit(data.train_images, data.train_labels, epochs=5):
            break
    assert trainer.epochs == 1


def test_a_fit_ends_when_another_begins(data: Dataset, make: Callable[..., Trainer]) -> None:
    trainer = make()
    one = trainer.fit(data.train_images, data.train_labels, epochs=3)
    next(one)
    list(trainer.fit(data.train_images[:40], data.train_labels[:40]))
    with pytest.raises(ConfigError, match="fitted again"):
        next(one)
    assert trainer.epochs == 2


def test_the_callback_follows_an_epoch(data: Dataset, make: Callable[..., Trainer]) -> None:
    seen: list[Progress] = []
    records = list(make().fit(data.train_images, data.train_labels, epochs=2, callback=seen.append))
    last = [[each for each in seen if each.epoch == number][-1] for number in (1, 2)]
    assert [each.step for each in last] == [each.steps for each in last] == [11, 11]
    assert [each.loss for each in last] == [record.loss for record in records]
    assert {each.last_epoch for each in seen} == {2}


def test_an_error_of_the_callback_leaves_the_steps_before_it(
    data: Dataset, make: Callable[..., Trainer]
) -> None:
    trainer = make()

    def fail(progress: Progress) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(trainer.fit(data.train_images, data.train_labels, callback=fail))
    assert trainer.epochs == 0
    assert not np.array_equal(trainer.parameters, make().parameters)
    list(trainer.fit(data.train_images, data.train_labels))
    assert trainer.epochs == 1


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of SIGINT, which a program started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("stage", ["naive", "gemm"])
def test_after_ctrl_c_the_trainer_can_go_on(
    data: Dataset, make: Callable[..., Trainer], stage: str
) -> None:
    trainer = make(stage=stage)

    def interrupt(progress: Progress) -> None:
        if progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    images, labels = data.train_images, data.train_labels
    epochs = trainer.fit(images, labels, epochs=50, callback=interrupt)
    seen = [next(epochs).epoch]
    with pytest.raises(KeyboardInterrupt):
        seen += [record.epoch for record in epochs]
    assert seen == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert np.isfinite(trainer.parameters).all()
    before = trainer.epochs
    list(trainer.fit(data.train_images, data.train_labels, epochs=2))
    assert trainer.epochs == before + 2


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_goes_back_to_the_last_epoch(
    data: Dataset, make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, undisturbed = make(), make()
    for each in (trainer, undisturbed):
        list(each.fit(data.train_images, data.train_labels))
    engine = trainer._session._engine
    assert engine is not None

    def hang(*arguments: object) -> float:
        engine.parameters = np.full_like(engine.parameters, 7)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(engine, "train", hang)
    with pytest.raises(KeyboardInterrupt):
        list(trainer.fit(data.train_images, data.train_labels))
    assert np.array_equal(trainer.parameters, undisturbed.parameters)
    for each in (trainer, undisturbed):
        list(each.fit(data.train_images, data.train_labels))
    assert np.array_equal(trainer.parameters, undisturbed.parameters)


def test_in_another_thread_it_trains_too(data: Dataset, network: Network) -> None:
    epochs = []

    def train() -> None:
        with Trainer(network, stage="gemm") as trainer:
            epochs.extend(trainer.fit(data.train_images, data.train_labels))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert len(epochs) == 1


def test_a_loss_that_is_not_finite_is_an_error(data: Dataset, make: Callable[..., Trainer]) -> None:
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) in epoch 1") as raised:
        list(make(learning_rate=1e30).fit(data.train_images, data.train_labels))
    assert isinstance(raised.value, ArithmeticError)
    assert isinstance(raised.value, UserError)


def test_images_must_be_known_to_be_normalised(
    data: Dataset, make: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = make()
    with pytest.raises(NotFitted, match="fit first"):
        trainer.predict(data.test_images)
    with pytest.raises(NotFitted):
        trainer.save(tmp_path / "w.npz")
    assert not (tmp_path / "w.npz").exists()
    assert len(make(mean=10, deviation=[20.0]).predict(data.test_images)) == 30
    with pytest.raises(ConfigError, match="all their pixels are 7"):
        trainer.fit(np.full((9, 8, 8), 7, np.uint8), np.zeros(9, int))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": "fuzed"}, "unknown stage 'fuzed' in stage; known: naive, gemm"),
        ({"stage": 3}, "stage must be a stage's name or a Stage, not 3"),
        ({"device": "gpu"}, "unknown device 'gpu'; known: auto, cpu, cuda, emulated"),
        ({"device": "cuda"}, "stage 'gemm' runs on the CPU, not on device 'cuda'"),
        ({"stage": "tuned", "device": "cpu"}, "'emulated' is those kernels compiled for the CPU"),
        ({"stage": "torch", "device": "emulated"}, "has no kernels"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, not 0"),
        ({"batch_size": 2.5}, "not 2.5"),
        ({"batch_size": True}, "not True"),
        ({"learning_rate": -1}, "learning_rate: "),
        ({"learning_rate": np.float32("nan")}, "learning_rate: "),
        ({"momentum": 1}, "momentum: "),
        ({"seed": "x"}, "seed: "),
        ({"loss": "hinge"}, "'cross_entropy' or 'mean_squared_error', not 'hinge'"),
        ({"weight_decay": -1}, "weight_decay: "),
        ({"initial_weights": "zeros"}, "initial_weights: "),
        ({"schedule": "cosine"}, "'constant' or 'one_cycle', not 'cosine'"),
        ({"mean": 3}, "given together"),
        ({"mean": 3, "deviation": 0}, "deviation 0: "),
        ({"mean": [1, 2], "deviation": 3}, "one of each of 1 channels"),
        ({"mean": "a", "deviation": "b"}, "mean is 'a'"),
        ({"class_names": ["a", "b"]}, "there are 3 classes, but 2 class_names"),
        ({"class_names": "abc"}, "class_names must be a list of texts, not 'abc'"),
        ({"class_names": [0, 1, 2]}, "not [0, 1, 2]"),
    ],
)
def test_arguments_that_are_wrong_are_named(
    make: Callable[..., Trainer], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        make(**settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, ValueError)


def test_what_the_stage_cannot_train_is_refused_at_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(Session, "close", lambda self: closed.append(self))
    stage = dataclasses.replace(find_stage("gemm", "the test"), operators={})
    with pytest.raises(Unsupported, match="has no operator for conv1 of network 'small'"):
        Trainer(network, stage=stage)
    assert len(closed) == 1


def test_auto_leaves_out_stages_that_cannot_train_the_network(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, open_device = [], target.open_device
    monkeypatch.setattr("cnnlib.device.cuda.missing_parts", lambda: [])
    monkeypatch.setattr(target, "open_device", lambda choice: open_device("emulated"))

    def refuse(where: object, stage: Stage, setup: object) -> None:
        asked.append(stage.name)
        if stage.name != "gemm":
            raise Unsupported(f"{stage.name} cannot")

    monkeypatch.setattr("cnnlib.training.session.check_supported", refuse)
    with Trainer(network) as trainer:
        assert trainer.stage == "gemm"
    assert asked == ["tuned", "ring", "fused", "gemm_cuda", "gemm"]
    with pytest.raises(Unsupported, match="tuned cannot"):
        Trainer(network, device="cuda")


OWN = """
import numpy as np
from cnnlib.engine import OwnLoop, Stage

class Still(OwnLoop):
    def prepare(self):
        self.weights = [np.zeros(p.shape, np.float32) for p in self.network.parameters]
        self.velocities = [weight.copy() for weight in self.weights]

    def forward(self, images):
        return np.zeros((len(images), self.network.classes), np.float32)

    def step(self, images, labels, rate):
        return 0.25

STAGE = Stage("still", "still", "learns nothing", runs_on="cpu", engine=Still)
"""


def test_a_stage_from_a_file_trains(
    data: Dataset, make: Callable[..., Trainer], tmp_path: Path
) -> None:
    (tmp_path / "still.py").write_text(OWN)
    trainer = make(stage=f"{tmp_path}/still.py")
    (record,) = trainer.fit(data.train_images, data.train_labels)
    assert (trainer.stage, record.loss) == ("still", 0.25)
    with pytest.raises(ConfigError, match=r"none\.py"):
        make(stage=f"{tmp_path}/none.py")


def test_numbers_of_numpy_are_numbers(make: Callable[..., Trainer]) -> None:
    trainer = make(batch_size=np.int64(4), learning_rate=np.float32(0.1), seed=np.uint8(2))
    assert "batch size 4" in repr(trainer)


def test_what_fit_refuses_it_refuses_before_it_trains(
    data: Dataset, make: Callable[..., Trainer]
) -> None:
    trainer = make(batch_size=64)
    images, labels = data.train_images, data.train_labels
    with pytest.raises(ConfigError, match="batch_size 64 is larger than the number of images, 63"):
        trainer.fit(images[:63], labels[:63])
    with pytest.raises(ConfigError, match="epochs must be"):
        trainer.fit(images, labels, epochs=0)
    with pytest.raises(ConfigError, match="validation_labels have shape"):
        trainer.fit(images, labels, validation_data=(images, images))
    with pytest.raises(ConfigError, match="a pair"):
        trainer.fit(images, labels, validation_data=images)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no images to evaluate"):
        make(mean=0, deviation=1).evaluate(images[:0], labels[:0])
    with pytest.raises(ConfigError, match=r"not a cnnlib\.Network"):
        Trainer([{"dense": 10}])  # type: ignore[arg-type]


def test_the_stage_is_chosen_by_the_machine(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnnlib.device.cuda.missing_parts", lambda: ["no driver"])
    with Trainer(network) as trainer:
        assert trainer.stage == "gemm"
        assert "thread" in trainer.device
    with Trainer(network, device="cpu") as trainer:
        assert trainer.stage == "gemm"
    with pytest.raises(DeviceError, match="no driver"):
        Trainer(network, device="cuda")


def test_emulated_kernels_train_as_the_reference_does(
    data: Dataset, make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnnlib.device.cuda.missing_parts", lambda: ["no driver"])
    images, labels = data.train_images[:16], data.train_labels[:16]
    with pytest.warns(UserWarning, match="kernels compiled for the CPU here"):
        trainer = make(stage="fused")
    reference = make(stage="naive")
    for each in (trainer, reference):
        list(each.fit(images, labels, epochs=2))
    assert np.allclose(trainer.parameters, reference.parameters, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(stage="fused", device="emulated")


def test_everything_that_is_exported_is_there() -> None:
    for name in cnnlib.__all__:
        assert getattr(cnnlib, name) is not None
    assert dir(cnnlib) == sorted(cnnlib.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Trainr'"):
        cnnlib.Trainr  # noqa: B018


@pytest.mark.gpu
def test_two_trainers_share_a_gpu(data: Dataset, make: Callable[..., Trainer]) -> None:
    """They take turns, and either may be closed first."""
    pair = [make(stage=stage, device="cuda") for stage in ("tuned", "ring")]
    reference = make(stage="naive")
    images, labels = data.train_images, data.train_labels
    fits = [trainer.fit(images, labels, epochs=2) for trainer in (*pair, reference)]
    for _ in range(2):
        losses = [next(fit).loss for fit in fits]
        assert losses == pytest.approx([losses[-1]] * 3, abs=1e-4)
    learned = pair[0].parameters
    pair[1].close()
    assert np.array_equal(pair[0].parameters, learned)
    assert np.allclose(pair[0].logits(images), reference.logits(images), atol=1e-3)


def test_each_channel_is_normalised_by_itself() -> None:
    """As in data sets of a config; a channel without contrast is named."""
    images = np.random.default_rng(0).integers(0, 50, (40, 3, 8, 8), dtype=np.uint8)
    images[:, 1] *= 5
    network = Network.from_layers((3, 8, 8), 2, [{"dense": 2}])
    with Trainer(network, stage="gemm", batch_size=8, learning_rate=0.01) as trainer:
        list(trainer.fit(images, np.arange(40) % 2))
        assert trainer.mean == pytest.approx(images.mean(axis=(0, 2, 3)))
        assert trainer.deviation == pytest.approx(images.std(axis=(0, 2, 3)))
    images[:, 2] = 9
    with Trainer(network, stage="gemm", batch_size=8, learning_rate=0.01) as trainer:
        with pytest.raises(ConfigError, match="all their pixels of channel 2 are 9; give mean and"):
            list(trainer.fit(images, np.arange(40) % 2))
