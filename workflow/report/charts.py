"""The evidence of each lesson: one small chart of bars, made from the tables."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from workflow.plotting import style, wording
from workflow.report.facts import AN_EMPTY_ONE, Facts
from workflow.report.rungs import rungs
from workflow.report.shown import Shown
from workflow.report.timeline import micro

MOST_BARS = 8
BARRIER = "barriers of the grid"
CONVOLUTIONS = ("conv1 forward", "conv2 forward", "conv2 backward", "conv1 backward")


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: its length is a share of the longest one's."""

    label: str
    value: float
    text: str
    color: str


@dataclass(frozen=True)
class Chart:
    """A small chart of bars."""

    title: str
    bars: tuple[Bar, ...]
    note: str = ""

    @property
    def longest(self) -> float:
        """The value whose bar has the whole length."""
        return max((bar.value for bar in self.bars), default=1.0) or 1.0


def hot_functions(shown: Shown, known: Facts) -> Chart | None:
    """Where the interpreter's time goes in naive."""
    rows = shown.table("hotspots")
    rows = rows[rows["stage"] == "naive"].head(MOST_BARS) if len(rows) else rows
    if rows.empty:
        return None
    color = style.mark("naive").color
    return Chart(
        "Share of the time that each function takes by itself",
        tuple(
            Bar(short(row["function"]), row["own_percent"], f"{row['own_percent']:g} %", color)
            for _, row in rows.iterrows()
        ),
        "Sampled by Python's own profiler, which slows every call down.",
    )


def short(function: str) -> str:
    """`conv.py backward`: a function without its folder and line."""
    place, _, name = function.rpartition(" ")
    file = place.rpartition("/")[2].partition(":")[0]
    return f"{file} {name}" if file.endswith(".py") else function.replace("method ", "")


def share_by_batch(shown: Shown, known: Facts) -> Chart | None:
    """How the share of the CPU's arithmetic grows with the batch in gemm."""
    bars = []
    for size in shown.sizes:
        rung = next((rung for rung in rungs(shown, size) if rung.stage == "gemm"), None)
        if rung is not None and rung.share_value:
            bars.append(Bar(f"batch {size}", rung.share_value, rung.share, rung.color))
    if not bars:
        return None
    naive = known.share("naive")
    return Chart(
        "Share of the CPU's arithmetic that gemm reaches", tuple(bars), f"naive reaches {naive}."
    )


def by_length(shown: Shown, known: Facts) -> Chart | None:
    """How many of gemm_cuda's kernels take how long."""
    lane = known.lanes.get("gemm_cuda")
    if lane is None:
        return None
    blocks = [block for block in lane.blocks if block.kernel]
    bars = []
    launch = shown.limit("launch") * 1e6
    if math.isnan(launch):
        return None
    for low, high in pairwise((0.0, AN_EMPTY_ONE, 1.5, math.inf)):
        count = sum(low * launch < block.length <= high * launch for block in blocks)
        label = f"{micro(low * launch)} to {micro(high * launch)}"
        label = f"up to {micro(high * launch)}" if not low else label
        label = f"over {micro(low * launch)}" if high == math.inf else label
        bars.append(Bar(label, count, str(count), lane.color))
    return Chart(
        "How many kernels of a step take how long",
        tuple(bars),
        f"An empty launch takes {known['launch']} on the same GPU; up to {AN_EMPTY_ONE} times that "
        "is hardly longer.",
    )


def launches_and_bytes(shown: Shown, known: Facts) -> Chart | None:
    """Launches of a step, and the bytes that its layers must at least move."""
    bars = []
    for stage in ("gemm_cuda", "fused"):
        if stage in known.lanes:
            lane = known.lanes[stage]
            bars.append(Bar(f"launches, {stage}", lane.launches, str(lane.launches), lane.color))
    moved = {stage: least_bytes(shown, stage, known.size) for stage in ("gemm_cuda", "fused")}
    most = max(moved.values())
    longest = max((bar.value for bar in bars), default=0.0)
    for stage, count in moved.items():
        if count and longest:
            color = style.mark(stage).color
            bars.append(
                Bar(f"bytes moved, {stage}", count / most * longest, wording.size(count), color)
            )
    note = "Bytes: what the kernels of a step must at least read and write in device memory."
    return Chart("A step before and after fusing", tuple(bars), note) if bars else None


def least_bytes(shown: Shown, stage: str, size: int) -> float:
    """Bytes that the parts of a step must at least move, as the stage's kernels divide it."""
    rows = shown.table("kernels")
    if rows.empty:
        return 0.0
    rows = rows[(rows["stage"] == stage) & (rows["batch_size"] == size) & (rows["status"] == "ok")]
    rows = rows[(rows["launches"] > 0) & (rows["repeat"] == rows["repeat"].min())]
    return float(rows.drop_duplicates(["layers", "part"])["bytes"].sum())


def of_convolutions(shown: Shown, known: Facts) -> Chart | None:
    """The convolutions' kernels in fused and in ring."""
    bars = []
    for name in CONVOLUTIONS:
        for stage in ("fused", "ring"):
            lane = known.lanes.get(stage)
            block = next((b for b in lane.blocks if b.name == name), None) if lane else None
            if lane and block:
                bars.append(Bar(f"{name}, {stage}", block.length, micro(block.length), lane.color))
    return Chart("The convolutions' kernels, before and after", tuple(bars)) if bars else None


def phases(shown: Shown, known: Facts) -> Chart | None:
    """The longest phases of tuned's step; those that come once an image are added up."""
    lane = known.lanes.get("tuned")
    if lane is None:
        return None
    lengths: dict[str, float] = {}
    colours = {}
    for block in lane.blocks:
        name = block.name or BARRIER
        lengths[name] = lengths.get(name, 0.0) + block.length
        colours[name] = block.color
    if lane.recorded:
        note = (
            f"By the clock of the block that waits least, of {lane.recorded} that recorded theirs; "
            f"all phases of it take {micro(lane.end)}."
        )
    else:
        note = "By the first block's clock; barriers from the machine's own limits."
        if lengths.get("update", math.inf) <= AN_EMPTY_ONE * shown.limit("launch") * 1e6:
            # its launch is what was timed, and no step has that launch
            del lengths["update"]
            note += (
                " The update is left out: alone it is a launch, and takes hardly longer than "
                "an empty one."
            )
    longest = sorted(lengths, key=lambda name: -lengths[name])[:MOST_BARS]
    bars = (Bar(name, lengths[name], micro(lengths[name]), colours[name]) for name in longest)
    return Chart("The longest phases of a step", tuple(bars), note)


CHARTS: dict[str, Callable[[Shown, Facts], Chart | None]] = {
    "naive": hot_functions,
    "gemm": share_by_batch,
    "gemm_cuda": by_length,
    "fused": launches_and_bytes,
    "ring": of_convolutions,
    "tuned": phases,
}
"""The evidence of each lesson."""
