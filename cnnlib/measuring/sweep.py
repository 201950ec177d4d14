"""All runs of a sweep, one after the other, each in a process forked from this one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cnnlib.config import Config
from cnnlib.errors import UserError, one_line
from cnnlib.files import check_writable
from cnnlib.measuring.freshness import changed_runs, is_sound
from cnnlib.measuring.isolated import measure_isolated
from cnnlib.measuring.record import run_files, summary
from cnnlib.measuring.runs import Run, runs, sweep_dataset


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

    def __init__(self, config: Config) -> None:
        """Load the data sets and find out which runs are due.

        Raises UserError when data are missing or a result could not be written.
        """
        self.config = config
        self._results = Path(config.results)
        self._datasets = {name: sweep_dataset(config, name) for name in config.sweep.datasets}
        self.changed = dict(changed_runs(config))
        """Runs whose results are damaged or stale, and why."""
        self.due = [run for run in runs(config) if run in self.changed or not self._sound(run)]
        """The runs to be measured, in the order of the workflow."""
        files = (file for run in self.due for file in run_files(self._results / run.folder))
        check_writable(*files)

    def measure(self) -> Iterator[Done]:
        """Measure each run that is due; a run that fails does not end the sweep."""
        for run in self.due:
            folder = self._results / run.folder
            try:
                measure_isolated(self.config, run, self._datasets[run.dataset], folder, mark=True)
                yield Done(run, summary(folder), error=False, sound=self._sound(run))
            except (UserError, OSError, MemoryError) as error:
                yield Done(run, one_line(error), error=True, sound=False)

    def _sound(self, run: Run) -> bool:
        return is_sound(self._results / run.folder)
