"""Files of the results that are missing or were altered since they were made are made again.

Snakemake sees that a file is older than what it was made from. It does not see that a file was
emptied or altered since, which makes it newer; nor that one is gone, if all that is made from it is
there. So each call compares the runs with the digests that they carry (cnnlib.measuring.freshness),
the data sets with their specifications, and tables and figures with those of the last call.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from snakemake.persistence import PersistenceBase

from cnnlib import datasets
from cnnlib.config import Config
from cnnlib.files import sha256, write_whole
from cnnlib.measuring.freshness import changed_runs, few_lines
from cnnlib.measuring.record import FACTS
from cnnlib.measuring.runs import runs

MADE = ".made.json"


def make_again(paths: Iterable[str]) -> None:
    """Let Snakemake run the jobs that make these files, as far as they are asked for.

    They count as incomplete, which Snakemake makes again (workflow/glue/recovery.py).
    """
    wanted = frozenset(paths)
    known = getattr(PersistenceBase.incomplete, "of_snakemake", PersistenceBase.incomplete)

    async def incomplete(self: Any, job: Any) -> list[Any]:
        return [*await known(self, job), *(f for f in job.output if str(f) in wanted)]

    incomplete.of_snakemake = known  # type: ignore[attr-defined]
    PersistenceBase.incomplete = incomplete


def written_by(dag: Any) -> Iterator[str]:
    """Every file that the jobs to be run will write, logs included."""
    for job in dag.needrun_jobs():
        yield from map(str, job.output)
        yield from map(str, job.log)


def runs_again(config: Config, results: str) -> dict[str, str]:
    """run.json of each run that is missing, damaged or stale -> why; "" if it is missing."""
    paths = {run: f"{results}/{run.folder}/{FACTS}" for run in runs(config)}
    found = {path: "" for path in paths.values() if not os.path.lexists(path)}
    return found | {paths[run]: why for run, why in changed_runs(config)}


def data_again(config: Config, results: str) -> dict[str, str]:
    """Files of data sets that exist but are not those that the config asks for -> why.

    Downloaded files are checked where they would be read to make the data set again.
    """
    found = {}
    raced = [config.race.dataset] if config.race else []
    for name in dict.fromkeys([*config.sweep.datasets, *raced]):
        spec = config.dataset(name, "sweep.datasets")
        made, folder = Path(results, "data", f"{name}.npz"), Path(results, "data", name)
        why = datasets.problem(name, made, spec) if os.path.lexists(made) else ""
        if why:
            found[str(made)] = why
        stamp = folder / ".downloaded"
        if stamp.exists() and (why or not made.exists()):
            for wrong in datasets.wrong_files(name, spec, folder):
                found[str(stamp)] = wrong
    return found


class Made:
    """The digests of the files that the last call made, kept beside the results."""

    def __init__(self, results: str, paths: Iterable[str]) -> None:
        self.file = Path(results, MADE)
        self.paths = list(dict.fromkeys(paths))
        known = self._read()
        self.found = {path: digest(path) for path in self.paths if path in known}
        self.altered = {
            path: known[path] for path, found in self.found.items() if found != known[path]
        }
        """Files that were altered since they were made -> the digests that they had."""

    def _read(self) -> dict[str, str]:
        """The digests of the last call; {} if there are none that can be read."""
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return known if isinstance(known, dict) else {}

    def again(self) -> dict[str, str]:
        """Altered files -> a message about them."""
        return {
            path: f"{path} is {'not what was made' if self.found[path] else 'missing'}"
            for path in self.altered
        }

    def begin(self) -> None:
        """Record, before the first job, only the files that are still to be made again.

        Then a call that is killed leaves no digests by which its new files would count as altered.
        """
        self._write(self.altered)

    def end(self) -> None:
        """Record all files as they are, except altered ones that no job has made again."""
        now = {path: digest(path) for path in self.paths}
        left = {path: old for path, old in self.altered.items() if now[path] == self.found[path]}
        self._write({path: content for path, content in now.items() if content} | left)

    def _write(self, known: dict[str, str]) -> None:
        with write_whole(self.file) as temporary:
            temporary.write_text(json.dumps(known, indent=0), encoding="utf-8")


def digest(path: str) -> str:
    """SHA-256 of a file; "" if it does not exist or cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return ""


def lines(again: dict[str, str]) -> Iterator[str]:
    """A few lines that say which files are made again, and why."""
    return few_lines("to be made again", again.values())
