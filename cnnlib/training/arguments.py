"""A trainer's settings, checked as those of a config file are."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ValidationError

from cnnlib.config import Training
from cnnlib.config_errors import first_problem, short
from cnnlib.device import CHOICES, cuda
from cnnlib.engine import Stage
from cnnlib.errors import ConfigError
from cnnlib.levels import Level, are_sound, level_of, of_channels
from cnnlib.stages import LADDER, find_stage

DEVICES = ("auto", "cpu", *CHOICES[1:])
"""What a trainer's `device` can be."""
MOST = 2**31 - 1
"""Counts are C ints in kernels."""


def training_of(**settings: Any) -> Training:
    """The settings as those of the config's `training`; ConfigError naming one that is wrong."""
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in settings.items()
    }
    try:
        return Training.model_validate({**plain, "epochs": 1})
    except ValidationError as error:
        raise ConfigError(first_problem(error, "Trainer").removeprefix("Trainer.")) from None


def count(value: object, name: str) -> int:
    """`value` as a whole number from 1 on; ConfigError naming the argument if it is none."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if isinstance(value, bool) or not 1 <= number <= MOST:
        raise ConfigError(f"{name} must be a whole number from 1 on, not {short(value)}")
    return number


def stages_for(stage: str | Stage, device: str) -> list[Stage]:
    """The stages that may be meant, best first; ConfigError where none can run on the device."""
    if device not in DEVICES:
        raise ConfigError(f"unknown device {short(device)}; known: {', '.join(DEVICES)}")
    if stage == "auto":
        return _stages_on(device)
    if isinstance(stage, Stage):
        chosen = stage
    elif isinstance(stage, str):
        chosen = find_stage(stage, "stage")
    else:
        raise ConfigError(f"stage must be a stage's name or a Stage, not {short(stage)}")
    if chosen.runs_on == "cuda" and device == "cpu":
        raise ConfigError(
            f"stage '{chosen.name}' runs by kernels, not on device 'cpu'; device 'emulated' is "
            "those kernels compiled for the CPU, and stage 'gemm' is made for it"
        )
    if chosen.runs_on == "cpu" and device in ("cuda", "emulated"):
        raise ConfigError(
            f"stage '{chosen.name}' runs on the CPU, not on device '{device}'; stages that do: "
            + ", ".join(each.name for each in LADDER if each.runs_on == "cuda")
        )
    if chosen.runs_on == "any" and device == "emulated":
        raise ConfigError(f"stage '{chosen.name}' has no kernels that could be emulated")
    return [chosen]


def _stages_on(device: str) -> list[Stage]:
    """The stages of the ladder for a device, last first; for `auto` those of this machine."""
    if device == "auto":
        kinds = {"cpu"} if cuda.missing_parts() else {"cuda", "cpu"}
    else:
        kinds = {"cpu" if device == "cpu" else "cuda"}
    return [each for each in reversed(LADDER) if each.runs_on in kinds]


def normalisation(
    mean: ArrayLike | None, deviation: ArrayLike | None, channels: int | None
) -> tuple[Level, Level] | None:
    """Both, None if neither is given; ConfigError for one alone or one that is impossible.

    The number of `channels` may not be known yet.
    """
    if mean is None and deviation is None:
        return None
    if mean is None or deviation is None:
        raise ConfigError("mean and deviation are given together, or neither is")
    try:
        both = level_of(np.asarray(mean)), level_of(np.asarray(deviation))
        for level in both if channels is not None else ():
            of_channels(level, channels or 1)
        sound = are_sound(*both)
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ConfigError(
            f"mean is {short(mean)}, deviation {short(deviation)}: each must be one number or one "
            f"of each of {channels or 'the'} channels, and the second above 0"
        )
    return both


def class_names(names: Sequence[str], classes: int) -> tuple[str, ...]:
    """The names; ConfigError unless there is one of each class, or none at all."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"class_names must be a list of texts, not {short(names)}")
    if len(names) not in (0, classes):
        raise ConfigError(f"there are {classes} classes, but {len(names)} class_names")
    return tuple(str(name) for name in names)
