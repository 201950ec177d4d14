"""One training step of each GPU stage as a lane of blocks on a common axis of microseconds.

The blocks are the kernels of the step in the order in which they run or, for a stage that takes
whole steps in one launch, its phases. Each was timed singly, so that they show what a step is made
of, not when each part began; where they add up to less than the step took, the rest is drawn as
waiting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workflow.plotting import ladder, style, wording
from workflow.report.shown import Shown

COLOURS = {
    "input": "#b9a3d6",
    "forward": "#8cc9ee",
    "loss": "#e3a5cb",
    "backward": "#f2bd62",
    "update": "#74c9ab",
    "barrier": "#8a8a8a",
    "waiting": "#dedede",
}
"""A colour for each kind of block; ink is readable on all of them but that of barriers."""
BARRIERS = 2
"""Barriers of the whole grid in a step of a stage that takes a step in two phases."""
NEGLIGIBLE = 0.02
"""Share of a step below which what remains of it is not drawn."""


PARTS = (
    "arithmetic at the peak",
    "launches",
    "barriers of the grid",
    "loads, stores and waiting inside kernels",
    "host: gathering, waiting",
)
"""What a step's time goes into, as far as it is known."""


@dataclass(frozen=True)
class Block:
    """A part of a step: `start` and `length` in microseconds."""

    name: str
    kind: str
    start: float
    length: float
    kernel: str
    layers: str
    hint: str

    @property
    def color(self) -> str:
        """The colour of its kind."""
        return COLOURS.get(self.kind, COLOURS["waiting"])


@dataclass(frozen=True)
class Lane:
    """The step of one stage."""

    stage: str
    title: str
    color: str
    blocks: tuple[Block, ...]
    launches: int
    kernels: float
    """Microseconds of all kernels or phases, each timed singly."""
    step: float
    """Microseconds of a step in whole epochs; nan if it was not measured."""
    one_launch: bool
    """Whether a launch takes more than a step: then the blocks are phases of one kernel."""

    @property
    def end(self) -> float:
        """Where the last block ends."""
        last = self.blocks[-1]
        return last.start + last.length


@dataclass(frozen=True)
class Shares:
    """Where a step's time goes, in microseconds; all parts together are the step."""

    stage: str
    title: str
    parts: tuple[tuple[str, float, str], ...]
    """(name, microseconds, as it is written)"""
    step: float


@dataclass(frozen=True)
class Section:
    """Where one block was during a part of a step; microseconds since the step began."""

    block: int
    start: float
    length: float
    color: str
    hint: str


@dataclass(frozen=True)
class Clocks:
    """One step of a stage by the clocks of all its blocks."""

    title: str
    color: str
    step: int
    blocks: int
    length: float
    """Microseconds of the step, from the first mark to the last."""
    sections: tuple[Section, ...]


def clocks(shown: Shown, size: int) -> list[Clocks]:
    """Of each stage whose blocks recorded their clocks on a GPU, the step of median length."""
    rows = shown.table("timeline")
    if rows.empty:
        return []
    rows = rows[
        (rows["device_kind"] == "cuda") & (rows["status"] == "ok") & (rows["batch_size"] == size)
    ]
    found = []
    for stage in ladder.ordered(rows["stage"]):
        own = rows[rows["stage"] == stage]
        spans = own.groupby("step").agg(begin=("begin_seconds", "min"), end=("end_seconds", "max"))
        lengths = (spans["end"] - spans["begin"]).sort_values(kind="stable")
        step = int(lengths.index[len(lengths) // 2])
        zero = float(spans["begin"][step])
        of_step = own[own["step"] == step]
        found.append(
            Clocks(
                wording.title(stage),
                style.mark(stage).color,
                step,
                own["block"].nunique(),
                1e6 * float(lengths[step]),
                tuple(section(row, zero) for _, row in of_step.iterrows()),
            )
        )
    return found


def section(row: pd.Series, zero: float) -> Section:
    """The section of a row of the table `timeline`."""
    length = 1e6 * (row["end_seconds"] - row["begin_seconds"])
    color = COLOURS["waiting" if row["part"] == "wait" else row["part"]]
    hint = f"block {row['block']}, {row['section']}: {micro(length)}"
    return Section(int(row["block"]), 1e6 * (row["begin_seconds"] - zero), length, color, hint)


def lanes(shown: Shown, size: int) -> list[Lane]:
    """The lanes at one batch size, of all GPU stages that were profiled at it."""
    kernels = shown.table("kernels")
    if kernels.empty:
        return []
    kernels = kernels[
        (kernels["device_kind"] == "cuda")
        & (kernels["status"] == "ok")
        & (kernels["launches"] > 0)
        & (kernels["batch_size"] == size)
    ]
    return [
        lane(shown, stage, size, kernels[kernels["stage"] == stage])
        for stage in ladder.ordered(kernels["stage"])
    ]


def lane(shown: Shown, stage: str, size: int, rows: pd.DataFrame) -> Lane:
    """The blocks of one stage, medians over the repeats."""
    keys = ["layer", "kernel", "layers", "part"]
    medians = rows.groupby(keys, sort=False)[["kernel_seconds", "launches"]].median().reset_index()
    one_launch = "leave_gradient" in set(medians["kernel"])
    if one_launch:
        medians = in_order(medians)
    blocks: list[Block] = []
    at = 0.0
    for _, row in medians.iterrows():
        length = float(row["kernel_seconds"] * row["launches"]) * 1e6
        blocks.append(block(row, at, length))
        at += length
        if one_launch and row["kernel"] in ("leave_gradient", "update"):
            wait = shown.limit("barrier_grid") * 1e6
            if not math.isnan(wait):
                hint = f"barrier of the whole grid: {micro(wait)}, from the machine's own limits"
                blocks.append(Block("", "barrier", at, wait, "barrier", "batch", hint))
                at += wait
    step = shown.step_seconds(stage, size) * 1e6
    if step - at > NEGLIGIBLE * step:
        hint = f"no kernel: {micro(step - at)} in which the host gathers, launches or waits"
        blocks.append(Block("no kernel", "waiting", at, step - at, "", "", hint))
    return Lane(
        stage,
        wording.title(stage),
        style.mark(stage).color,
        tuple(blocks),
        int(medians["launches"].sum()),
        at,
        step,
        one_launch,
    )


def in_order(phases: pd.DataFrame) -> pd.DataFrame:
    """The phases as they follow each other in a step: forward, loss, backward from the end."""
    forward = phases[phases["part"] == "forward"]
    backward = phases[phases["part"] == "backward"].iloc[::-1]
    named = {name: phases[phases["kernel"] == name] for name in ("input", "loss", "leave_gradient")}
    update = phases[phases["kernel"] == "update"]
    return pd.concat(
        [named["input"], forward, named["loss"], backward, named["leave_gradient"], update]
    )


def block(row: pd.Series, start: float, length: float) -> Block:
    """The block of one kernel."""
    layer = str(row["layers"]).partition("+")[0]
    kernel = str(row["kernel"]).replace("_", " ")
    name = kernel if layer == "batch" else f"{layer} {kernel}"
    served = str(row["layers"]).replace("+", ", ")
    hint = f"{name}: {micro(length)}" + ("" if layer == "batch" else f"; serves {served}")
    return Block(name, str(row["part"]), start, length, str(row["kernel"]), layer, hint)


def micro(value: float) -> str:
    """Microseconds to three digits."""
    return wording.duration(value * 1e-6)


def ticks(end: float) -> list[tuple[float, str]]:
    """Round places on an axis from 0 to `end` microseconds, and what is written there."""
    raw = end / 6
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(step * power for step in (1, 2, 5, 10) if step * power >= raw)
    return [(n * gap, f"{n * gap:g} µs") for n in range(int(end / gap) + 1)]


def shares(shown: Shown, found: Sequence[Lane], flops: float, size: int) -> list[Shares]:
    """What each step would take by arithmetic alone, and where the rest of it goes."""
    peak, launch = shown.limit("peak_fp32") * 1e12, shown.limit("launch") * 1e6
    results = []
    for own in found:
        step = own.step
        if math.isnan(step) or math.isnan(peak):
            continue
        arithmetic = flops * size / peak * 1e6
        barriers = sum(b.length for b in own.blocks if b.kind == "barrier")
        launching = 0.0 if own.one_launch else min(own.launches * launch, own.kernels)
        inside = max(0.0, min(own.kernels, step) - barriers - launching - arithmetic)
        if own.one_launch:  # what is no barrier is inside the one kernel
            inside = max(0.0, step - barriers - arithmetic)
        host = max(0.0, step - arithmetic - launching - barriers - inside)
        parts = zip(PARTS, (arithmetic, launching, barriers, inside, host), strict=True)
        results.append(
            Shares(
                own.stage,
                own.title,
                tuple((name, value, micro(value)) for name, value in parts if value > 0.005),
                step,
            )
        )
    return results
