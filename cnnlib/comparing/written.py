"""A comparison in words and numbers: lines for the terminal, rows for files and for the page."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from cnnlib.comparing.comparison import (
    TRUSTED,
    Comparison,
    LeftOut,
    is_trusted,
    name_of_stage,
)
from cnnlib.comparing.differences import UNKNOWN
from cnnlib.comparing.verdicts import Effect, Line, LineEffect, RunEffect, line_of
from cnnlib.files import write_whole
from cnnlib.wording import digits, duration

Row = dict[str, str | int | float | bool | None]
Cells = list[str]

LONGEST = 200
"""Letters of the reason why something is not compared."""
DIFFERENCE_HEADS = ["what differs", "", "A", "B"]
EFFECT_HEADS = ["verdict", "B / A", "95 % interval", "threshold"]
LINE_HEADS = ["stage", *EFFECT_HEADS, "batch sizes"]
RUN_HEADS = ["stage", "batch", *EFFECT_HEADS, "epoch, A", "epoch, B", "repeats", "accuracy, A, B"]


def effect_cells(effect: Effect) -> Cells:
    """The cells under EFFECT_HEADS; what is unknown is a dash."""
    interval = "–"
    if not math.isnan(effect.low):
        interval = f"{digits(effect.low, 4)} to {digits(effect.high, 4)}"
    threshold = "–" if math.isnan(effect.threshold) else f"{100 * effect.threshold:.1f} %"
    return [effect.word, digits(effect.ratio, 4), interval, threshold]


def line_cells(line: LineEffect) -> Cells:
    """The cells under LINE_HEADS."""
    sizes = f"{len(line.batch_sizes)}, {min(line.batch_sizes)} to {max(line.batch_sizes)}"
    return [name_of_stage(line.line), *effect_cells(line.effect), sizes]


def run_cells(run: RunEffect) -> Cells:
    """The cells under RUN_HEADS."""
    sides = (run.a, run.b)
    marks = [" *" if each.extrapolated else "" for each in sides]
    times = [duration(each.median) + mark for each, mark in zip(sides, marks, strict=True)]
    repeats = ", ".join(str(len(each.seconds)) for each in sides)
    accuracy = ", ".join(percent(each.accuracy) for each in sides)
    effect = effect_cells(run.effect)
    stage = name_of_stage(line_of(run.key))
    return [stage, str(run.key.batch_size), *effect, *times, repeats, accuracy]


def percent(share: float) -> str:
    """A share in per cent, or a dash."""
    return "–" if math.isnan(share) else f"{100 * share:.2f} %"


def difference_rows(comparison: Comparison) -> list[Cells]:
    """The cells under DIFFERENCE_HEADS."""
    return [[each.kind, each.what, each.a, each.b] for each in comparison.differences]


def left_out_lines(left_out: Iterable[LeftOut]) -> list[str]:
    """`only in A: naive, gemm (lenet5 on mnist), batch 16, 32`: alike ones share a line."""
    sizes: dict[tuple[str, Line], list[str]] = {}
    for each in left_out:
        sizes.setdefault((each.why, line_of(each.key)), []).append(str(each.key.batch_size))
    stages: dict[tuple[str, str, str], list[str]] = {}
    for (why, (dataset, network, stage, kind)), batches in sizes.items():
        where = name_of_stage((dataset, network, "", kind)).strip()
        stages.setdefault((why, where, ", ".join(batches)), []).append(stage)
    return [
        f"{brief(why)}: {', '.join(names)} {where}, batch {batches}"
        for (why, where, batches), names in stages.items()
    ]


def brief(text: str) -> str:
    """The beginning of a reason; the folder itself has the whole of it."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} ..."


def summary(comparison: Comparison) -> str:
    """One line: how many runs have which verdict."""
    counts = comparison.counts()
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    return f"{sum(counts.values())} runs of both: {said}"


def nothing_differs(comparison: Comparison) -> str:
    """What is said where there are no differences, or "" where there are some."""
    if comparison.differences:
        return ""
    return "No difference of machine, software, code or settings is known."


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know of the numbers."""
    said = ["B / A: median epoch of B over that of A; above 1, B is slower. –: unknown."]
    if any(each.a.extrapolated or each.b.extrapolated for each in comparison.runs):
        said.append("*: timed on a part of an epoch and scaled.")
    if any(each.key.device_kind == "emulated" for each in comparison.runs):
        said.append("Emulated kernels ran on the CPU: their times say nothing about a GPU.")
    if any(each.effect.word == "slower" and not is_trusted(each) for each in comparison.runs):
        said.append(
            f"A run that was repeated fewer than {TRUSTED} times is no regression by itself."
        )
    if comparison.undescribed:
        sides = " and ".join(comparison.undescribed)
        said.append(f"{sides} without run.json: by what it was measured is not known.")
    if any(UNKNOWN in (each.a, each.b) for each in comparison.differences):
        said.append("Unknown: that folder does not say it, so it may differ or not.")
    return said


def rows(comparison: Comparison) -> list[Row]:
    """A row for each run and each stage with all its batch sizes (`batch_size` 0)."""
    found = []
    for line in comparison.lines:
        dataset, network, stage, kind = line.line
        key: Row = dict(dataset=dataset, network=network, stage=stage, device_kind=kind)
        found.append(key | {"batch_size": 0} | sides(None) | effect_row(line.effect))
    for run in comparison.runs:
        found.append(dict(run.key._asdict()) | sides(run) | effect_row(run.effect))
    return found


def sides(run: RunEffect | None) -> Row:
    """What both folders have of a run; nothing for all batch sizes together."""
    row: Row = {}
    for name in ("a", "b"):
        side = None if run is None else getattr(run, name)
        row[f"epoch_seconds_{name}"] = side and side.median
        row[f"repeats_{name}"] = side and len(side.seconds)
        row[f"test_accuracy_{name}"] = side and known(side.accuracy)
    return row


def effect_row(effect: Effect) -> Row:
    """Verdict, ratio, interval and threshold; None for what is unknown."""
    return {
        "verdict": effect.word,
        "ratio": known(effect.ratio),
        "low": known(effect.low),
        "high": known(effect.high),
        "threshold": known(effect.threshold),
    }


def known(value: float) -> float | None:
    """The value, or None instead of nan and infinity, which JSON has not."""
    return value if math.isfinite(value) else None


def write_json(path: Path, comparison: Comparison) -> None:
    """Everything that was found, as one object."""
    found = {
        "a": str(comparison.a),
        "b": str(comparison.b),
        "differences": [asdict(each) for each in comparison.differences],
        "effects": rows(comparison),
        "left_out": [each.key._asdict() | {"why": each.why} for each in comparison.left_out],
        "regressions": comparison.regressions,
    }
    with write_whole(path) as temporary:
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, comparison: Comparison) -> None:
    """The `rows`, with an empty cell for what is unknown."""
    found = rows(comparison)
    names: Sequence[str] = list(found[0]) if found else ["verdict"]
    with write_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
