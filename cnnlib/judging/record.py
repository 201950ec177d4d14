"""What a judgement has found so far, and the files that say it."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from cnnlib.engine import KernelTime
from cnnlib.files import check_writable, write_whole
from cnnlib.judging.rivals import Arm, Ratio, Timing
from cnnlib.judging.roofline import Limits, Point
from cnnlib.judging.tools import METRICS, Counter

Word = Literal["right", "REJECTED", "unjudged", "measured", "not done"]

FACTS, PAGE, TIMES, KERNELS, COUNTERS = (
    "judge.json",
    "page.html",
    "times.csv",
    "kernels.csv",
    "counters.csv",
)


@dataclass(frozen=True)
class Part:
    """One part of a judgement, finished."""

    name: str
    word: Word
    text: str
    """The verdict in one sentence."""
    seconds: float
    details: list[str] = field(default_factory=list)
    """What was checked, one line each."""


@dataclass
class Findings:
    """All that is known of the judged stage; the parts come one by one."""

    stage: str
    title: str
    given: str
    """The name or the file as it was given."""
    dataset: str
    network: str
    batch_size: int
    seed: int
    device: str
    device_kind: str
    provenance: dict[str, object]
    color: str = ""
    marker: str = ""
    images: int = 0
    """Images of a timed epoch."""
    parts: list[Part] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    profile: list[KernelTime] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)
    limits: Limits | None = None
    points: list[Point] = field(default_factory=list)
    finished: bool = False

    @property
    def rejected(self) -> bool:
        """Whether a check found something wrong, or could not tell."""
        return any(part.word in ("REJECTED", "unjudged") for part in self.parts)

    @property
    def verdict(self) -> str:
        """The judgement in a sentence."""
        bad = [f"{part.name}: {part.text}" for part in self.parts if part.word == "REJECTED"]
        open_ = [f"{part.name}: {part.text}" for part in self.parts if part.word == "unjudged"]
        if bad:
            return f"rejected ({'; '.join(bad)})"
        if open_:
            return f"no verdict ({'; '.join(open_)})"
        if not self.finished:
            return "unfinished: no check has rejected it so far"
        return "right"


def arms(findings: Findings) -> list[Arm]:
    """All that were timed, the judged stage first."""
    found = dict.fromkeys(timing.arm for timing in findings.timings)
    return sorted(found, key=lambda arm: arm.role != "judged")


def files(folder: Path) -> list[Path]:
    """All that a judgement writes into its folder, apart from logs."""
    return [folder / name for name in (FACTS, PAGE, TIMES, KERNELS, COUNTERS)]


def clear(folder: Path) -> bool:
    """Remove what an earlier judgement has left there; whether there was any.

    Raises UserError if the folder cannot be written.
    """
    check_writable(*files(folder))
    folder.mkdir(parents=True, exist_ok=True)
    old = [path for path in (*files(folder), *folder.glob("*.log")) if path.exists()]
    for path in old:
        path.unlink()
    return bool(old)


def write(folder: Path, findings: Findings) -> None:
    """Write the facts and the tables found so far, each whole."""
    facts = asdict(findings) | {"verdict": findings.verdict, "rejected": findings.rejected}
    for name in ("timings", "profile", "counters"):
        del facts[name]
    _text(folder / FACTS, json.dumps(facts, indent=1, default=str) + "\n")
    if findings.timings:
        head = ("stage", "role", "repeat", "images", "epoch_seconds", "loss", "device")
        _table(
            folder / TIMES,
            head,
            [
                (str(t.arm), t.arm.role, t.repeat, t.images, t.seconds, t.loss, t.device)
                for t in findings.timings
            ],
        )
    if findings.profile:
        _table(folder / KERNELS, KernelTime._fields, findings.profile)
    if findings.counters:
        rows = [(c.kernel, c.launches, *c.values) for c in findings.counters]
        _table(folder / COUNTERS, ("kernel", "launches", *METRICS), rows)


def _table(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with write_whole(path) as temporary, temporary.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


def _text(path: Path, text: str) -> None:
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
