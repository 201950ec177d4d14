"""The ladder at each batch size: what each stage gains, and how near it comes to the machine.

Every number is written here once, in the words of workflow/plotting/wording.py; the page shows
these texts and computes nothing from them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cnnlib.stages import ALL
from workflow.plotting import ladder, style, wording
from workflow.report.shown import Shown

DASH = "–"
PEAKS = {"one": "blas_one", "all": "blas_all", "gpu": "peak_fp32"}
"""The probe of the float32 arithmetic that limits one thread, all of them, and a GPU."""


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
    library: str
    """The epoch time of the best library in float32 over this one's."""
    best_library: bool
    """Whether it is the best library in float32 at this batch size."""
    share: str
    """Of the float32 arithmetic that the machine was measured to do."""
    share_value: float
    accuracy: str
    energy: str
    scaled: bool
    n: str
    bar: float
    """Length of its bar: the logarithm of its speed, from 0 (the slowest) to 1."""


def rungs(shown: Shown, size: int) -> list[Rung]:
    """The stages in order, then the libraries from slowest to fastest, at one batch size."""
    lines = shown.lines[shown.lines["batch_size"] == size].drop_duplicates("stage")
    seconds = {line["stage"]: float(line["epoch_seconds"]) for _, line in lines.iterrows()}
    own = [name for name in ladder.ordered(seconds) if name not in ladder.NAMES_OF_PEERS]
    peers = sorted(set(seconds) - set(own), key=lambda name: -seconds[name])
    best = best_peer(seconds, tf32=False)
    slowest, fastest = max(seconds.values()), min(seconds.values())
    span = math.log(slowest / fastest) or 1.0
    before = dict(zip(own[1:], own, strict=False))
    flops, images = flops_per_image(shown), shown.epoch_images(size)
    joules = epoch_joules(shown, size)
    found = []
    for _, line in lines.set_index("stage").loc[[*own, *peers]].reset_index().iterrows():
        name = line["stage"]
        peak = peak_of(shown, name) * 1e12
        share = flops * images / seconds[name] / peak if images else math.nan
        found.append(
            Rung(
                stage=name,
                title=wording.title(name),
                change=next((s.change for s in ladder.known() if s.name == name), ""),
                color=style.mark(name).color,
                peer=name in peers,
                tf32=rounds(name),
                device=wording.device(line["device"]),
                epoch=wording.duration(seconds[name]) + (" *" if line["extrapolated"] else ""),
                interval=interval(line),
                step=text(shown.step_seconds(name, size), wording.duration),
                gain=wording.times(seconds[before[name]] / seconds[name]) if name in before else "",
                library=against(seconds[best] / seconds[name]) if best else "",
                best_library=name == best,
                share=percent(share),
                share_value=0.0 if math.isnan(share) else share,
                accuracy=text(line["test_accuracy"], lambda value: f"{100 * value:.2f} %"),
                energy=text(joules.get(name, math.nan), energy_text),
                scaled=bool(line["extrapolated"]),
                n=f"{line['n']} in {line['repeats']}",
                bar=math.log(slowest / seconds[name]) / span,
            )
        )
    return found


def text(value: float, write: object) -> str:
    """A number as `write` writes it, or a dash where there is none."""
    assert callable(write)
    return DASH if pd.isna(value) else str(write(value))


def against(ratio: float) -> str:
    """A ratio of speeds in words: `8.6× faster`, `1.6× slower`."""
    if ratio == 1:
        return DASH
    faster = ratio > 1
    factor = wording.times(ratio if faster else 1 / ratio)
    if factor == "1.0×":
        return "about the same"
    return f"{factor} {'faster' if faster else 'slower'}"


def percent(share: float) -> str:
    """A share in per cent, to two digits."""
    return text(share, lambda value: f"{wording.digits(100 * value, 2)} %")


def energy_text(joules: float) -> str:
    """Joules, or kilojoules, to two digits, as the figure `energy` writes them."""
    if joules >= 995:
        return f"{wording.digits(joules / 1e3, 2)} kJ"
    return f"{wording.digits(joules, 2)} J"


def interval(line: pd.Series) -> str:
    """`17.9 ms to 18.2 ms`, or why there is no interval."""
    low, high = line["epoch_seconds_low"], line["epoch_seconds_high"]
    if pd.isna(low):
        return "one repeat: no interval"
    return f"{wording.duration(low)} to {wording.duration(high)}"


def rounds(name: str) -> bool:
    """Whether a stage or library rounds the factors of its products to TF32."""
    return any(stage.name == name and stage.rounding for stage in ladder.known())


def best_peer(seconds: dict[str, float], tf32: bool) -> str | None:
    """The fastest library that computes in float32, or in TF32."""
    peers = [name for name in seconds if name in ladder.NAMES_OF_PEERS and rounds(name) == tf32]
    return min(peers, key=lambda name: seconds[name], default=None)


def flops_per_image(shown: Shown) -> float:
    """Operations that the network needs to train on one image: forward and both gradients."""
    kernels = shown.table("kernels")
    if kernels.empty:
        return math.nan
    kernels = kernels[kernels["part"].isin(["forward", "backward"]) & (kernels["status"] == "ok")]
    # each kernel of a part says what the whole part needs
    parts = kernels.drop_duplicates(["stage", "batch_size", "layers", "part"])
    flops = parts.groupby(["stage", "batch_size"])["flops"].sum()
    # a slow stage is profiled on fewer images than a batch has
    return float((flops / flops.index.get_level_values("batch_size")).max())


def peak_of(shown: Shown, name: str) -> float:
    """TFLOP/s in float32 of what a stage runs on, as the probes measured it."""
    stage = next((stage for stage in ALL if stage.name == name), None)
    if stage is None or stage.runs_on != "cpu":
        return shown.limit(PEAKS["gpu"])
    return shown.limit(PEAKS["one" if stage.threads == 1 else "all"])


def epoch_joules(shown: Shown, size: int) -> dict[str, float]:
    """Stage -> median energy of an epoch on the GPU, where it was measured."""
    energy = shown.table("energy")
    if energy.empty or not shown.epoch_images(size):
        return {}
    good = energy[
        (energy["status"] == "ok") & (energy["images"] > 0) & (energy["batch_size"] == size)
    ]
    joules = good["energy_joules"] / good["images"] * shown.epoch_images(size)
    return {
        str(stage): float(value) for stage, value in joules.groupby(good["stage"]).median().items()
    }


def ratios(shown: Shown, stage: str) -> list[dict[str, str]]:
    """The best library in float32 and in TF32 at each batch size, and its time over `stage`'s."""
    found = []
    for size in shown.sizes:
        lines = shown.lines[shown.lines["batch_size"] == size]
        seconds = dict(zip(lines["stage"], lines["epoch_seconds"], strict=True))
        row = {"size": str(size), "own": wording.duration(seconds.get(stage, math.nan))}
        for kind, tf32 in (("float32", False), ("tf32", True)):
            best = best_peer(seconds, tf32)
            there = best is not None and stage in seconds
            row[f"{kind}_name"] = wording.title(best) if best is not None else DASH
            row[f"{kind}_ratio"] = wording.times(seconds[best] / seconds[stage]) if there else DASH
        found.append(row)
    return found


def beside(shown: Shown, stages: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What the reader's own machine took: stage -> words, and one line for each kind of gap.

    Emulated stages have been checked there, and have no times.
    """
    if shown.own is None:
        return {}, []
    summary = shown.own["summary"]
    place = (summary["dataset"] == shown.dataset) & (summary["network"] == shown.network)
    own = summary[place & (summary["batch_size"] == shown.size)]
    own = own if len(own) else summary[place]
    words, checked, missing = {}, [], []
    for stage in stages:
        lines = own[own["stage"] == stage]
        timed = lines[(lines["device_kind"] != "emulated") & lines["epoch_seconds"].notna()]
        if len(timed):
            line = timed.iloc[0]
            mark = " *" if line["extrapolated"] else ""
            words[stage] = wording.duration(line["epoch_seconds"]) + mark
        elif len(lines) and bool(lines["validated"].any()) and (lines["status"] == "ok").any():
            checked.append(wording.title(stage))
        else:
            missing.append(wording.title(stage))
    notes = []
    if checked:
        notes.append(f"Checked here by emulation, no times: {', '.join(checked)}.")
    if missing:
        notes.append(f"Not measured on your machine: {', '.join(missing)}.")
    return words, notes
