"""The state of an unfinished training, saved so that it continues bit for bit."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnlib.engine import Engine
from cnnlib.engine.image_by_image import continue_step, unfinished_of, unit_of
from cnnlib.errors import DataError
from cnnlib.files import read_arrays, write_whole
from cnnlib.levels import Level
from cnnlib.system.machine import usable_cores

Fact = str | int | float

LATER = {"labels", "loss", "weight_decay", "steps"}
"""Arrays that checkpoints of earlier versions do not have."""


@dataclass
class State:
    """The position of a training within its epochs."""

    epoch: int = 1
    step: int = 0
    """Steps of this epoch that are done."""
    images_done: int = 0
    """Images of this epoch that have been trained on. They are more than those of the finished
    steps where an engine can be interrupted within a step (cnnlib.engine.image_by_image).
    """
    seconds: float = 0.0
    """Time on the clock in this epoch."""
    loss_sum: float = 0.0
    """Sum of the mean losses of the finished steps."""

    def advance(self, seconds: float, loss_sum: float, images_done: int, batch_size: int) -> None:
        """Move on to `images_done`; steps with this sum of losses ended within `seconds`."""
        self.seconds += seconds
        self.loss_sum += loss_sum
        self.images_done, self.step = images_done, images_done // batch_size


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training: `engine` on `count` images for `epochs` epochs from `seed`."""

    path: Path
    engine: Engine
    count: int
    seed: int
    epochs: int

    def exists(self) -> bool:
        return self.path.exists()

    def save(self, state: State, notes: str = "") -> None:
        """Write the training as it is now, with the caller's `notes`, as an .npz file.

        Its arrays are `parameters` and `velocity` (parameter_count,), `unfinished` (what
        image_by_image.unfinished_of returns) and, as scalars, `steps`, `cores`, `notes`, the
        fields of `state` and what identifies the training (`_identity`). The previous checkpoint
        stays in place until the new one is complete.
        """
        facts: dict[str, Any] = self._identity() | vars(state)
        with write_whole(self.path) as temporary, open(temporary, "wb") as out:
            np.savez(
                out,
                parameters=self.engine.parameters,
                velocity=self.engine.velocity,
                steps=self.engine.steps,
                unfinished=unfinished_of(self.engine),
                cores=usable_cores(),
                notes=notes,
                **facts,
            )

    def load(self) -> State:
        """Put the saved parameters and velocity into the engine and return the position.

        Warns when the checkpoint was made with another number of cores, because sums over several
        cores may then round differently. Raises DataError naming the file when it is damaged or
        belongs to another training.
        """
        path, engine = self.path, self.engine
        wanted = self._identity()
        fields = vars(State())
        names = {*wanted, *fields, "parameters", "velocity", "unfinished", "cores"} - LATER
        saved = read_arrays(path, names, "checkpoint", sorted(LATER))
        remedy = "remove it to start again"
        for name, value in wanted.items():
            # Checkpoints of earlier versions lack some facts, which then had their defaults.
            if not np.array_equal(saved.get(name, value), value):
                raise DataError(
                    f"checkpoint {path} belongs to another training: {name} differs; {remedy}"
                )
        vectors = [saved["parameters"], saved["velocity"]]
        try:
            state = State(
                **{name: type(value)(saved[name].item()) for name, value in fields.items()}
            )
            size, unit = engine.setup.batch_size, unit_of(engine)
            sound = (
                state.epoch >= 1
                and 0 <= state.images_done <= self.count // size * size
                and state.images_done % unit == 0
                and state.step == state.images_done // size
                and all(vector.shape == (engine.network.parameter_count,) for vector in vectors)
                and all(vector.dtype == engine.parameters.dtype for vector in vectors)
            )
            cores = int(saved["cores"].item())
            steps = int(saved["steps"].item()) if "steps" in saved else 0
            if sound:
                continue_step(engine, saved["unfinished"])
        except (TypeError, ValueError, OverflowError):
            sound = False
        if not sound:
            raise DataError(f"checkpoint {path} is damaged; {remedy}")
        if engine.stage.threads is None and cores != usable_cores():
            warnings.warn(
                f"checkpoint {path} was made with {cores} cores, here are {usable_cores()}: the "
                "last bits may differ from those of an undisturbed training",
                stacklevel=2,
            )
        engine.parameters, engine.velocity = vectors
        engine.steps = steps
        return state

    def _identity(self) -> dict[str, Fact]:
        """Everything that decides how a training continues from a given state.

        Images are identified by their number, mean and deviation only.
        """
        engine, setup = self.engine, self.engine.setup
        layers = [{layer.kind: layer.settings} for layer in engine.network.layers]
        return {
            "stage": engine.stage.name,
            "network": engine.network.name,
            "layers": json.dumps(layers, sort_keys=True),
            "batch_size": setup.batch_size,
            "learning_rate": setup.learning_rate,
            "momentum": setup.momentum,
            # A cycle ends with its last epoch. A training at a constant rate may be given more.
            "warmup": math.inf if setup.warmup is None else setup.warmup,
            "epochs": 0 if setup.warmup is None else self.epochs,
            "mean": _fact_of(setup.mean),
            "deviation": _fact_of(setup.deviation),
            "images": self.count,
            "seed": self.seed,
            "labels": setup.labels,
            "loss": setup.loss,
            "weight_decay": setup.weight_decay,
        }


def _fact_of(level: Level) -> Fact:
    """A mean or a deviation, as text where each channel has its own."""
    return json.dumps(level) if isinstance(level, tuple) else level


def read_notes(path: Path) -> str:
    """The caller's notes in a checkpoint; DataError if it is damaged."""
    notes = read_arrays(path, ["notes"], "checkpoint")["notes"]
    return str(notes.item()) if notes.dtype.kind == "U" and notes.ndim == 0 else ""
