"""A lab report: a page of questions, with tables and figures of one's own measurements.

What was not measured has no number. The texts are in texts/lab_report.toml.
"""

import math
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnnlib.comparing.results import Key, Measured, Results, read, tables
from cnnlib.errors import DataError
from cnnlib.exercises.catalogue import NAMES, TEXTS
from cnnlib.measuring import schema
from cnnlib.measuring.record import RunFacts
from cnnlib.stages import LADDER
from cnnlib.wording import duration, times

USUAL_BATCH = 64
MOST_KERNELS = 6
"""Kernels of a stage that the report lists; the others are one line."""
ANSWER = "> *Your answer:*\n"
DASH = "–"


class Part(NamedTuple):
    """One kernel or operator of a training step, as `profile` has timed it."""

    name: str
    seconds: float
    """In one step."""


@dataclass(frozen=True)
class Report:
    """What there is to report on: one data set, one network."""

    folder: Path
    dataset: str
    network: str
    runs: dict[tuple[str, int], Measured]
    """(stage, batch size) -> what was measured."""
    emulated: set[str]
    """Stages that ran emulated: their times say nothing about a GPU."""
    parts: dict[tuple[str, int], list[Part]]
    facts: list[RunFacts]

    @property
    def stages(self) -> list[str]:
        """The stages that have a row, those of the ladder first and in its order."""
        found = dict.fromkeys(stage for stage, _ in self.runs)
        ladder = [stage.name for stage in LADDER]
        return [*(s for s in ladder if s in found), *(s for s in found if s not in ladder)]

    @property
    def batches(self) -> list[int]:
        return sorted({batch for _, batch in self.runs})

    def seconds(self, stage: str, batch: int) -> float:
        """Median time of an epoch on this machine; nan where it was not measured, or emulated."""
        run = self.runs.get((stage, batch))
        return math.nan if run is None or stage in self.emulated else run.median

    @property
    def batch(self) -> int:
        """The batch size at which most stages were timed; of these the usual one, or the first."""
        counts = {
            batch: sum(math.isfinite(self.seconds(stage, batch)) for stage in self.stages)
            for batch in self.batches
        }
        most = max(counts.values())
        best = [batch for batch, count in counts.items() if count == most]
        return USUAL_BATCH if USUAL_BATCH in best else best[0]


def gather(folder: Path, dataset: str = "", network: str = "") -> Report:
    """Read a folder of results: of a sweep, of the workflow, or of one `measure --out`.

    Without names the first data set and network are reported on. Raises DataError for a folder
    without results, and for names that it has no rows of.
    """
    results = read(folder)
    key = _chosen(results, dataset, network)
    wanted = {
        each: run
        for each, run in results.runs.items()
        if (each.dataset, each.network) == (key.dataset, key.network)
    }
    runs: dict[tuple[str, int], Measured] = {}
    emulated = set()
    for each, run in wanted.items():
        place = each.stage, each.batch_size
        if each.device_kind == "emulated":
            emulated.add(each.stage)
        if place not in runs or run.seconds:
            runs[place] = run
    return Report(
        folder,
        key.dataset,
        key.network,
        runs,
        emulated,
        _parts(tables(folder, "kernels"), key),
        results.facts,
    )


def _chosen(results: Results, dataset: str, network: str) -> Key:
    """The first run of the data set and network that are asked for."""
    for key in results.runs:
        if dataset in ("", key.dataset) and network in ("", key.network):
            return key
    pairs = dict.fromkeys(f"{key.dataset}, {key.network}" for key in results.runs)
    asked = " and ".join(filter(None, (dataset, network)))
    raise DataError(f"{results.folder} has no rows of {asked}; it has: {'; '.join(pairs)}")


def _parts(files: Iterable[Path], wanted: Key) -> dict[tuple[str, int], list[Part]]:
    """(stage, batch) -> its parts of a step, the longest first: medians over repeats."""
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in files:
        if not path.exists():
            continue
        columns = schema.read_columns(path, "kernels")
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            mine = (row["dataset"], row["network"]) == (wanted.dataset, wanted.network)
            if mine and row["status"] == "ok" and row["launches"]:
                seconds = row["kernel_seconds"] * row["launches"]
                name = f"{row['layer']} {row['kernel']}, {row['part']}"
                found[row["stage"], row["batch_size"]][name].append(seconds)
    return {
        place: sorted(
            (Part(name, float(np.median(seconds))) for name, seconds in parts.items()),
            key=lambda part: -part.seconds,
        )
        for place, parts in found.items()
    }


def page(report: Report, figures: Sequence[tuple[str, str]]) -> str:
    """The report as Markdown; `figures` are pairs of a file's name and a caption."""
    texts = tomllib.loads((TEXTS / "lab_report.toml").read_text(encoding="utf-8"))
    parts = [
        f"# {texts['title']}\n\n*Name:*\n\n*Date:*\n\n{' '.join(texts['intro'].split())}",
        f"## What was measured\n\n{_origin(report)}",
        f"## Time of an epoch\n\n{_times(report)}\n\n{_marks(report)}",
        *(f"![{caption}]({name})\n\n*{caption}*" for name, caption in figures),
        *([_steps(report)] if report.parts else []),
        f"## Questions\n\n{_questions(texts, report)}",
    ]
    return "\n\n".join(parts) + "\n"


def _origin(report: Report) -> str:
    """Where the numbers are from."""
    lines = [f"- folder: `{report.folder}`", f"- {report.dataset}, network {report.network}"]
    for name, what in (("device", "device"), ("cpu", "processor"), ("commit", "commit")):
        values = dict.fromkeys(str(each[name]) for each in report.facts if name in each)  # type: ignore[literal-required]
        if values:
            lines.append(f"- {what}: {'; '.join(values)}")
    started = sorted(each["started"] for each in report.facts if "started" in each)
    if started:
        lines.append(f"- measured: {started[0][:10]} to {started[-1][:10]}")
    return "\n".join(lines)


def _times(report: Report) -> str:
    batches = report.batches
    head = [
        "stage",
        *(f"batch {batch}" for batch in batches),
        f"gain at {report.batch}",
        "accuracy",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for stage in report.stages:
        cells = [_cell(report, stage, batch) for batch in batches]
        lines.append(_row([stage, *cells, _gain(report, stage), _accuracy(report, stage)]))
    missing = [stage.name for stage in LADDER if stage.name not in report.stages]
    text = "\n".join(lines)
    return text + (f"\n\nNot measured: {', '.join(missing)}." if missing else "")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(report: Report, stage: str, batch: int) -> str:
    run = report.runs.get((stage, batch))
    if run is None:
        return DASH
    if not run.seconds:
        return run.status
    if stage in report.emulated:
        return "emulated"
    seconds = np.concatenate(run.repeats)
    low, high = np.percentile(seconds, [25, 75])
    spread = f", {duration(low)} to {duration(high)}" if len(seconds) > 1 else ""
    mark = "\\*" if run.extrapolated else ""
    return f"{duration(run.median)}{mark} (n = {len(seconds)}{spread})"


def _gain(report: Report, stage: str) -> str:
    """How many times as fast as the stage that it improves on, if both were timed.

    That of an exercise is the stage that it is a copy of.
    """
    befores = {each.name: each.after for each in LADDER} | {f"my_{name}": name for name in NAMES}
    before = befores.get(stage, "")
    ratio = report.seconds(before, report.batch) / report.seconds(stage, report.batch)
    return f"{times(ratio)} over {before}" if math.isfinite(ratio) else DASH


def _accuracy(report: Report, stage: str) -> str:
    run = report.runs.get((stage, report.batch))
    known = run is not None and math.isfinite(run.accuracy)
    return f"{100 * run.accuracy:.1f} %" if run is not None and known else DASH


def _marks(report: Report) -> str:
    """What the entries of the table mean."""
    text = "Medians over all epochs of all repeats, with their number and quartiles."
    if any(run.extrapolated for run in report.runs.values()):
        text += " \\* Timed on part of an epoch and scaled."
    if report.emulated:
        names = ", ".join(stage for stage in report.stages if stage in report.emulated)
        text += (
            f" {names}: ran emulated on the processor, which checks the kernels; such a time says "
            "nothing about a GPU, so none is given."
        )
    return text


def _steps(report: Report) -> str:
    """The longest parts of a step of each stage, at one batch size."""
    blocks = [f"## Where a step's time goes, at batch {report.batch}"]
    for stage in report.stages:
        parts = report.parts.get((stage, report.batch), [])
        if not parts or stage in report.emulated:
            continue
        total = sum(part.seconds for part in parts)
        rest = total - sum(part.seconds for part in parts[:MOST_KERNELS])
        shown = parts[:MOST_KERNELS] + ([Part("all others", rest)] if rest > 0 else [])
        lines = [_row(["part of a step", "time", "share"]), _row(["---"] * 3)]
        lines += [
            _row([part.name, duration(part.seconds), f"{100 * part.seconds / total:.0f} %"])
            for part in shown
        ]
        blocks.append(f"### {stage}\n\n" + "\n".join(lines))
    if len(blocks) == 1:
        return blocks[0] + "\n\nNo step was profiled on a device that says something about time."
    return "\n\n".join(blocks)


def _questions(texts: dict[str, dict[str, dict[str, str]]], report: Report) -> str:
    blocks = [f"{number}. {text}" for number, text in enumerate(texts["general"], 1)]
    for stage, text in texts["stage"].items():
        question = " ".join(text["question"].split())
        number = len(blocks) + 1
        blocks.append(f"{number}. **{stage}** ({_seen(report, stage)}). {question}")
    return "\n\n".join(f"{block}\n\n{ANSWER}" for block in blocks).rstrip()


def _seen(report: Report, stage: str) -> str:
    """The stage's number to which a question refers."""
    seconds = report.seconds(stage, report.batch)
    if math.isfinite(seconds):
        gain = _gain(report, stage)
        more = f", {gain}" if gain != DASH else ""
        return f"{duration(seconds)} an epoch at batch {report.batch}{more}"
    return "emulated: no time" if stage in report.emulated else "you have not measured it"
