"""Numbers of the published measurements, computed from results/reference, never typed.

The directive `{published-ladder}` puts the table of README.md in a page, and
`{published-networks}` that of all shipped networks (networks.py). docs/_extensions/rewrite.py
writes the numbers that stand in pages.
"""

import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple

import networks

from cnnlib.peers import PEERS
from cnnlib.stages import LADDER
from workflow.plotting import wording

ROOT = Path(__file__).resolve().parents[2]
MACHINE = ROOT / "results/reference/nvidia-h100"
DATASET, NETWORK = "mnist", "lenet5"
BATCH_SIZES = (64, 256)
LIMITED_AT = 256
"""The batch size whose share of the machine's limit is shown: the largest that learns."""
LIMITS = {"naive": "blas_one", "gemm": "blas_all"}
"""The probe whose float32 arithmetic limits a CPU stage; peak_fp32 limits all others."""


class Rung(NamedTuple):
    """A stage of the ladder as it was measured."""

    stage: str
    change: str
    seconds: dict[int, float]
    """Batch size -> median seconds of an epoch."""
    extrapolated: set[int]
    """Batch sizes whose epochs were timed on a part and scaled."""
    gain: dict[int, float]
    """Batch size -> epoch time of the previous row over that of this one."""
    library: float
    """Epoch time of the best library in float32 over that of this row, at LIMITED_AT."""
    share: float
    """Of the float32 arithmetic that the machine was measured to do, at LIMITED_AT."""


def lines(name: str) -> list[dict[str, str]]:
    """The rows of a published table."""
    with (MACHINE / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def published() -> dict[tuple[str, int], dict[str, str]]:
    """The lines of the published ladder by stage and batch size."""
    return {
        (line["stage"], int(line["batch_size"])): line
        for line in lines("ladder")
        if (line["dataset"], line["network"]) == (DATASET, NETWORK)
    }


def accuracy(size: int, digits: int = 1) -> str:
    """What a training recognises at this batch size, median of the stages: `98.5 %`."""
    found = next(line for (_, at), line in published().items() if at == size)
    return f"{100 * float(found['batch_accuracy']):.{digits}f} %"


def learning_sizes() -> list[int]:
    """The batch sizes whose trainings come within a point of the best one."""
    return sorted({size for (_, size), line in published().items() if line["learns"] == "True"})


@functools.cache
def rungs() -> list[Rung]:
    """The stages of the ladder, from the published table of that name."""
    found: list[Rung] = []
    for stage in LADDER:
        if (stage.name, LIMITED_AT) not in published():
            continue  # a stage of your own, which was not part of these measurements
        own = {size: published()[stage.name, size] for size in BATCH_SIZES}
        found.append(
            Rung(
                stage.name,
                stage.change,
                {size: float(line["epoch_seconds"]) for size, line in own.items()},
                {size for size, line in own.items() if line["extrapolated"] == "True"},
                {size: float(line["gain"]) for size, line in own.items() if line["before"]},
                float(own[LIMITED_AT]["library_ratio"]),
                float(own[LIMITED_AT]["share"]),
            )
        )
    return found


def percent(share: float) -> str:
    """A share in per cent, to two digits."""
    return f"{wording.digits(100 * share, 2)} %"


def ladder() -> str:
    """The table of README.md: each stage, its gain over the one before, its share of the limit."""
    head = ["stage", "what changes"]
    for size in BATCH_SIZES:
        head += [f"epoch, batch {size} ({accuracy(size)})", "gain"]
    head += ["against the best library", "share of peak"]
    table = [head, ["---", "---"] + ["---:"] * (2 * len(BATCH_SIZES) + 2)]
    for rung in rungs():
        cells = [wording.title(rung.stage), rung.change]
        for size in BATCH_SIZES:
            mark = " \\*" if size in rung.extrapolated else ""
            cells.append(wording.duration(rung.seconds[size]) + mark)
            cells.append(wording.times(rung.gain[size]) if size in rung.gain else "")
        library = wording.times(rung.library) if rung.library >= 0.01 else ""
        table.append([*cells, library, percent(rung.share)])
    return wording.markdown_table(table)


def whole_speedup() -> str:
    """How many times as fast as the first stage the last one is at LIMITED_AT."""
    line = published()[rungs()[-1].stage, LIMITED_AT]
    middle, low, high = (
        wording.times(float(line[name])).removesuffix("×")
        for name in ("speedup", "speedup_low", "speedup_high")
    )
    text = f"{middle} times as fast as stage 1 at batch {LIMITED_AT}"
    known = math.isfinite(float(line["speedup_low"]))  # of a single repeat there is no interval
    return f"{text} (95 % bootstrap interval: {low} to {high})" if known else text


def first_stage() -> str:
    """The first stage's epoch, with its interval."""
    line = published()[rungs()[0].stage, BATCH_SIZES[0]]
    middle, low, high = (
        wording.duration(float(line[f"epoch_seconds{end}"])) for end in ("", "_low", "_high")
    )
    return f"{middle} per epoch ({low} to {high})"


def first_stage_runs() -> int:
    """How many runs of the first stage there are, at all batch sizes."""
    first = rungs()[0].stage
    return sum(int(line["repeats"]) for (stage, _), line in published().items() if stage == first)


def peaks() -> str:
    """What the probes measured of one core, of all cores and of the GPU."""
    found = {line["probe"]: float(line["median"]) for line in lines("limits")}
    one, many, gpu = (wording.digits(found[name]) for name in (*LIMITS.values(), "peak_fp32"))
    return f"{one} TFLOP/s on one core, {many} on sixteen, {gpu} on the GPU"


def libraries(tf32: bool, learning: bool = True) -> str:
    """The best library's epoch over the last stage's: lowest to highest over the batch sizes that
    learn, or over all larger ones.
    """
    peers = [stage.name for stage in PEERS if stage.name.endswith("_tf32") == tf32]
    return f"{over_last(peers, learning)} times"


def over_fused_and_ring() -> str:
    """The better one's epoch over the last stage's, at the batch sizes that learn."""
    return over_last(["fused", "ring"], learning=True)


def over_last(stages: list[str], learning: bool) -> str:
    """The best epoch of `stages` over the last stage's, lowest to highest: `6.8 to 8.9`."""
    last = rungs()[-1].stage
    learn = learning_sizes()
    every = sorted({size for _, size in published()})
    ratios = []
    for size in learn if learning else [size for size in every if size > learn[-1]]:
        own = [published()[name, size] for name in stages if (name, size) in published()]
        best = min(float(line["epoch_seconds"]) for line in own if line["epoch_seconds"])
        ratios.append(best / float(published()[last, size]["epoch_seconds"]))
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


def race() -> str:
    """How long the last stage trains in the race, and the fastest library."""
    seconds = {line["stage"]: float(line["train_seconds_mean"]) for line in lines("race_summary")}
    own = wording.duration(seconds.pop(rungs()[-1].stage))
    raced = "" if any(stage.endswith("_tf32") for stage in seconds) else " in float32"
    return f"{own} and the fastest library{raced} for {wording.duration(min(seconds.values()))}"


def setup(app: object) -> dict[str, bool]:
    """Register the directive."""
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.application import Sphinx
    from sphinx.util.docutils import SphinxDirective

    class PublishedNetworks(SphinxDirective):
        """The table of all shipped networks."""

        def run(self) -> list[nodes.Node]:
            for path in (networks.TABLES / "libraries.csv", networks.EARLIER):
                self.env.note_dependency(str(path))
            container = nodes.container()
            self.state.nested_parse(
                StringList(networks.whole().splitlines(), "results/reference"), 0, container
            )
            return container.children

    class PublishedLadder(SphinxDirective):
        """The table of README.md."""

        def run(self) -> list[nodes.Node]:
            for name in ("ladder", "limits"):
                self.env.note_dependency(str(MACHINE / "tables" / f"{name}.csv"))
            container = nodes.container()
            text = StringList(ladder().splitlines(), "results/reference")
            self.state.nested_parse(text, 0, container)
            return container.children

    assert isinstance(app, Sphinx)
    app.add_directive("published-ladder", PublishedLadder)
    app.add_directive("published-networks", PublishedNetworks)
    return {"parallel_read_safe": True}
