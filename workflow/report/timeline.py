"""One training step of each GPU stage as a lane of blocks on a common axis of microseconds.

The blocks are the kernels of the step in the order in which they run or, for a stage that takes
whole steps in one launch, its phases. Each was timed singly, so that they show what a step is made
of, not when each part began; where they add up to less than the step took, the rest is drawn as
waiting. Where the blocks of such a stage recorded their own clocks (table `timeline`), its phases
are what these say, and nothing was timed singly.
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
    "barriers, and waiting at them",
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
    recorded: int = 0
    """How many blocks of the grid recorded their clocks; 0 where phases were timed singly."""

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


def recorded(shown: Shown, size: int) -> pd.DataFrame:
    """The sections that blocks recorded on a GPU at one batch size; no rows where none did."""
    rows = shown.table("timeline")
    if rows.empty:
        return rows
    good = (rows["device_kind"] == "cuda") & (rows["status"] == "ok")
    found: pd.DataFrame = rows[good & (rows["batch_size"] == size)]
    return found


def median_step(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the recorded steps of one stage, the rows of the one of median length."""
    spans = rows.groupby("step").agg(begin=("begin_seconds", "min"), end=("end_seconds", "max"))
    lengths = (spans["end"] - spans["begin"]).sort_values(kind="stable")
    found: pd.DataFrame = rows[rows["step"] == lengths.index[len(lengths) // 2]]
    return found


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
    step = shown.step_seconds(stage, size) * 1e6
    if one_launch:
        clocked = recorded(shown, size)
        if len(clocked) and len(own := clocked[clocked["stage"] == stage]):
            return lane_of_clocks(stage, median_step(own), step)
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
                hint = (
                    f"waiting for all blocks: {micro(wait)}, a barrier of the grid measured singly"
                )
                blocks.append(Block("", "barrier", at, wait, "barrier", "batch", hint))
                at += wait
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


def lane_of_clocks(stage: str, rows: pd.DataFrame, step: float) -> Lane:
    """The phases of a recorded step as the block went through them for which the others wait.

    That is the one that waits least itself; a mean of all would count those without an image.
    """
    count = rows["block"].nunique()
    rows = rows.assign(length=1e6 * (rows["end_seconds"] - rows["begin_seconds"]))
    waits = rows["length"].where(rows["part"] == "wait", 0.0).groupby(rows["block"]).sum()
    busiest = waits.index[int(waits.to_numpy().argmin())]
    blocks, at = [], 0.0
    for _, row in rows[rows["block"] == busiest].sort_values("begin_seconds").iterrows():
        name, length = str(row["section"]).replace("_", " "), float(row["length"])
        if row["part"] == "wait":
            kind, layer, kernel, text = "waiting", "batch", "barrier", ""
        else:
            layer, _, kernel = str(row["section"]).rpartition(" ")
            kind, text = str(row["part"]), name
        hint = f"{name}: {micro(length)}, by the clock of block {busiest}"
        blocks.append(Block(text, kind, at, length, kernel, layer or "batch", hint))
        at += length
    title, color = wording.title(stage), style.mark(stage).color
    return Lane(stage, title, color, tuple(blocks), 1, at, step, True, count)


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
        barriers = sum(b.length for b in own.blocks if b.kernel == "barrier")
        launching = 0.0
        if not own.one_launch:  # some kernels were timed as shorter than an empty launch
            launching = sum(min(b.length, launch) for b in own.blocks if b.kernel)
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
