"""What each lesson of the page says in numbers: facts for its text, and the chart of its evidence.

The text is in workflow/report/templates/lessons/STAGE.html.j2 and has no number of its own; the
sketch of the idea is workflow/report/sketches/STAGE.svg. A stage without these has no lesson.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from cnnlib.exercises.catalogue import NAMES, Exercise, find_exercise
from cnnlib.paths import ROOT
from workflow.plotting import style, wording
from workflow.report.rungs import Rung, flops_per_image, rungs, text
from workflow.report.shown import Shown
from workflow.report.timeline import Lane, lanes, micro

TEXTS = ROOT / "workflow/report/templates/lessons"
SKETCHES = ROOT / "workflow/report/sketches"
AN_EMPTY_ONE = 1.1
"""A kernel that takes at most so many times an empty launch is as short as one can be measured."""
MOST_BARS = 8
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


@dataclass(frozen=True)
class Lesson:
    """The lesson of a stage."""

    stage: str
    title: str
    color: str
    rung: Rung
    chart: Chart | None
    facts: "Facts"
    exercise: Exercise | None = None
    sketch: str = ""


@dataclass(frozen=True)
class Facts:
    """Numbers for the lessons' text, as they are written; a dash for one that is not known."""

    size: int
    large: int
    """The largest batch size that learns enough."""
    rungs: dict[str, Rung]
    at_large: dict[str, Rung]
    lanes: dict[str, Lane]
    numbers: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.numbers.get(name, "–")

    def epoch(self, stage: str) -> str:
        """The time of an epoch."""
        return self.rungs[stage].epoch if stage in self.rungs else "–"

    def gain(self, stage: str, large: bool = False) -> str:
        """The gain over the stage before."""
        found = self.at_large if large else self.rungs
        return found[stage].gain or "–" if stage in found else "–"

    def no_gain(self, stage: str) -> bool:
        """Whether the stage is no faster than the one before, as far as its interval says."""
        said = self.rungs[stage].gain_range if stage in self.rungs else ""
        return said.endswith(("no gain", "slower"))

    def share(self, stage: str, large: bool = False) -> str:
        """The share of the machine's arithmetic."""
        found = self.at_large if large else self.rungs
        return found[stage].share if stage in found else "–"

    def launches(self, stage: str) -> str:
        """Launches of kernels in a step."""
        return str(self.lanes[stage].launches) if stage in self.lanes else "–"

    def kernels(self, stage: str) -> str:
        """The time of a step's kernels, each timed singly."""
        return micro(self.lanes[stage].kernels) if stage in self.lanes else "–"

    def step(self, stage: str) -> str:
        """The time of a step in whole epochs."""
        return self.rungs[stage].step if stage in self.rungs else "–"


def lessons(shown: Shown) -> list[Lesson]:
    """The lessons of all stages that were measured and have one, in the ladder's order."""
    known = facts(shown)
    found = []
    for stage in shown.own_stages:
        if stage not in known.rungs or not (TEXTS / f"{stage}.html.j2").exists():
            continue
        sketch = SKETCHES / f"{stage}.svg"
        found.append(
            Lesson(
                stage,
                wording.title(stage),
                style.mark(stage).color,
                known.rungs[stage],
                CHARTS[stage](shown, known) if stage in CHARTS else None,
                known,
                find_exercise(stage) if stage in NAMES else None,
                sketch.read_text(encoding="utf-8") if sketch.exists() else "",
            )
        )
    return found


def facts(shown: Shown) -> Facts:
    """All numbers that the lessons mention."""
    size = shown.size
    large = max(filter(shown.learns, shown.sizes), default=size)
    at = {rung.stage: rung for rung in rungs(shown, size)}
    found = Facts(
        size,
        large,
        at,
        {rung.stage: rung for rung in rungs(shown, large)},
        {lane.stage: lane for lane in lanes(shown, size)},
    )
    launch, peak = shown.limit("launch"), shown.limit("peak_fp32")
    one, many = shown.limit("blas_one"), shown.limit("blas_all")
    flops, images = flops_per_image(shown), shown.epoch_images(size)
    found.numbers.update(
        {
            "network": wording.NETWORKS.get(shown.network, shown.network),
            "launch": text(launch, wording.duration),
            "barrier": text(shown.limit("barrier_grid"), wording.duration),
            "peak_gpu": text(peak, lambda value: f"{wording.digits(value)} TFLOP/s"),
            "peak_one": text(one, lambda value: f"{wording.digits(value)} TFLOP/s"),
            "peak_all": text(many, lambda value: f"{wording.digits(value)} TFLOP/s"),
            "gpu_over_cpu": text(peak / many, wording.times),
            "mflop": text(flops / 1e6, lambda value: f"{wording.digits(value, 2)} million"),
            "floor_one": text(flops * images / (one * 1e12), wording.duration),
            "floor_gpu": text(flops * images / (peak * 1e12), wording.duration),
            "steps": f"{images // size:,}" if images else "–",
            "naive_image": text(image_seconds(shown, "naive"), wording.duration),
        }
    )
    if (own := found.lanes.get("gemm_cuda")) and not math.isnan(launch):
        short = [b for b in own.blocks if b.kernel and b.length <= AN_EMPTY_ONE * launch * 1e6]
        found.numbers["as_short_as_a_launch"] = str(len(short))
    if own := found.lanes.get("tuned"):
        found.numbers["tuned_phases"] = str(
            sum(b.kind not in ("barrier", "waiting") for b in own.blocks)
        )
        found.numbers["tuned_in_launches"] = text(
            own.step * 1e-6 / launch, lambda value: wording.digits(value, 2)
        )
    if {"fused", "ring"} <= found.lanes.keys():
        pair = found.lanes["fused"].kernels / found.lanes["ring"].kernels
        found.numbers["ring_kernels"] = wording.times(pair)
    return found


def image_seconds(shown: Shown, stage: str) -> float:
    """Seconds of training on an image; nan if it was not measured."""
    return shown.step_seconds(stage, shown.size) / shown.size


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
    edges = (0.0, 5.5, 6.0, 8.0, math.inf)
    for low, high in pairwise(edges):
        count = sum(low <= block.length < high for block in blocks)
        label = f"from {low:g} µs" if high == math.inf else f"{low:g} to {high:g} µs"
        label = f"under {high:g} µs" if not low else label
        bars.append(Bar(label, count, str(count), lane.color))
    return Chart(
        "How many kernels of a step take how long",
        tuple(bars),
        f"An empty launch takes {known['launch']} on the same GPU.",
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
    """The longest phases of tuned's step."""
    lane = known.lanes.get("tuned")
    if lane is None:
        return None
    blocks = sorted(lane.blocks, key=lambda block: -block.length)
    bars = [
        Bar(b.name or "barrier of the grid", b.length, micro(b.length), b.color)
        for b in blocks[:MOST_BARS]
    ]
    note = "By the first block's clock; barriers from the machine's own limits."
    return Chart("The longest phases of a step", tuple(bars), note)


CHARTS = {
    "naive": hot_functions,
    "gemm": share_by_batch,
    "gemm_cuda": by_length,
    "fused": launches_and_bytes,
    "ring": of_convolutions,
    "tuned": phases,
}
"""The evidence of each lesson."""
