"""Everything that the page explains, made from the tables: what its template and its script get."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from cnnlib.errors import DataError
from cnnlib.measuring.schema import current_name
from workflow.glue import modules
from workflow.plotting import accuracies, wording
from workflow.report import PAGE_TABLES, WEIGHTS, clocks, excerpts, fair_play, live, timeline
from workflow.report.beside import notes, own_times
from workflow.report.lessons import Lesson, lessons
from workflow.report.rungs import Rung, flops_per_image, ratios, rungs
from workflow.report.shown import Shown, Tables, choose, measured_on_gpu

MADE = {"limits": "probes", "hotspots": "cpu_profile"}
"""Tables that workflow/tables makes of one of PAGE_TABLES."""
INLINED = (
    *("stage", "device", "batch_size", "repeats", "n", "epoch_seconds", "epoch_seconds_low"),
    *("epoch_seconds_high", "test_accuracy", "gain", "library", "library_ratio", "share"),
    *("speedup", "extrapolated", "validated"),
)
"""Columns of the ladder that the page carries as numbers, for whoever wants to compute with it."""


@dataclass(frozen=True)
class AtSize:
    """What changes with the batch size."""

    size: int
    learns: bool
    little: str
    """What a batch that learns too little is said to have learned; else ""."""
    images: str
    """The whole batches of an epoch, in words; "" where they are not known."""
    rungs: list[Rung]
    yours: dict[str, str]
    """What stages took on the reader's own machine, where published ones are shown."""
    lanes: list[timeline.Lane]
    shares: list[timeline.Shares]
    clocks: list[clocks.Clocks]
    axis: float
    """Where the longest lane ends, in microseconds."""
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Explained:
    """All parts of the page that need tables."""

    shown: Shown
    devices: list[str]
    sizes: list[AtSize]
    your_notes: list[str]
    lessons: list[Lesson]
    excerpts: list[excerpts.Excerpt]
    moments: list[live.Moment]
    looks: list[int]
    """Images seen at the looks of `moments`."""
    peers: list[fair_play.Peer]
    ratios: list[dict[str, str]]
    fastest: str
    weights_origin: str
    data: Markup
    """JSON for the script."""

    @property
    def published(self) -> bool:
        """Whether what is shown was published and not measured by the reader."""
        return self.shown.own is not None

    @property
    def recorded(self) -> bool:
        """Whether the blocks of a stage recorded their clocks."""
        return any(at.clocks for at in self.sizes)

    @property
    def beside(self) -> bool:
        """Whether the reader's own machine has times to show beside the published ones."""
        return any(at.yours for at in self.sizes)

    @property
    def opened(self) -> AtSize:
        """What is shown first."""
        return next(each for each in self.sizes if each.size == self.shown.size)


def read(paths: list[Path]) -> dict[str, pd.DataFrame]:
    """The tables of files, by name; those that the page does not explain are left out."""
    found = modules.read_tables(path for path in paths if current(path) in PAGE_TABLES)
    made = {
        name: modules.load("tables", name).make({raw: found[raw]})
        for name, raw in MADE.items()
        if raw in found
    }
    return found | made


def current(path: Path) -> str:
    """The name of the table in a file."""
    return current_name(path.stem)


def read_folder(folder: Path) -> Tables | None:
    """The tables of published results; None where the folder has no ladder."""
    found = sorted((folder / "tables").glob("*.csv"))
    tables = read(found)
    return tables if "ladder" in tables else None


def explain(tables: Tables, published: Path | None, provenance: Path) -> Explained | None:
    """All parts of the page; None where nothing was measured, or no ladder could be made of it."""
    if "ladder" not in tables:
        return None
    need = published is not None and not len(measured_on_gpu(tables))
    others = read_folder(published) if need and published is not None else None
    shown = choose(tables, others)
    if shown is None:
        return None
    origin = provenance
    if shown.own is not None and published is not None:
        origin = published / "provenance/run.json"
    looks, moments = live.recognition(shown)
    weights = trained(published)
    names = [name for name in shown.own_stages if name in measured_on(shown, "cuda")]
    fastest = names[-1] if names else shown.own_stages[-1]
    at = [at_size(shown, size) for size in shown.sizes]
    return Explained(
        shown=shown,
        devices=list(dict.fromkeys(map(wording.device, shown.lines["device"].iloc[::-1]))),
        sizes=at,
        your_notes=notes(shown, shown.own_stages),
        lessons=lessons(shown),
        excerpts=used(at),
        moments=moments,
        looks=columns if isinstance(columns := looks.get("columns"), list) else [],
        peers=fair_play.peers(shown, fair_play.runs(origin)),
        ratios=ratios(shown, fastest),
        fastest=wording.title(fastest),
        weights_origin=origin_of(weights),
        data=as_script({"ladder": numbers(shown), "recognition": looks, "network": weights}),
    )


def measured_on(shown: Shown, kind: str) -> set[str]:
    """Stages measured on such a device."""
    return set(shown.lines.loc[shown.lines["device_kind"] == kind, "stage"])


def at_size(shown: Shown, size: int) -> AtSize:
    """All that is shown at a batch size."""
    lanes = timeline.lanes(shown, size)
    axis = max((lane.end for lane in lanes), default=0.0)
    return AtSize(
        size,
        shown.learns(size),
        little(shown, size),
        whole_batches(shown, size),
        rungs(shown, size),
        own_times(shown, size),
        lanes,
        timeline.shares(shown, lanes, flops_per_image(shown), size),
        clocks.clocks(shown, size),
        axis,
        timeline.ticks(axis) if axis else [],
    )


def little(shown: Shown, size: int) -> str:
    """`91.4 % in 2 epochs` of a batch that learns too little, or ""."""
    lines = shown.lines[shown.lines["batch_size"] == size]
    if lines["learns"].all():
        return ""
    accuracy = 100 * lines["batch_accuracy"].iloc[0]
    return f"{accuracy:.1f} % in {accuracies.epochs(lines)}"


def whole_batches(shown: Shown, size: int) -> str:
    """`14 whole batches, 57,344 images`: what an epoch is; "" where none was timed in full."""
    images = shown.epoch_images(size)
    return f"{images // size:,} whole batches, {images:,} images" if images else ""


def used(sizes: list[AtSize]) -> list[excerpts.Excerpt]:
    """The excerpts that some block leads to, each once."""
    found = {}
    for at in sizes:
        for lane in at.lanes:
            for block in lane.blocks:
                if entry := excerpts.entry_of(lane.stage, block.layers, block.kernel):
                    found[entry.key] = entry
    return [excerpts.excerpt(entry) for entry in found.values()]


def code_of(lane: timeline.Lane, block: timeline.Block) -> str:
    """The key of the excerpt for a block, or ""."""
    entry = excerpts.entry_of(lane.stage, block.layers, block.kernel)
    return entry.key if entry else ""


def trained(published: Path | None) -> live.Json:
    """The published network, if there is one that the page can compute."""
    if published is None or not (published / WEIGHTS).exists():
        return {}
    return live.network(published / WEIGHTS)


def origin_of(weights: live.Json) -> str:
    """How the weights were trained, in a sentence, as far as their file says so."""
    origin = weights.get("origin")
    if not isinstance(origin, Mapping):
        return ""
    dataset = wording.DATASETS.get(str(origin.get("dataset")), origin.get("dataset"))
    accuracy = origin.get("test_accuracy")
    parts = [
        f"trained by {wording.said(str(origin['stage']))}" if "stage" in origin else "trained",
        f"on {dataset}" if dataset else "",
        f"for {origin['epochs']} epochs" if "epochs" in origin else "",
        f"at batch {origin['batch_size']}" if "batch_size" in origin else "",
        f"to {100 * accuracy:.1f} % of the test images" if isinstance(accuracy, float) else "",
    ]
    return " ".join(filter(None, parts))


def numbers(shown: Shown) -> list[live.Json]:
    """The ladder's lines as plain numbers."""
    text = shown.lines[[name for name in INLINED if name in shown.lines]].to_json(orient="records")
    found: list[live.Json] = json.loads(text)
    return found


def as_script(data: live.Json) -> Markup:
    """JSON that may stand within a script element: nothing in it can end the element."""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise DataError(f"a number of the tables cannot be written as JSON: {error}") from None
    return Markup(text.replace("<", "\\u003c"))
