"""All runs of a sweep, each in a process forked from this one.

They are measured one after the other, or prepared side by side and timed one after the other.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cnnlib.config import Config
from cnnlib.errors import UserError, one_line
from cnnlib.files import check_writable
from cnnlib.measuring.freshness import changed_runs, is_sound
from cnnlib.measuring.isolated import measure_isolated
from cnnlib.measuring.record import run_files, summary
from cnnlib.measuring.runs import Run, runs, sweep_dataset
from cnnlib.measuring.side_by_side import side_by_side


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

    def __init__(self, config: Config, preparing: int = 1) -> None:
        """Load the data sets and find out which runs are due.

        Up to `preparing` runs will be prepared and checked side by side.

        Raises UserError when data are missing or a result could not be written.
        """
        self._preparing = preparing
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
            side = side_by_side(self.due, self._preparing, self._measured)
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

    def _done(self, run: Run, problem: str) -> Done:
        if problem:
            return Done(run, problem, error=True, sound=False)
        text = summary(self._results / run.folder)
        return Done(run, text, error=False, sound=self._sound(run))

    def _sound(self, run: Run) -> bool:
        return is_sound(self._results / run.folder)
