"""Tries a version of an exercise's stage: in another process, on small networks, without a verdict.

What comes back is arrays, and what a watched emulated device has seen of the kernels. Comparing and
judging are done here, where no line of a student's code runs.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from cnnlib.device import KernelError
from cnnlib.device.watched import Watched
from cnnlib.engine import Bytes, Setup, Stage
from cnnlib.errors import DeviceError, UserError, one_line
from cnnlib.exercises.catalogue import Exercise, find_exercise
from cnnlib.judging.remote import Worker
from cnnlib.layers import Array
from cnnlib.network import Network
from cnnlib.validation.reference import FAST_REFERENCE

SECONDS = 30.0
"""Time that one request to a student's stage may take; all of them together take a few."""
MEMORY = 8 * 2**30
"""Bytes of address space that its process may have, libraries included."""
ENVIRONMENT = {
    "CNNLIB_WATCH": "1",
    "CNNLIB_OPTIMIZE": "1",
    "CNNLIB_EMULATED_THREADS": "4",  # multiprocessors, so that blocks share work
    "CNNLIB_EMULATED_MEMORY": str(2**28),
    "PYTHONDONTWRITEBYTECODE": "1",  # files change faster than their times
}
LIMITED = ("sh", "-c", f'ulimit -v {MEMORY // 1024}; exec "$@"', "sh")
STEPS = 2
PROBLEMS = (UserError, KernelError, MemoryError)
"""What a stage's process, or what it does, can raise here."""


@dataclass
class Found:
    """What a stage gives on one network; None for what was not reached."""

    logits: Array | None = None
    gradient: Array | None = None
    """Flat, for a given derivative by the logits."""
    parameters: Array | None = None
    """After STEPS steps with momentum and weight decay."""
    pixels: Array | None = None
    """(rows * columns, parameters of the first layer) for images that have one bright pixel each;
    only asked for where the gradient of the first layer alone is wrong.
    """


@dataclass
class Trial:
    """What a stage did."""

    found: list[Found] = field(default_factory=list)
    """For each network of the exercise, as far as it came."""
    problem: str = ""
    """The exception that ended it, in one line."""
    kind: str = ""
    """That exception's class."""
    kernels: dict[str, Watched] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """What a network is tried with; all of it follows from the exercise."""

    images: Bytes
    labels: Bytes
    errors: Array
    """(batch, classes) The derivative by the logits."""
    parameters: Array

    @classmethod
    def of(cls, network: Network, batch: int) -> "Inputs":
        random = np.random.default_rng(17)
        images = random.integers(0, 256, (STEPS * batch, *network.input_shape), dtype=np.uint8)
        labels = random.integers(0, network.classes, len(images)).astype(np.uint8)
        errors = random.standard_normal((batch, network.classes))
        parameters = random.normal(0, 0.4, network.parameter_count)
        return cls(images, labels, errors, parameters)


def setup_for(exercise: Exercise, network: Network) -> Setup:
    """How the exercise's networks are trained."""
    return Setup(
        network,
        exercise.batch_size,
        learning_rate=0.05,
        momentum=0.5,
        mean=110.0,
        deviation=70.0,
        weight_decay=0.1,
    )


@functools.cache
def expected(name: str) -> tuple[Found, ...]:
    """What the reference in float64 gives on an exercise's networks."""
    exercise = find_exercise(name)

    def reference(network: Network) -> Found:
        found = Found()
        for _ in steps_of(FAST_REFERENCE, exercise, network, found):
            pass
        return found

    return tuple(map(reference, exercise.networks))


def steps_of(stage: Stage, exercise: Exercise, network: Network, found: Found) -> Iterator[None]:
    """Fill `found` one array after the other, yielding after each."""
    batch = exercise.batch_size
    given = Inputs.of(network, batch)
    with stage.engine(stage, setup_for(exercise, network)) as engine:
        engine.parameters = given.parameters
        found.logits = engine.logits(given.images[:batch])
        yield
        found.gradient = engine.backward(given.images[:batch], given.errors)
        yield
        engine.load(given.images, given.labels)
        engine.train(np.arange(STEPS * batch))
        found.parameters = engine.parameters
        yield


def pixels_of(stage: Stage, network: Network) -> Array:
    """The gradient of the first layer for one bright pixel after the other.

    The first layer is a convolution by 1 x 1. Its weights' gradient is then the error that is sent
    back to this pixel, for each of its maps.
    """
    given = Inputs.of(network, 1)
    setup = Setup(network, 1, learning_rate=0.05)
    channels, rows, columns = network.input_shape
    size = next(p.size for p in network.parameters)
    found = np.empty((rows * columns, size))
    with stage.engine(stage, setup) as engine:
        engine.parameters = given.parameters
        for pixel in range(rows * columns):
            image = np.zeros((1, channels, rows * columns), np.uint8)
            image[..., pixel] = 1
            gradient = engine.backward(image.reshape(1, *network.input_shape), given.errors)
            found[pixel] = gradient[:size]
    return found


def worker_for(stage: Path, order: str = "forward") -> Worker:
    """A process for versions of this file, with limits on its memory and on each request's time."""
    return Worker(
        str(stage),
        "emulated",
        where="the exercise",
        limit=SECONDS,
        env={**ENVIRONMENT, "CNNLIB_FIBER_ORDER": order},
        under=LIMITED,
    )


def describe_again(worker: Worker) -> None:
    """Have the process import the file anew."""
    worker.ask("forget")
    worker.described = worker.ask("describe", stage=worker.stage_name, where=worker.where).head


def attempt(worker: Worker, exercise: Exercise) -> Trial:
    """Try the stage that the worker has described."""
    trial = Trial()
    try:
        stage = worker.stage
        for network in exercise.networks:
            found = Found()
            trial.found.append(found)
            for _ in steps_of(stage, exercise, network, found):
                pass
    except PROBLEMS as error:
        if type(error) is DeviceError:
            raise  # this machine lacks something, such as a compiler
        trial.problem, trial.kind = one_line(error), type(error).__name__
    try:
        kernels = cast(dict[str, dict[str, Any]], worker.ask("watched").head["kernels"])
        trial.kernels = {name: Watched(**each) for name, each in kernels.items()}
    except PROBLEMS as error:  # the process has ended
        trial.problem = trial.problem or one_line(error)
    return trial
