"""The numbers that lessons mention, as they are written."""

import math
from dataclasses import dataclass, field

from workflow.plotting import wording
from workflow.report.rungs import Rung, flops_per_image, rungs, text
from workflow.report.shown import Shown
from workflow.report.timeline import Lane, lanes, micro

AN_EMPTY_ONE = 1.1
"""A kernel that takes at most so many times an empty launch is as short as one can be measured."""


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
            "arithmetic": text(flops * size / (peak * 1e12), wording.duration),
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
