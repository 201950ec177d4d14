"""Where one training step of a stage spends its time, for a reader at a terminal.

An engine that times its own kernels or operators (`Engine.profile`) says it best. For any other,
such as an author's loop, Python's profiler says in which functions the time is spent.
"""

import cProfile
import time
from typing import NamedTuple

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import noise
from cnnlib.engine import Engine, KernelTime, Order, OwnLoop
from cnnlib.measuring.cpu_profile import hottest
from cnnlib.stages import find_stage
from cnnlib.training.loop import start
from cnnlib.training.target import open_engine, open_target, setup_of

STEPS = 8
"""Steps of an epoch of a profile."""
SECONDS = 0.5
"""About how long Python's profiler watches."""
MOST_FUNCTIONS = 20


class Line(NamedTuple):
    """A kernel, an operator or a function."""

    name: str
    part: str
    """forward, backward, loss, update, ...; "" for a function."""
    calls: int
    """Launches or calls in one step; 0 for what is timed for comparison only."""
    seconds: float
    """Of all of them, in one step."""


class StepProfile(NamedTuple):
    """The lines of a profile, those with most time first."""

    device: str
    what: str
    """kernels, operators or functions."""
    lines: list[Line]


def profile_step(
    config: Config, stage_name: str, dataset: str, network: str, batch_size: int
) -> StepProfile:
    """Profile steps of a stage on noise for images; the engine is opened in this process.

    Raises what opening the engine does.
    """
    stage = find_stage(stage_name, "--stage")
    built = config.network(network, dataset, "--network")
    seed = config.training.seed
    images = noise(dataset, built.input_shape, built.classes, STEPS * batch_size)
    setup = setup_of(config, built, images, batch_size, seed)
    with (
        open_target(stage, config.sweep.device) as target,
        open_engine(stage, setup, target, images) as engine,
    ):
        start(engine, seed)
        engine.train(np.arange(STEPS * batch_size))
        # A loop knows its parts no better than this; its functions say more.
        plain = type(engine).profile in (Engine.profile, OwnLoop.profile)
        kernels = [] if plain else engine.profile()
        if kernels:
            what = "kernels" if any(each.grid for each in kernels) else "operators"
            return StepProfile(target.name, what, [line_of(kernel) for kernel in in_turn(kernels)])
        return StepProfile(
            target.name, "functions", functions(engine, np.arange(STEPS * batch_size))
        )


def in_turn(kernels: list[KernelTime]) -> list[KernelTime]:
    """Kernels by the time that they take of a step."""
    return sorted(kernels, key=lambda each: -each.launches * each.seconds)


def line_of(kernel: KernelTime) -> Line:
    """The line of a kernel or an operator."""
    seconds = max(kernel.launches, 1) * kernel.seconds
    return Line(f"{kernel.layers} {kernel.kernel}", kernel.part, kernel.launches, seconds)


def functions(engine: Engine, order: Order) -> list[Line]:
    """The functions in which the host spends most time of a step."""
    profiler, steps = cProfile.Profile(), 0
    ends = time.perf_counter() + SECONDS
    while not steps or time.perf_counter() < ends:
        profiler.enable()
        engine.train(order)
        profiler.disable()
        steps += STEPS
    return [
        Line(
            str(row["function"]),
            "",
            max(1, round(float(row["calls"]) / steps)),
            float(row["own_seconds"]) / steps,
        )
        for row in hottest(profiler)[:MOST_FUNCTIONS]
    ]
