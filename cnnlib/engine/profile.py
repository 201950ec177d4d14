"""The time that each operator of a CPU stage takes of a training step."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cnnlib.engine.stage import Part, Planned, Setup, batch_arithmetic
from cnnlib.network import Arithmetic

PROFILED_SECONDS = 0.1
"""Training that a profile of a CPU stage watches, at least."""


class KernelTime(NamedTuple):
    """One kernel of a training step, timed on its own."""

    layer: str
    kernel: str
    layers: str
    """All the layers that its operator serves, joined by +."""
    part: Part
    flops: float
    """The least that this part of these layers needs for a batch; its kernels share it."""
    bytes: float
    """The least that must come in and go out for a batch, each byte moved once."""
    grid: int
    """Blocks; 0 for a function of numpy."""
    launches: int
    """Launches in one step; 0 for a kernel that is timed for comparison only."""
    seconds: float
    """Time of one launch: the mean of several in a row."""


def profile_operators(
    setup: Setup,
    planned: Sequence[Planned],
    operators: Sequence[object],
    step: Callable[[], object],
    update: Callable[[], object],
) -> list[KernelTime]:
    """KernelTimes of operators with methods `forward` and `backward`, one for each of them.

    `step` computes the gradient of one batch by the operators, `update` goes down it. What the step
    does besides (choosing images, the loss, adding up) counts as the loss. All times are means.
    """
    seconds: dict[tuple[int, Part], float] = defaultdict(float)

    def timed(call: Callable[..., object], index: int, part: Part) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            began = time.perf_counter()
            result = call(*arguments)
            seconds[index, part] += time.perf_counter() - began
            return result

        return run

    parts: tuple[Part, Part] = ("forward", "backward")
    for index, operator in enumerate(operators):
        for part in parts:
            setattr(operator, part, timed(getattr(operator, part), index, part))
    rounds, began = 0, time.perf_counter()
    try:
        while not rounds or time.perf_counter() - began < PROFILED_SECONDS:
            step()
            rounds += 1
    finally:
        for operator in operators:
            for part in parts:
                delattr(operator, part)
    rest = time.perf_counter() - began - sum(seconds.values())
    began = time.perf_counter()
    for _ in range(rounds):
        update()
    updating = time.perf_counter() - began

    def row(layers: str, part: Part, least: Arithmetic, total: float) -> KernelTime:
        layer = layers.partition("+")[0]
        return KernelTime(layer, "numpy", layers, part, *least, 0, 1, total / rounds)

    batch = setup.batch_size
    rows = [
        row(planned[i].name, part, planned[i].arithmetic(part, batch), total)
        for (i, part), total in seconds.items()
    ]
    return [
        *rows,
        row("batch", "loss", batch_arithmetic(setup, "loss"), rest),
        row("batch", "update", batch_arithmetic(setup, "update"), updating),
    ]
