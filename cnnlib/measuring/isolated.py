"""Measurements in processes of their own, so that a run has a result whatever its stage does.

A stage that hangs or ends its process gets the row of a failed run, with the reason.
"""

import math
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.errors import DoesNotFit, Unsupported
from cnnlib.measuring import race as racing
from cnnlib.measuring import run as measuring
from cnnlib.measuring import schema
from cnnlib.measuring.freshness import settings_digest
from cnnlib.measuring.runs import Run, seed_of
from cnnlib.stages import find_stage
from cnnlib.system.interrupts import asked_to_stop
from cnnlib.system.machine import cpu_description
from cnnlib.system.supervisor import Died, supervise

Row = dict[str, Any]


def measure_apart(
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
    began, before = datetime.now(UTC), _stamp(folder)

    def call() -> None:
        if checkpoints is None:
            measuring.measure(config, run, dataset, folder, mark=mark)
            return
        with asked_to_stop() as stop:
            measuring.measure(
                config, run, dataset, folder, checkpoints=checkpoints, stop=stop, mark=mark
            )

    try:
        supervise(call, limit=_limit(config), patient=checkpoints is not None)
    except Died as died:
        if died.kind == "died" and _stamp(folder) not in (None, before):
            return folder  # the result was whole by then
        _show(died)
        died = _explained(died, config, run.stage, folder)
        if not mark:
            raise died from None
        rows = measuring.Rows(run, seed_of(config, run.repeat), *_place(run.stage, died.notes))
        rows.settings = settings_digest(config, run, find_stage(run.stage, "--stage").runs_on)
        return measuring.fail(config, run, folder, rows, began, str(died))
    return folder


def race_apart(config: Config, stage: str, dataset: Dataset, out: Path) -> list[Row]:
    """Do what cnnlib.measuring.race.run_race does, in a process of its own; returns the rows."""
    race = racing.the_race(config)
    try:
        return supervise(
            lambda: racing.run_race(config, stage, dataset, out),
            limit=race.seeds * _limit(config),  # each training is a run
        )
    except Died as died:
        _show(died)
        run = Run(race.dataset, race.network, stage, race.batch_size, 1)
        died = _explained(died, config, stage, out)
        print(f"error: {out}: {died}", file=sys.stderr)
        row = _blank("race", run, race.training.seed, "failed", str(died), died.notes)
        row |= {"epoch": 1, "target_accuracy": race.target}
        schema.write(out, "race", [row])
        return [row]


def examine_apart(config: Config, run: Run, table: str, out: Path, call: Callable[[], Any]) -> str:
    """Make a call that writes a table other than those of runs, in a process of its own.

    If the stage fails, ends the process or cannot do it here, the table is one row without numbers.
    Returns the reason, or "" if the call has written its rows.
    """
    notes: dict[str, Any] = {}
    try:
        supervise(call, limit=_limit(config))
    except Unsupported as error:
        status, why = "unavailable", str(error)
    except (DoesNotFit, MemoryError) as error:
        status, why = "does_not_fit", str(error) or "out of memory"
    except Died as died:
        _show(died)
        notes, status, why = died.notes, "failed", str(_explained(died, config, run.stage, out))
    except Exception as error:
        if not measuring.is_the_stages(error):
            raise
        status, why = "failed", f"{type(error).__name__}: {error}"
    else:
        return ""
    row = _blank(table, run, seed_of(config, run.repeat), status, why, notes)
    schema.write(out, table, [row])
    return why


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Something that changes whenever a run's result is written; None if there is no result."""
    try:
        found = (folder / "run.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _limit(config: Config) -> float:
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
        died.kind, died.notes, died.trace,
    )  # fmt: skip


def _place(stage: str, notes: dict[str, Any]) -> tuple[str, str]:
    """Name and kind of the run's device; the processor's if the run ended before it was opened."""
    if "device" in notes:
        return notes["device"], notes["device_kind"]
    return cpu_description(find_stage(stage, "--stage").threads), "cpu"


def _blank(table: str, run: Run, seed: int, status: str, why: str, notes: dict[str, Any]) -> Row:
    """A row of `table` without a measurement."""
    nothing: dict[type, Any] = {str: "", int: 0, float: math.nan, bool: False}
    device, kind = _place(run.stage, notes)
    row = {column: nothing[of] for column, of in schema.TABLES[table].items()} | {
        "dataset": run.dataset, "network": run.network, "stage": run.stage, "device": device,
        "batch_size": run.batch_size, "seed": seed, "repeat": run.repeat, "device_kind": kind,
        "status": status,
    }  # fmt: skip
    if "reason" in row:
        row["reason"] = why
    return row
