"""Measurements in processes of their own, so that a run has a result whatever its stage does.

A stage that hangs or ends its process gets a `failed` row with the reason.
"""

import math
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.errors import DoesNotFit, Unsupported
from cnnlib.measuring import race as racing
from cnnlib.measuring import run as measuring
from cnnlib.measuring import schema
from cnnlib.measuring.cards import card_of
from cnnlib.measuring.record import FACTS, RunRecord, origin_of
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import Run, seed_of, settings_digest
from cnnlib.measuring.schema import Row
from cnnlib.system.interrupts import asked_to_stop
from cnnlib.system.machine import cpu_description
from cnnlib.system.supervisor import Died, supervise

Stamp = tuple[int, int] | None
"""A value that changes whenever a run's result is written; None if there is no result."""


def measure_isolated(
    config: Config,
    run: Run,
    dataset: Dataset,
    folder: Path,
    *,
    checkpoints: Path | None = None,
    mark: bool = False,
) -> Path:
    """Do what cnnlib.measuring.run.measure does, in a process of its own; returns `folder`.

    With `mark`, a stage that ends the process, raises SystemExit or the like, or takes longer than
    measuring.limit_seconds gets one `failed` row. Without it, Died is raised and nothing written.
    """
    began, before = datetime.now(UTC), stamp_of(folder)

    def call() -> None:
        if checkpoints is None:
            measuring.measure(config, run, dataset, folder, mark=mark)
            return
        with asked_to_stop() as stop:
            measuring.measure(
                config, run, dataset, folder, checkpoints=checkpoints, stop=stop, mark=mark
            )

    try:
        supervise(call, limit=limit_of(config), patient=checkpoints is not None)
    except Died as died:
        settle(config, run, folder, died, began, before, mark=mark)
    return folder


def settle(
    config: Config,
    run: Run,
    folder: Path,
    died: Died,
    began: datetime,
    before: Stamp,
    *,
    mark: bool,
) -> None:
    """See that a run has a result whose process has died; without `mark`, raise Died.

    `before` is stamp_of(folder) when it `began`.
    """
    if died.kind == "died" and stamp_of(folder) not in (None, before):
        return  # the result was complete by then
    _show(died)
    died = _explained(died, config, run.stage, folder)
    if not mark:
        raise died from None
    rows = RunRows(run, seed_of(config, run.repeat), *_device(run.stage, died.notes))
    card = card_of(run.stage, "--stage")
    settings = settings_digest(config, run, card.runs_on)
    RunRecord(config, rows, settings, origin_of(card), began).write_failure(folder, str(died))


def race_isolated(config: Config, stage: str, dataset: Dataset, out: Path) -> list[Row]:
    """Do what cnnlib.measuring.race.run_race does, in a process of its own; returns the rows."""
    race = racing.require_race(config)
    try:
        return supervise(
            lambda: racing.run_race(config, stage, dataset, out),
            limit=race.seeds * limit_of(config),  # each training may take as long as a run
        )
    except Died as died:
        _show(died)
        died = _explained(died, config, stage, out)
        print(f"error: {out}: {died}", file=sys.stderr)
        device, kind = _device(stage, died.notes)
        rows = racing.race_rows(race, stage, race.training.seed, device, kind)
        row = racing.blank(rows, race, "failed", str(died))
        schema.write(out, "race", [row])
        return [row]


def examine_isolated(
    config: Config, run: Run, table: str, out: Path, call: Callable[[], object]
) -> str:
    """Make a call that writes a table other than those of runs, in a process of its own.

    If the stage fails, ends the process or cannot run here, the table is one row without numbers.
    Returns the reason, or "" if the call has written its rows.
    """
    notes: Mapping[str, object] = {}
    try:
        supervise(call, limit=limit_of(config))
    except Unsupported as error:
        status, why = "unavailable", str(error)
    except (DoesNotFit, MemoryError) as error:
        status, why = "does_not_fit", str(error) or "out of memory"
    except Died as died:
        _show(died)
        notes, status, why = died.notes, "failed", str(_explained(died, config, run.stage, out))
    except Exception as error:
        if not measuring.blames_stage(error):
            raise
        status, why = "failed", f"{type(error).__name__}: {error}"
    else:
        return ""
    rows = RunRows(run, seed_of(config, run.repeat), *_device(run.stage, notes))
    schema.write(out, table, [rows.blank(table, status, why)])
    return why


def stamp_of(folder: Path) -> Stamp:
    """A value that changes whenever a run's result is written; None if there is no result."""
    try:
        found = (folder / FACTS).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def limit_of(config: Config) -> float:
    """Seconds that a run may take."""
    return math.inf if config.measuring.full else config.measuring.limit_seconds


def _show(died: Died) -> None:
    if died.trace:
        print(died.trace, file=sys.stderr, flush=True)


def _explained(died: Died, config: Config, stage: str, what: Path) -> Died:
    """Add the stage and the limit to the message of a call that hung."""
    if died.kind != "hung":
        return died
    limit = config.measuring.limit_seconds
    return Died(
        f"stage '{stage}' {died}: {what} took longer than measuring.limit_seconds, {limit:g} s",
        died.kind,
        died.notes,
        died.trace,
    )


def _device(stage: str, notes: Mapping[str, object]) -> tuple[str, str]:
    """Name and kind of the run's device; the processor's if the run ended before it was opened."""
    if "device" in notes:
        return str(notes["device"]), str(notes["device_kind"])
    return cpu_description(card_of(stage, "--stage").threads), "cpu"
