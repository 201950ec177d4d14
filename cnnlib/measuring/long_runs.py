"""Runs that take hours: where they are saved, and which parts of them are replayed."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cnnlib.config import Config
from cnnlib.engine import Order
from cnnlib.measuring.cards import card_of
from cnnlib.measuring.runs import Run, digest
from cnnlib.paths import KERNELS, PACKAGE
from cnnlib.training.checkpoint import State
from cnnlib.training.loop import epoch_order
from cnnlib.validation.replay import Recording, TimedCall


@dataclass
class CheckpointPolicy:
    """Whether and where a measurement is saved as it goes, and how it learns that it must stop."""

    file: Path | None
    """None: nothing is saved."""
    stop: Callable[[], int]
    """Returns the number of the signal that asks for an end, or 0."""
    resumed: bool = False

    @classmethod
    def of(
        cls, config: Config, run: Run, folder: Path | None, stop: Callable[[], int]
    ) -> "CheckpointPolicy":
        """Only runs in full are saved, below `folder`."""
        if folder is None or not config.measuring.full:
            return cls(None, stop)
        return cls(checkpoint_file(config, run, folder), stop)

    def finished(self) -> None:
        """Remove the checkpoint, which is no longer needed."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def checkpoint_file(config: Config, run: Run, folder: Path) -> Path:
    """The checkpoint of a run; its name changes with the settings and with the code."""
    content = hashlib.sha256(digest(config).encode())
    for path in sorted([*PACKAGE.glob("**/*.py"), *KERNELS.glob("**/*.cuh")]):
        content.update(path.read_bytes())
    content.update(card_of(run.stage, "a run").digest.encode())
    return folder / run.folder / f"{content.hexdigest()[:16]}.npz"


class ChunkRecorder:
    """Records the first and the last chunk of a training that is done in chunks of steps.

    Replaying all of a training that takes hours would take hours again.
    """

    def __init__(
        self, recording: Recording, count: int, epochs: int, seed: int, *, resumed: bool
    ) -> None:
        self._recording, self._epochs, self._seed, self._count = recording, epochs, seed, count
        self._before = None if resumed else (1, 0)
        """The epoch, and how many of its images were done, when the state was read last; None
        where that is not known.
        """

    def resume_epoch(self) -> None:
        """Read the state at the end of an epoch if no chunk of it was trained since resuming."""
        if self._before is None:
            self._recording.begin()

    def chunk_ended(self, state: State, steps: int) -> None:
        """Record a chunk; the argument `report` of training.loop.train_epochs."""
        recording, before = self._recording, self._before
        if before is None:
            recording.begin()
        else:
            first = before[1] if before[0] == state.epoch else 0
            order = partial(
                _part_of_epoch, self._count, self._seed, state.epoch, first, state.images_done
            )
            rates = recording.engine.setup.schedule.rates(state.epoch, self._epochs, steps)
            what = f"a part of epoch {state.epoch}"
            recording.end(TimedCall(what, order, rates, by_units=True, done=first))
            del recording.calls[1:-1]
        self._before = state.epoch, state.images_done


def _part_of_epoch(count: int, seed: int, epoch: int, first: int, last: int) -> Order:
    return epoch_order(count, seed, epoch)[first:last]
