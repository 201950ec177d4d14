"""What a run leaves in its folder: its tables, and run.json with the facts about them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypedDict, cast

from cnnlib.config import Config
from cnnlib.engine import Engine, Stage
from cnnlib.errors import DataError
from cnnlib.files import sha256, write_whole
from cnnlib.measuring import schema
from cnnlib.measuring.cards import Card
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import digest
from cnnlib.stages import own_of
from cnnlib.system.machine import provenance
from cnnlib.training.target import Target

FACTS = "run.json"
KINDS = {
    "run": dict,
    "libraries": dict,
    "disturbed": list,
    "failed": str,
    "settings": str,
    "started": str,
    "tables": dict,
}
"""What some keys of run.json have to hold, where they are there."""


class OtherProcess(TypedDict):
    """A process that was on the run's GPU while something was timed."""

    process: int
    name: str
    memory_mib: float


class RunFacts(TypedDict, total=False):
    """The contents of run.json.

    Choices of an engine (`Engine.choices`) and the provenance of the machine
    (`cnnlib.system.machine.provenance`) are further keys. Runs of earlier versions lack some.
    """

    run: dict[str, str | int]
    """The fields of `Run`."""
    seed: int
    device: str
    device_kind: str
    status: str
    """That of the last row of `epochs`."""
    started: str
    """Date and time in UTC, ISO 8601."""
    seconds: float
    """How long the whole run took, with everything that is not timed."""
    checking_seconds: dict[str, float]
    """Seconds of the checks behind `validated`, by kind: before, after, momentum."""
    config: str
    """Digest of the whole config."""
    settings: str
    """Digest of the settings and the data that decide what is measured."""
    tables: dict[str, str]
    """Table -> SHA-256 of its file."""
    stage_file: str
    """The file of a stage from outside the repository."""
    stage_digest: str
    """SHA-256 of all files that it is made of, as they were measured."""
    engine: str
    engine_batch_size: int
    """Smaller than the run's batch size where an image-by-image stage is timed on a part of it."""
    epoch_images: int
    """Training images that an epoch trains on: whole batches."""
    dropped_images: int
    """Training images of each epoch that are left over because they do not fill a batch."""
    plan: list[str]
    """`layers: operator` for each operator that the engine trained with."""
    built: str
    """How the kernels were compiled."""
    does_not_fit: str
    unavailable: str
    unjudged: str
    failed: str
    disturbed: list[OtherProcess]
    unwatched: str
    """Why other processes on the GPU would not have been noticed."""
    preparing: int
    """How many runs of the sweep were prepared side by side; left out where each was alone."""
    engine_of_repeat: int
    """The repeat whose engine this one was timed with, and which was checked with a momentum."""
    cells_before: int
    """Networks, stages and batch sizes that the same process had measured before."""
    resumed: bool
    """Whether the run was continued from a checkpoint."""


def engine_facts(engine: Engine, target: Target) -> RunFacts:
    """Facts about the engine, its operators, their compilation and the engine's own choices.

    Everything is asked of the engine; nothing is taken from the config.
    """
    facts = RunFacts(
        engine=type(engine).__name__,
        engine_batch_size=engine.setup.batch_size,
        plan=engine.served,
    )
    if target.device is not None:
        facts["built"] = target.device.built
    return cast(RunFacts, {**facts, **engine.choices})


def origin_of(stage: Stage | Card) -> RunFacts:
    """The file of a stage from outside the repository and its digest; nothing for others."""
    own = own_of(stage) if isinstance(stage, Stage) else stage
    if own is None or not own.digest:
        return RunFacts()
    return RunFacts(stage_file=str(own.file), stage_digest=own.digest)


@dataclass
class RunRecord:
    """The rows and facts of one run, collected while it is measured."""

    config: Config
    rows: RunRows
    settings: str
    origin: RunFacts
    """Where the stage comes from; see origin_of."""
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    checking_seconds: dict[str, float] = field(default_factory=dict)
    facts: RunFacts = field(default_factory=RunFacts)
    """Facts that are found out on the way; `write` adds those that every run has."""

    def write(self, folder: Path) -> None:
        """Write the tables and then run.json, which marks the run as complete."""
        # An older result is removed before the first of its files is replaced.
        (folder / FACTS).unlink(missing_ok=True)
        for former in schema.FORMER.tables:
            (folder / f"{former}.csv").unlink(missing_ok=True)
        for name in schema.RUN_TABLES:
            schema.write(folder / f"{name}.csv", name, self.rows[name])
        with write_whole(folder / FACTS) as temporary:
            text = json.dumps(self._all_facts(folder), indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")

    def write_failure(self, folder: Path, why: str) -> None:
        """Discard everything measured and write one `failed` row, and `why` into run.json."""
        self.rows.discard("failed", why)
        self.facts = RunFacts(failed=why)
        self.write(folder)

    def _all_facts(self, folder: Path) -> Mapping[str, object]:
        rows = self.rows
        common = RunFacts(
            run=vars(rows.run),
            seed=rows.seed,
            device=rows.device,
            device_kind=rows.device_kind,
            status=str(rows["epochs"][-1]["status"]),
            started=self.began.isoformat(timespec="seconds"),
            seconds=round((datetime.now(UTC) - self.began).total_seconds(), 3),
            checking_seconds={
                kind: round(seconds, 3) for kind, seconds in self.checking_seconds.items()
            },
            config=digest(self.config),
            settings=self.settings,
            tables=table_digests(folder),
        )
        return {**common, **self.origin, **self.facts, **provenance()}


def run_files(folder: Path) -> list[Path]:
    """The files that a run writes into its folder."""
    return [*(folder / f"{name}.csv" for name in schema.RUN_TABLES), folder / FACTS]


def table_digests(folder: Path) -> dict[str, str]:
    """Table -> hexadecimal SHA-256 of the run's file; OSError if one cannot be read."""
    return {name: sha256(folder / f"{name}.csv") for name in schema.RUN_TABLES}


def read_facts(folder: Path) -> RunFacts:
    """The run.json in `folder`; DataError if it is missing, damaged or not of a run."""
    return read_facts_file(folder / FACTS)


def read_facts_file(path: Path) -> RunFacts:
    """The same of a file of any name: published provenance has one for each stage."""
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(facts, dict) or facts.get("status") not in schema.CHOICES["status"]:
        raise DataError(f"{path} is damaged: it does not say how a run has ended")
    for key, kind in KINDS.items():
        if not isinstance(facts.get(key, kind()), kind):
            raise DataError(f"{path} is damaged: its {key} is {facts[key]!r:.40}")
    return cast(RunFacts, facts)


def summary(folder: Path) -> str:
    """One line on the run whose files are in `folder`."""
    epochs = schema.read_columns(folder / "epochs.csv", "epochs")
    last = {column: values[-1] for column, values in epochs.items()}
    text = f"{last['stage']}, batch {last['batch_size']}: {last['status']}"
    good = [i for i, status in enumerate(epochs["status"]) if status == "ok"]
    if good:
        text += f", {median(epochs['epoch_seconds'][i] for i in good):.4g} s an epoch"
        if last["extrapolated"]:
            text += f" (scaled from {sum(epochs['images'][i] for i in good)} images)"
        if last["test_accuracy"] >= 0:
            text += f", test accuracy {100 * last['test_accuracy']:.2f} %"
    if last["reason"]:
        text += f": {last['reason']}"
    facts = read_facts(folder) if (folder / FACTS).exists() else RunFacts()
    if others := facts.get("disturbed"):
        names = ", ".join(f"{p['process']} ({p['name'] or 'no name known'})" for p in others)
        text += f", others on the GPU at the same time: process {names}"
    return f"{text}, on {last['device']}"
