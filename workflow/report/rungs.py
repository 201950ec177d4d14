"""The ladder at each batch size: what each stage gains, and how near it comes to the machine.

The numbers are those of the table `ladder`, written as workflow/tables/ladder.py writes them; the
page shows these texts and computes nothing from them.
"""

import math
from dataclasses import dataclass

import pandas as pd

from workflow.glue import modules
from workflow.plotting import ladder, limits, style, wording
from workflow.report.shown import Shown

DASH = "–"
TABLE = modules.load("tables", "ladder")
"""The module that makes the table, and writes what is in its cells."""
joules = modules.load("figures", "energy").joules
"""Writes an energy as the figure does."""


@dataclass(frozen=True)
class Rung:
    """A stage or a library at one batch size, each number as it is written."""

    stage: str
    title: str
    change: str
    color: str
    peer: bool
    tf32: bool
    device: str
    epoch: str
    interval: str
    step: str
    gain: str
    """The epoch time of the stage before over this one's."""
    gain_range: str
    """Its interval, and whether it is a gain at all."""
    library: str
    """The epoch time of the best library in float32 over this one's."""
    best_library: bool
    """Whether it is the best library in float32 at this batch size."""
    share: str
    """Of the float32 arithmetic that the machine was measured to do."""
    share_value: float
    accuracy: str
    energy: str
    on_gpu: bool
    scaled: bool
    bar: float
    """Length of its bar: the logarithm of its speed, from 0 (the slowest) to 1."""


def rungs(shown: Shown, size: int) -> list[Rung]:
    """The stages in order, then the libraries from slowest to fastest, at one batch size."""
    lines = at_size(shown, size)
    seconds = dict(zip(lines["stage"], lines["epoch_seconds"], strict=True))
    own = [name for name in ladder.ordered(seconds) if name not in ladder.NAMES_OF_PEERS]
    peers = sorted(set(seconds) - set(own), key=lambda name: -seconds[name])
    slowest, fastest = max(seconds.values()), min(seconds.values())
    span = math.log(slowest / fastest) or 1.0
    energy = epoch_joules(shown, size)
    found = []
    for _, line in lines.set_index("stage", drop=False).loc[[*own, *peers]].iterrows():
        name = str(line["stage"])
        gain = TABLE.ratio_cell(line["gain"], math.nan, math.nan)
        whole = TABLE.ratio_cell(line["gain"], line["gain_low"], line["gain_high"])
        found.append(
            Rung(
                stage=name,
                title=wording.title(name),
                change=str(line["change"]),
                color=style.mark(name).color,
                peer=name in peers,
                tf32=rounds(name),
                device=wording.device(line["device"]),
                epoch=TABLE.epoch_cell(line),
                interval=interval(line),
                step=text(shown.step_seconds(name, size), wording.duration),
                gain=gain,
                gain_range=whole.removeprefix(gain).strip(),
                library="" if name == line["library"] else TABLE.library_cell(line),
                best_library=name == line["library"],
                share=TABLE.share_cell(line["share"]),
                share_value=0.0 if math.isnan(line["share"]) else float(line["share"]),
                accuracy=TABLE.accuracy_cell(line["test_accuracy"]),
                energy=joules(energy[name]) if name in energy else "",
                on_gpu=line["device_kind"] == "cuda",
                scaled=bool(line["extrapolated"]),
                bar=math.log(slowest / seconds[name]) / span,
            )
        )
    return found


def at_size(shown: Shown, size: int) -> pd.DataFrame:
    """The lines of the ladder that were measured at a batch size."""
    lines = shown.lines
    return lines[lines["batch_size"] == size].drop_duplicates("stage")


def text(value: float, write: object) -> str:
    """A number as `write` writes it, or a dash where there is none."""
    assert callable(write)
    return DASH if pd.isna(value) else str(write(value))


def interval(line: pd.Series) -> str:
    """`17.9 ms to 18.2 ms`, or why there is no interval."""
    low, high = line["epoch_seconds_low"], line["epoch_seconds_high"]
    if pd.isna(low):
        return "one repeat: no interval"
    return f"{wording.duration(low)} to {wording.duration(high)}"


def rounds(name: str) -> bool:
    """Whether a stage or library rounds the factors of its products to TF32."""
    return any(stage.name == name and stage.rounding for stage in ladder.known())


def flops_per_image(shown: Shown) -> float:
    """Operations that the network needs to train on one image; nan if they are not known."""
    kernels = shown.table("kernels")
    if kernels.empty:
        return math.nan
    return limits.image_flops(kernels).get((shown.dataset, shown.network), math.nan)


def epoch_joules(shown: Shown, size: int) -> dict[str, float]:
    """Stage -> median energy of an epoch on the GPU, where it was measured."""
    energy = shown.table("energy")
    if energy.empty or not shown.epoch_images(size):
        return {}
    good = energy[
        (energy["status"] == "ok") & (energy["images"] > 0) & (energy["batch_size"] == size)
    ]
    each = good["energy_joules"] / good["images"] * shown.epoch_images(size)
    return {
        str(stage): float(value) for stage, value in each.groupby(good["stage"]).median().items()
    }


def ratios(shown: Shown, stage: str) -> list[dict[str, str]]:
    """The best library in float32 and in TF32 at each batch size, and its time over `stage`'s."""
    found = []
    for size in shown.sizes:
        lines = at_size(shown, size)
        seconds = dict(zip(lines["stage"], lines["epoch_seconds"], strict=True))
        little = "" if shown.learns(size) else "learns too little"
        row = {
            "size": str(size),
            "little": little,
            "own": wording.duration(seconds.get(stage, math.nan)),
        }
        for kind, tf32 in (("float32", False), ("tf32", True)):
            peers = [n for n in seconds if n in ladder.NAMES_OF_PEERS and rounds(n) == tf32]
            best = min(peers, key=lambda name: seconds[name], default=None)
            there = best is not None and stage in seconds
            row[f"{kind}_name"] = wording.title(best) if best is not None else DASH
            row[f"{kind}_ratio"] = wording.times(seconds[best] / seconds[stage]) if there else DASH
        found.append(row)
    return found
