"""All runs of a sweep, in processes forked from this one.

They are measured one after the other, each in a process of its own, or prepared side by side and
timed one after the other.
"""

import ast
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from cnnlib.config import Config
from cnnlib.errors import UserError, one_line
from cnnlib.files import check_writable
from cnnlib.measuring.freshness import changed_runs, is_sound
from cnnlib.measuring.isolated import limit_of, measure_isolated, settle, stamp_of
from cnnlib.measuring.kept import Kept
from cnnlib.measuring.record import run_files, summary
from cnnlib.measuring.run import measure
from cnnlib.measuring.runs import Run, runs, sweep_dataset
from cnnlib.measuring.side_by_side import kin_of, side_by_side
from cnnlib.measuring.telemetry import Sensors
from cnnlib.stages import is_shipped
from cnnlib.system.supervisor import Died, begin_anew, note, supervise, waiting
from cnnlib.system.turns import turns


@dataclass(frozen=True)
class Done:
    """What became of one run of the sweep."""

    run: Run
    text: str
    """One line: a summary of the result, or the error by which there is none."""
    error: bool
    sound: bool
    """Whether there is a result that measuring it again would not improve."""


class Sweep:
    """The runs of the config's sweep that have no sound result yet."""

    def __init__(self, config: Config, preparing: int = 1, *, keep_processes: bool = False) -> None:
        """Load the data sets and find out which runs are due.

        Up to `preparing` runs will be prepared and checked side by side. With `keep_processes`, a
        process of theirs goes on with other networks and batch sizes.

        Raises UserError when data are missing or a result could not be written.
        """
        self._preparing, self._keep_processes = preparing, keep_processes
        self.config = config
        self._results = Path(config.results)
        self._datasets = {name: sweep_dataset(config, name) for name in config.sweep.datasets}
        self.changed = dict(changed_runs(config))
        """Runs whose results are damaged or stale, and why."""
        self.due = [run for run in runs(config) if run in self.changed or not self._sound(run)]
        """The runs to be measured, in the order of the workflow."""
        files = (file for run in self.due for file in run_files(self._results / run.folder))
        check_writable(*files)

    def measure(self) -> Generator[Done, None, None]:
        """Measure each run that is due; a run that fails does not end the sweep.

        Whoever does not take all of them has to close it, so that no process is left.
        """
        if self._preparing > 1:
            side = side_by_side(self.due, self._preparing, self._work)
            with closing(side) as measured:
                for run, problem in measured:
                    yield self._done(run, problem)
            return
        for run in self.due:
            yield self._done(run, self._measured(run))

    def _measured(self, run: Run) -> str:
        """Measure a run; returns what keeps it from having a result, or ""."""
        folder = self._results / run.folder
        try:
            measure_isolated(self.config, run, self._datasets[run.dataset], folder, mark=True)
        except (UserError, OSError, MemoryError) as error:
            return one_line(error)
        return ""

    def _work(self, connection: Connection) -> None:
        """Measure the runs that arrive, until None does; send for each what `_measured` returns.

        Runs of one of the repository's stages that follow each other have one process, which keeps
        what they have in common. One that has failed, and one whose stage is a user's, is followed
        by a new process.
        """
        given: Run | None = None
        while True:
            try:
                going_on, given = supervise(
                    lambda given=given: self._measure_together(connection, given),  # type: ignore[misc]
                    limit=limit_of(self.config),
                )
            except Died as died:
                given = None
                if died.notes.get("run"):
                    connection.send(self._settled(died))
                continue
            if not going_on:
                return
            if given is not None and not is_shipped(given.stage):
                connection.send(self._measured(given))
                given = None

    def _measure_together(
        self, connection: Connection, given: Run | None
    ) -> tuple[bool, Run | None]:
        """Measure `given` and the runs that arrive while one process can.

        These are the repeats of one run or, where processes are kept, all of one stage or library.
        Returns whether any more can follow, and a run that needs another process.
        """
        sharing = turns()
        assert sharing is not None
        sensors = Sensors(self.config.measuring.sample_interval, sharing.owner)
        first: Run | None = None
        with closing(Kept(sensors)) as kept:
            while kept.sound:
                if given is None:
                    with waiting():
                        given = connection.recv()
                if given is None:
                    return False, None
                if not is_shipped(given.stage) or (first and not self._shares(given, first)):
                    return True, given
                run, first, given = given, first or given, None
                folder = self._results / run.folder
                note(run=str(self.due.index(run)), before=repr(stamp_of(folder)))
                note(began=datetime.now(UTC).isoformat())
                begin_anew()
                said = ""
                try:
                    dataset = self._datasets[run.dataset]
                    measure(self.config, run, dataset, folder, mark=True, kept=kept)
                except (UserError, OSError, MemoryError) as error:
                    said, kept.sound = one_line(error), False
                note(run="")
                connection.send(said)
        return True, None

    def _shares(self, run: Run, other: Run) -> bool:
        """Whether both runs may be measured by one process."""
        if self._keep_processes:
            return kin_of(run.stage) == kin_of(other.stage)
        return run == replace(other, repeat=run.repeat)

    def _settled(self, died: Died) -> str:
        """See that the run whose process has died has a result; returns what `_measured` does."""
        run = self.due[int(died.notes["run"])]
        before = ast.literal_eval(died.notes["before"])
        began = datetime.fromisoformat(died.notes["began"])
        folder = self._results / run.folder
        try:
            settle(self.config, run, folder, died, began, before, mark=True)
        except (UserError, OSError, MemoryError) as error:
            return one_line(error)
        return ""

    def _done(self, run: Run, problem: str) -> Done:
        if problem:
            return Done(run, problem, error=True, sound=False)
        text = summary(self._results / run.folder)
        return Done(run, text, error=False, sound=self._sound(run))

    def _sound(self, run: Run) -> bool:
        return is_sound(self._results / run.folder)
