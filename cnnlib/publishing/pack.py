"""A submission: written into a folder of published results, or packed into one archive."""

import gzip
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cnnlib import patterns
from cnnlib.comparing.results import MACHINE, SETTINGS, facts_files
from cnnlib.config_files import read_settings
from cnnlib.errors import ConfigError, DataError, UserError
from cnnlib.files import check_writable, write_whole
from cnnlib.measuring import schema
from cnnlib.measuring.record import RunFacts, read_facts_file
from cnnlib.publishing import contents
from cnnlib.publishing.contents import FREE, Table
from cnnlib.publishing.description import describe
from cnnlib.publishing.privacy import Scrubber
from cnnlib.stages import ALL

PROVENANCE = "provenance"
OWN_STAGES = "stages.json"
"""What figures say of stages from outside the repository; it lies beside the tables."""
NAMES = {"dataset", "network", "stage"}
"""Columns with names that a user may have chosen."""
LEFT_OUT = ("disturbed", "stage_file", "failed")
"""Keys of run.json that are about other processes, or about one's disk."""


@dataclass(frozen=True)
class Submission:
    """What was written."""

    path: Path
    """The archive, or the folder of the machine."""
    size: int
    """Bytes."""
    rows: int
    rows_left_out: int
    removed: dict[str, int]
    """What private words were taken out, and how often."""
    untimed: dict[str, str]
    """For each run that has no times, the status that says why, such as `unavailable`."""


def submit(
    results: Path, machine: str, note: str, *, out: Path | None, into: Path | None
) -> Submission:
    """Check the results, and write them as MACHINE into the folder `into`, or into an archive.

    Raises ConfigError for a machine's name that is no folder's, DataError naming what is missing,
    damaged or invalid, and UserError where something would be written over. Nothing is left then.
    """
    if not re.fullmatch(patterns.NAME, machine):
        raise ConfigError(f"--machine {machine!r} must be made of {patterns.WORDS[patterns.NAME]}")
    if not results.is_dir():
        raise DataError(f"{results} is no folder of results")
    target = into / machine if into is not None else out or Path(f"{machine}.tar.gz")
    if into is not None and os.path.lexists(target):
        raise UserError(f"{target} is there already; remove it first, or choose another --machine")
    check_writable(target / SETTINGS if into is not None else target)
    config = contents.settings_of(results)
    tables = contents.read_tables(results, config)
    epochs = next(table for table in tables if table.name == "epochs")
    contents.check_complete(results, config, epochs)
    untimed = contents.without_times(epochs)
    timed = [contents.of_timed_runs(table, untimed) for table in tables]
    for table in timed:
        contents.check_validated(table)
    facts = chosen_facts([read_facts_file(path) for path in facts_files(results)])
    if not facts:
        raise DataError(f"{results} has no run.json: by what it was measured is not known")
    scrubber = Scrubber.of_this_machine(allowed={machine, *(stage.name for stage in ALL)})
    check_names(tables, scrubber)
    thin = [scrubbed(contents.thinned(table), scrubber) for table in timed]
    with scratch(target) as folder:
        write_tables(folder / "tables", thin)
        own = results / "tables" / OWN_STAGES
        if own.is_file():
            write_json(folder / "tables" / OWN_STAGES, scrubber.facts(read_json(own)))
        for name, each in facts.items():
            kept = {key: value for key, value in each.items() if key not in LEFT_OUT}
            write_json(folder / PROVENANCE / f"{name}.json", scrubber.facts(kept))
        described = describe(machine, note, thin, list(facts.values()))
        write_json(folder / PROVENANCE / MACHINE, scrubber.facts(described))
        settings = scrubber.settings(read_settings([results / SETTINGS]))
        settings["results"] = f"results/reference/{machine}"
        write_text(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False))
        check_private(folder, scrubber)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if into is not None:
            into.mkdir(parents=True, exist_ok=True)
            os.rename(folder, target)
        else:
            pack(folder, machine, target)
            size = target.stat().st_size
    count = sum(len(next(iter(table.columns.values()))) for table in thin)
    before = sum(len(next(iter(table.columns.values()))) for table in tables)
    named = {contents.name_of(run): status for run, status in untimed.items()}
    return Submission(target, size, count, before - count, dict(scrubber.taken), named)


def chosen_facts(facts: Iterable[RunFacts]) -> dict[str, RunFacts]:
    """One run.json for each stage, by its name, and that of the last stage as `run` too.

    It is the first one of a run that is ok, or the first of all where none is.
    """
    found: dict[str, RunFacts] = {}
    for each in facts:
        stage = str(each.get("run", {}).get("stage", ""))
        if stage and (stage not in found or (is_ok(each) and not is_ok(found[stage]))):
            found[stage] = each
    if found:
        found["run"] = list(found.values())[-1]
    return found


def is_ok(facts: RunFacts) -> bool:
    """Whether the run ended well."""
    return facts["status"] == "ok"


def scrubbed(table: Table, scrubber: Scrubber) -> Table:
    """The table with nothing private in its FREE columns; each text is looked at once."""
    columns = {}
    for name, values in table.columns.items():
        if name in FREE:
            clean = {text: scrubber.text(text) for text in dict.fromkeys(values)}
            values = [clean[text] for text in values]
        columns[name] = values
    return Table(table.name, columns)


def check_names(tables: Iterable[Table], scrubber: Scrubber) -> None:
    """DataError for a data set, network or stage whose name has something private in it.

    Such names are the user's own, and changing them here would part the rows from the settings.
    """
    for table in tables:
        for column in NAMES & table.columns.keys():
            for name in dict.fromkeys(table.columns[column]):
                if found := scrubber.found_in(name, names=True):
                    raise DataError(
                        f"the {column} {name!r} has the {found} in its name; give it another name "
                        "in the settings and measure it again"
                    )


def check_private(folder: Path, scrubber: Scrubber) -> None:
    """DataError naming a file that is about to be published with something private in it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (found := scrubber.found_in(path.read_text(encoding="utf-8"))):
            raise DataError(f"{path.relative_to(folder)} would hold a {found}: not written")


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target`, which is removed unless it has been renamed."""
    parent = target.parent
    while not parent.is_dir():
        parent = parent.parent
    folder = Path(tempfile.mkdtemp(prefix=".submit-", dir=parent))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_tables(folder: Path, tables: Iterable[Table]) -> None:
    """The raw tables, each as TABLE.csv."""
    for table in tables:
        schema.write(folder / f"{table.name}.csv", table.name, table.rows())


def read_json(path: Path) -> Any:
    """The value in a file of JSON; DataError naming the file if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def write_json(path: Path, value: object) -> None:
    """A value as JSON, indented like run.json."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text as a whole file."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def pack(folder: Path, machine: str, archive: Path) -> None:
    """The folder as MACHINE in a tar file, gzipped: the same bytes for the same files.

    Nothing about whoever packs it is in there: neither user, group, times nor permissions.
    """
    with write_whole(archive) as temporary, open(temporary, "wb") as out:
        with gzip.GzipFile(filename="", fileobj=out, mode="wb", mtime=0) as zipped:
            with tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for path in sorted(folder.rglob("*")):
                    if path.is_file():
                        entry = tarfile.TarInfo(f"{machine}/{path.relative_to(folder)}")
                        entry.size, entry.mode = path.stat().st_size, 0o644
                        with open(path, "rb") as stream:
                            tar.addfile(entry, stream)
