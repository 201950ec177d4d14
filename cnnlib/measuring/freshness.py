"""Whether a run's files are what was measured, with the settings and the data of the config.

The run.json of a run holds a digest of each of its tables, and one of everything in the config that
can change what is measured. By these digests, a table that was removed, emptied or altered, a
damaged run.json and a run with other settings are detected, and the run is measured again.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cnnlib.config import Config
from cnnlib.errors import DataError
from cnnlib.files import sha256
from cnnlib.measuring import schema
from cnnlib.measuring.cards import card_of
from cnnlib.measuring.record import FACTS, read_facts
from cnnlib.measuring.runs import Run, runs, settings_digest

MOST_LINES = 5
"""Files that are named in messages; of further ones only their number is given."""


def damage(folder: Path) -> str:
    """What is wrong with the files of a run that has been measured; "" if nothing is.

    Runs of earlier versions have no digests; their tables must at least be complete.
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
    """Why the undamaged run in `folder` is not the one that is asked for; "" if it is.

    `settings` is the digest of the settings asked for. Runs of earlier versions have none.
    """
    facts = read_facts(folder)
    if facts.get("run", vars(run)) != vars(run):
        return f"{folder / FACTS} is of another run"
    if facts.get("settings", "") not in ("", settings):
        return f"{folder} was measured with other settings or data"
    return ""


def edited(run: Run, folder: Path) -> str:
    """Why the undamaged run in `folder` is not of the stage's present files, if these come from
    outside the repository; "" if it is. The repository's own files are the workflow's to watch.
    """
    card = card_of(run.stage, "sweep.stages")
    if card.digest == read_facts(folder).get("stage_digest", ""):
        return ""
    stage = card.file or f"stage '{run.stage}'"
    return f"{folder} was measured with another version of {stage} or of what it uses"


def is_sound(folder: Path) -> bool:
    """Whether a run has an undamaged result that measuring it again would not improve."""
    if damage(folder):
        return False
    facts = read_facts(folder)
    return facts["status"] != "failed" and "disturbed" not in facts


def few_lines(beginning: str, reasons: Iterable[str]) -> Iterator[str]:
    """Lines about many files: one for each of the first reasons, and one with how many follow.

    Empty reasons are skipped.
    """
    said = [why for why in reasons if why]
    for why in said[:MOST_LINES]:
        yield f"{beginning}: {why}"
    if len(said) > MOST_LINES:
        yield f"{beginning}: {len(said) - MOST_LINES} more"


def changed_runs(config: Config) -> Iterator[tuple[Run, str]]:
    """The measured runs of the sweep that are damaged or stale now, and why."""
    digests: dict[tuple[str, str, str], str] = {}
    for run in runs(config):
        folder = Path(config.results) / run.folder
        if not os.path.lexists(folder / FACTS):
            continue
        alike = (run.dataset, run.network, run.stage)
        if alike not in digests:
            runs_on = card_of(run.stage, "sweep.stages").runs_on
            digests[alike] = settings_digest(config, run, runs_on)
        why = damage(folder) or staleness(run, folder, digests[alike]) or edited(run, folder)
        if why:
            yield run, why
