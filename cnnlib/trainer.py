"""The library's way to train a network: arrays in, arrays out, without a config file."""

from __future__ import annotations  # Sphinx then shows ArrayLike by its name

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cnnlib.engine import Bytes, Setup, Stage
from cnnlib.errors import ConfigError, Diverged, NotFitted
from cnnlib.exchange.formats import load_weights, save_weights
from cnnlib.exchange.weights import Weights
from cnnlib.layers import DEFAULT_LOSS, softmax
from cnnlib.levels import Level
from cnnlib.network import DEFAULT_SCHEME, Network
from cnnlib.training import arguments
from cnnlib.training.arrays import as_images, as_labels, as_parameters, normalisation_of
from cnnlib.training.checkpoint import State
from cnnlib.training.fit import Fit
from cnnlib.training.records import EpochRecord, Evaluation, Progress
from cnnlib.training.session import open_session
from cnnlib.training.target import setup_for

Labelled = tuple[ArrayLike, ArrayLike]
"""(images, labels)."""


UNKNOWN = 0.0, 1.0
"""Placeholders for a mean and a deviation that are not known yet."""


class Trainer:
    """Trains a network by one stage of the ladder, and evaluates and uses what it has learned.

        trainer = Trainer(network, batch_size=64, learning_rate=0.1)
        for epoch in trainer.fit(images, labels, epochs=2):
            print(epoch.loss, epoch.seconds)
        trainer.evaluate(test_images, test_labels).accuracy

    Images are bytes (N, C, H, W), or (N, H, W) where they have one channel; labels are whole
    numbers (N,) from 0 on. `cnnlib.training.arrays` says what else is taken and how it is
    converted. Networks see (byte - mean) / deviation.

    Trainings are mini-batch gradient descent, repeatable to the bit on the same machine for
    the same seed, unless the stage is one of another library. What a trainer holds on its device is
    given back by `close`, by leaving a `with` block, or when the trainer is no longer referenced.
    A trainer is used in the thread that made it.
    """

    def __init__(
        self,
        network: Network,
        *,
        stage: str | Stage = "auto",
        batch_size: int = 64,
        learning_rate: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        loss: str = DEFAULT_LOSS,
        schedule: Literal["constant", "one_cycle"] = "constant",
        warmup: float = 0.2,
        initial_weights: str = DEFAULT_SCHEME,
        seed: int = 0,
        device: str = "auto",
        mean: ArrayLike | None = None,
        deviation: ArrayLike | None = None,
        class_names: Sequence[str] = (),
        autotune: bool = True,
    ) -> None:
        """A trainer of `network` with the initial weights of `seed`.

        Args:
            network: What is trained.
            stage: A stage's name, the path of a file with one of your own, or its record. `auto`
                is the last stage of the ladder that takes the network and whose hardware this
                machine has: mostly `tuned` on a GPU, and `gemm` on a CPU.
            batch_size: Images of a training step.
            learning_rate: The rate of every step, or the peak of a cycle.
            momentum: Share of the velocity that a step keeps, from 0 to less than 1.
            weight_decay: Share of the parameters, biases included, that is added to their gradient
                before momentum.
            loss: `cross_entropy` (with softmax), or `mean_squared_error` of the logits against 1
                for the label and 0 for other classes, over images and classes.
            schedule: `constant`, or `one_cycle`: in each `fit` the rate rises from 0 in the first
                `warmup` of all steps, and falls to 0 in the others.
            warmup: Share of the steps in which it rises.
            initial_weights: Their variance: `lecun`, `glorot` or `he`, as in config.yaml.
            seed: Of the initial weights, the order of images and dropout's masks.
            device: Where a stage with kernels runs: `cuda`; `emulated`, the same kernels compiled
                for the CPU, which is for trying them and slow; or `auto`, a GPU if there is one.
                Other stages run on the `cpu`, and those of other libraries on either.
            mean: What is subtracted from each byte, in units of bytes, 0 to 255: one number, or one
                of each channel.
            deviation: What the difference is divided by, likewise. Where neither is given they are
                those of each channel of the first images that are fitted.
            class_names: What the classes are called, in their order; `save` keeps them.
            autotune: Whether a stage that has several ways to train on a GPU measures once which
                is fastest.

        Raises:
            ConfigError: An argument is wrong; it is a ValueError too.
            Unsupported: The stage has no operator for a layer of the network.
            DeviceError: The machine lacks what the device needs.
        """
        if not isinstance(network, Network):
            raise ConfigError(
                f"network is a {type(network).__name__}, not a cnnlib.Network: "
                "Network.from_layers(input_shape, classes, layers) makes one"
            )
        self._network = network
        self._training = arguments.training_of(
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            loss=loss,
            schedule=schedule,
            warmup=warmup,
            initial_weights=initial_weights,
            seed=seed,
        )
        self._batch_size = arguments.count(batch_size, "batch_size")
        stages = arguments.stages_for(stage, device)
        self._normalisation = arguments.normalisation(mean, deviation, network.input_shape[0])
        self._class_names = arguments.class_names(class_names, network.classes)
        self._autotune = autotune
        initial = network.initial_parameters(self._training.seed, scheme=initial_weights)
        self._session = open_session(stages, device, self._setup(*UNKNOWN), initial)
        self._close = weakref.finalize(self, self._session.close)
        self.load = _load_makes_another  # type: ignore[method-assign]
        if self._session.target.kind == "emulated" and device == "auto":
            warnings.warn(
                f"stage '{self.stage}' runs by kernels compiled for the CPU here, which is slow; "
                "stage='gemm' is made for a CPU, and device='emulated' says that this is meant",
                stacklevel=2,
            )

    def fit(
        self,
        images: ArrayLike,
        labels: ArrayLike,
        *,
        epochs: int = 1,
        validation_data: Labelled | None = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> Fit:
        """Train for `epochs` more epochs: an iterator that trains one epoch each time it is asked.

            for epoch in trainer.fit(images, labels, epochs=2):
                print(epoch.loss)

        `list(trainer.fit(...))` trains without a loop, and `break` ends a training early. Every
        epoch visits the images in an order of its own and drops those that do not fill a batch. A
        later `fit` continues: with the same images and a constant rate, twice one epoch is two
        epochs, to the bit.

        Ctrl-C ends the training after a whole step, within about a second, with KeyboardInterrupt;
        the trainer keeps what it has learned and can go on. A second Ctrl-C interrupts the step,
        and the trainer then goes back to the end of the last epoch.

        Args:
            images: What is trained on.
            labels: The class of each image.
            epochs: How often all images are visited.
            validation_data: (images, labels) evaluated after every epoch, off the clock.
            callback: Called with a Progress about every second, and at the end of every epoch. An
                exception that it raises ends the training.

        Raises:
            ConfigError: An argument is wrong. It is raised by the call, before anything is trained.
            Diverged: The loss of an epoch is no longer finite.
            DoesNotFit: The device has too little memory.
        """
        self._check_open()
        given, classes = self._pair(images, labels)
        count = arguments.count(epochs, "epochs")
        if not len(given):
            raise ConfigError("there are no images to train on")
        if len(given) < self._batch_size:
            raise ConfigError(
                f"batch_size {self._batch_size} is larger than the number of images, {len(given)}"
            )
        held_back = None
        if validation_data is not None:
            held_back = self._validation_pair(validation_data)
        if self._normalisation is None:
            self._normalisation = normalisation_of(given)
        return Fit(self._epochs(given, classes, count, held_back, callback), count)

    def evaluate(self, images: ArrayLike, labels: ArrayLike) -> Evaluation:
        """Accuracy and mean loss on images whose labels are known.

        Raises ConfigError for arguments that do not fit the network, NotFitted before the first
        `fit` unless mean and deviation are given.
        """
        return self._evaluate(*self._pair(images, labels))

    def score(self, images: ArrayLike, labels: ArrayLike) -> float:
        """The accuracy alone, as scikit-learn's classifiers have it."""
        return self.evaluate(images, labels).accuracy

    def predict(self, images: ArrayLike) -> NDArray[np.intp]:
        """(N,) The most probable class of each image."""
        classes: NDArray[np.intp] = self.logits(images).argmax(axis=1)
        return classes

    def predict_proba(self, images: ArrayLike) -> NDArray[np.floating]:
        """(N, classes) The probability of each class: softmax of the logits.

        Raises ConfigError where the loss is `mean_squared_error`, whose logits are no logarithms of
        probabilities.
        """
        if self._training.loss != "cross_entropy":
            raise ConfigError(
                f"a network trained by {self._training.loss} gives no probabilities; "
                "see logits and predict"
            )
        return softmax(self.logits(images))

    def logits(self, images: ArrayLike) -> NDArray[np.floating]:
        """(N, classes) What the last layer computes, float32 (float64 in stage `naive`)."""
        given = as_images(images, self._network.input_shape)
        return self._session.logits(self._known_setup(), given)

    @property
    def parameters(self) -> NDArray[np.floating]:
        """(network.parameter_count,) A copy of the flat parameter vector.

        `network.views` finds the layers' arrays in it. One that is assigned is copied; it must be
        of that length and finite. Momentum then starts anew; the count of steps goes on.
        """
        return self._session.parameters

    @parameters.setter
    def parameters(self, vector: ArrayLike) -> None:
        self._session.parameters = as_parameters(vector, self._network.parameter_count)

    def save(self, path: Path | str) -> None:
        """Write the network, its parameters and its normalisation into one file, whole or not.

        The name's ending says in which format: .safetensors and .npz suffice to load it again,
        .onnx and .pt are for other programs and need their libraries. Raises NotFitted before the
        first `fit` unless mean and deviation are given, ConfigError for another ending, UserError
        for a file that cannot be written or a library that is missing.
        """
        mean, deviation = self._known_normalisation()
        origin = {
            "stage": self.stage,
            "device": self.device,
            "seed": self._training.seed,
            "batch_size": self._batch_size,
            "epochs": self.epochs,
        }
        weights = Weights(
            self._network,
            self.parameters.astype(np.float32),
            mean,
            deviation,
            origin,
            self._class_names,
            self.steps,
        )
        save_weights(path, weights)

    @classmethod
    def load(
        cls,
        path: Path | str,
        network: Network | None = None,
        *,
        mean: ArrayLike | None = None,
        deviation: ArrayLike | None = None,
        **settings: Any,
    ) -> Self:
        """A trainer of the network and with the weights in a file.

        Most files that `save` has written say what `network`, `mean` and `deviation` are; these
        arguments are for a state_dict of PyTorch and files of other programs. `settings` are
        arguments of Trainer. They are not in a file, nor is momentum's velocity: a `fit` starts
        from these weights as a new training. Only dropout's masks go on from the number of steps
        in the file.

        Raises DataError naming the file when it is missing, damaged or incomplete.
        """
        channels = None if network is None else network.input_shape[0]
        given = arguments.normalisation(mean, deviation, channels)
        weights = load_weights(path, network, *(given or (None, None)))
        settings = {"class_names": weights.class_names, **settings}
        trainer = cls(weights.network, mean=weights.mean, deviation=weights.deviation, **settings)
        trainer.parameters = weights.parameters
        trainer._session.steps = weights.steps
        return trainer

    @property
    def network(self) -> Network:
        """The network that is trained."""
        return self._network

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, in their order; empty if they are only numbered."""
        return self._class_names

    @property
    def stage(self) -> str:
        """The name of the stage that trains."""
        return self._session.stage.name

    @property
    def device(self) -> str:
        """The name of the processor that trains."""
        return self._session.target.name

    @property
    def epochs(self) -> int:
        """Epochs trained since the trainer was made."""
        return self._session.epochs

    @property
    def steps(self) -> int:
        """Steps trained since the initial weights."""
        return self._session.steps

    @property
    def mean(self) -> Level | None:
        """What is subtracted from each byte; None until it is known."""
        return None if self._normalisation is None else self._normalisation[0]

    @property
    def deviation(self) -> Level | None:
        """What the difference is divided by; None until it is known."""
        return None if self._normalisation is None else self._normalisation[1]

    def close(self) -> None:
        """Give back the device. The parameters can still be read, set and saved."""
        if self._close.alive:
            self._session.keep()
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<Trainer of network '{self._network.name}' by stage '{self.stage}', batch size "
            f"{self._batch_size}, on {self.device}: {self.epochs} epochs trained>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Trainer holds a device and cannot be pickled or copied: save(path) writes what it "
            "has learned, and Trainer.load(path) makes a trainer of that"
        )

    def _epochs(
        self,
        images: Bytes,
        labels: Bytes,
        epochs: int,
        validation: tuple[Bytes, Bytes] | None,
        callback: Callable[[Progress], object] | None,
    ) -> Iterator[EpochRecord]:
        self._check_open()
        before = self.epochs

        def report(state: State, steps: int) -> None:
            if callback is not None:
                number, last = before + state.epoch, before + epochs
                loss = state.loss_sum / state.step if state.step else math.nan
                callback(Progress(number, last, state.step, steps, loss, state.seconds))

        setup, seed = self._known_setup(), self._training.seed
        for done in self._session.train(setup, images, labels, epochs, seed, report):
            number = before + done.epoch
            if done.diverged:
                raise Diverged(
                    f"the loss is {done.loss} in epoch {number}, after {done.images} images: "
                    f"learning_rate {self._training.learning_rate:g} may be too large"
                )
            held_back = None if validation is None else self._evaluate(*validation)
            yield EpochRecord(number, done.loss, done.seconds, done.images, held_back)

    def _evaluate(self, images: Bytes, labels: Bytes) -> Evaluation:
        if not len(images):
            raise ConfigError("there are no images to evaluate")
        setup = self._known_setup()
        logits = self._session.logits(setup, images).astype(np.float64)
        if not np.isfinite(logits).all():
            return Evaluation(math.nan, math.nan, len(images))
        losses, _ = setup.loss_function.many(logits.T, labels)
        right = float(np.mean(logits.argmax(axis=1) == labels))
        return Evaluation(right, float(losses.mean()), len(images))

    def _known_setup(self) -> Setup:
        """What the engine is made of, as soon as it is known how images are normalised."""
        self._check_open()
        return self._setup(*self._known_normalisation())

    def _setup(self, mean: Level, deviation: Level) -> Setup:
        setup = setup_for(self._training, self._network, self._batch_size, (mean, deviation))
        return dataclasses.replace(setup, tune=self._autotune)

    def _known_normalisation(self) -> tuple[Level, Level]:
        if self._normalisation is None:
            raise NotFitted(
                "it is not known how images are normalised: fit first, or give Trainer mean and "
                "deviation"
            )
        return self._normalisation

    def _pair(self, images: ArrayLike, labels: ArrayLike, where: str = "") -> tuple[Bytes, Bytes]:
        given = as_images(images, self._network.input_shape, f"{where}images")
        return given, as_labels(labels, self._network.classes, len(given), f"{where}labels")

    def _validation_pair(self, data: Labelled) -> tuple[Bytes, Bytes]:
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise ConfigError("validation_data must be a pair, (images, labels)")
        return self._pair(*data, where="validation_")

    def _check_open(self) -> None:
        if not self._close.alive:
            raise ConfigError("the trainer is closed")


def _load_makes_another(*arguments: object, **settings: object) -> NoReturn:
    """What `load` of one trainer is: read as a change of that trainer, it would do nothing."""
    raise ConfigError(
        "load makes a new trainer: trainer = Trainer.load(path); "
        "trainer.parameters = Trainer.load(path).parameters changes the weights of this one"
    )
