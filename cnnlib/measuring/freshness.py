"""Whether a run's files are what was measured, with the settings and the data of the config.

A run's run.json holds digests: of each of its tables, and of everything in the config that can
change what is measured. A table that was removed, emptied or altered, a run.json that is damaged
and a run of other settings are all noticed by them, and the run is measured again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cnnlib.config import Config
from cnnlib.errors import DataError
from cnnlib.files import sha256
from cnnlib.measuring import schema
from cnnlib.measuring.runs import Run, run_settings, runs
from cnnlib.stages import find_stage

FACTS = "run.json"
MOST_LINES = 5
"""Files that are named; of others only the number is said."""


def run_files(folder: Path) -> list[Path]:
    """What a run writes into its folder."""
    return [*(folder / f"{name}.csv" for name in schema.RUN_TABLES), folder / FACTS]


def settings_digest(config: Config, run: Run, runs_on: str) -> str:
    """Hexadecimal SHA-256 of the settings and the data that decide what the run measures.

    `runs_on` is that of its stage.
    """
    content = run_settings(config, run.dataset, run.network, runs_on)
    content["data"] = config.dataset(run.dataset, "a run").digest()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def table_digests(folder: Path) -> dict[str, str]:
    """Table -> hexadecimal SHA-256 of the run's file; OSError if one cannot be read."""
    return {name: sha256(folder / f"{name}.csv") for name in schema.RUN_TABLES}


def read_facts(folder: Path) -> dict[str, Any]:
    """The run.json in `folder`; DataError if it is missing, damaged or not of a run."""
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(facts, dict) or facts.get("status") not in schema.CHOICES["status"]:
        raise DataError(f"{path} is damaged: it does not say how a run has ended")
    for key, kind in (("run", dict), ("disturbed", list), ("failed", str), ("tables", dict)):
        if not isinstance(facts.get(key, kind()), kind):
            raise DataError(f"{path} is damaged: its {key} is {facts[key]!r:.40}")
    return facts


def damage(folder: Path) -> str:
    """What is wrong with the files of a run that has been measured; "" if nothing is.

    Runs of earlier versions have no digests; their tables must at least be whole.
    """
    try:
        facts = read_facts(folder)
        if "tables" not in facts:
            for name in schema.RUN_TABLES:
                schema.read_columns(schema.find(folder, name), name)
            return ""
    except DataError as error:
        return str(error)
    recorded = {schema.current_name(name): text for name, text in facts["tables"].items()}
    for name in schema.RUN_TABLES:
        path = schema.find(folder, name)
        try:
            found = sha256(path)
        except OSError as error:
            return f"cannot read {path}: {error.strerror or error}"
        if found != recorded.get(name):
            return f"{path} is not what was measured"
    return ""


def staleness(run: Run, folder: Path, settings: str) -> str:
    """How the run in `folder`, whole as it is, is not the one that is asked for; "" if it is.

    `settings` is the digest of its settings. Runs of earlier versions have none.
    """
    facts = read_facts(folder)
    if facts.get("run", vars(run)) != vars(run):
        return f"{folder / FACTS} is of another run"
    if facts.get("settings", "") not in ("", settings):
        return f"{folder} was measured with other settings or data"
    return ""


def is_sound(folder: Path) -> bool:
    """Whether a run has a result that is whole, and that measuring it again would not change."""
    if damage(folder):
        return False
    facts = read_facts(folder)
    return facts["status"] != "failed" and "disturbed" not in facts


def few_lines(beginning: str, reasons: Iterable[str]) -> Iterator[str]:
    """What to say of many files: a line each for the first of them, and how many others there are.

    An empty reason says nothing.
    """
    said = [why for why in reasons if why]
    for why in said[:MOST_LINES]:
        yield f"{beginning}: {why}"
    if len(said) > MOST_LINES:
        yield f"{beginning}: {len(said) - MOST_LINES} more"


def changed_runs(config: Config) -> Iterator[tuple[Run, str]]:
    """The runs of the sweep that were measured and are damaged or stale now, and why."""
    digests: dict[tuple[str, str, str], str] = {}
    for run in runs(config):
        folder = Path(config.results) / run.folder
        if not os.path.lexists(folder / FACTS):
            continue
        alike = (run.dataset, run.network, run.stage)
        if alike not in digests:
            runs_on = find_stage(run.stage, "sweep.stages").runs_on
            digests[alike] = settings_digest(config, run, runs_on)
        if why := damage(folder) or staleness(run, folder, digests[alike]):
            yield run, why
