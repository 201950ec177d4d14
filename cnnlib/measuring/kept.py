"""What a process keeps of one run for the next, where it measures several of them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Final

from cnnlib.engine import Engine, Stage
from cnnlib.measuring.telemetry import Sensors
from cnnlib.peers.compiled_code import forget_compiled_code
from cnnlib.training.target import Target, open_target

Cell = tuple[str, str, str, int]
"""Data set, network, stage and batch size of an engine: what its repeats share."""


class Kept:
    """The open device, and the engine of one cell, until a run needs another one.

    Repeats of a run differ in their seed alone, which an engine is given with each order of images
    and with the initial weights. So one engine serves all repeats, unless the seed is also that of
    dropout's masks.
    """

    def __init__(self, sensors: Sensors) -> None:
        self.sensors: Final = sensors
        self.momentum_checked: Final = set[Cell]()
        """Cells in which one run has already been checked with a momentum."""
        self.cells: Final = set[Cell]()
        """Cells that have been measured here, by the batch sizes of their runs."""
        self.sound = True
        """False once something has failed: the process had better end."""
        self._targets, self._engines = ExitStack(), ExitStack()
        self._target: Target | None = None
        self._engine: tuple[Cell, int, Engine] | None = None

    @contextmanager
    def target(self, stage: Stage, device: str) -> Iterator[Target]:
        """What the stage runs on, as open_target gives it; it stays open.

        All runs of the process have the same stage, or stages of one library.
        """
        if self._target is None:
            self._target = self._targets.enter_context(open_target(stage, device))
        with self._watched():
            yield self._target

    @contextmanager
    def engine(
        self, cell: Cell | None, repeat: int, make: Callable[[], AbstractContextManager[Engine]]
    ) -> Iterator[tuple[Engine, int]]:
        """The engine of this cell and the repeat that it was made for; without a cell, a new one.

        It stays open for further repeats.
        """
        if self._engine is None or self._engine[0] != cell:
            self._close_engine()
            engine = self._engines.enter_context(make())
            if cell is not None:
                self._engine = cell, repeat, engine
        else:
            _, repeat, engine = self._engine
        with self._watched():
            yield engine, repeat

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.sound = False
            raise

    def _close_engine(self) -> None:
        self._engine = None
        self._engines.close()
        forget_compiled_code()

    def close(self) -> None:
        """Close all that is still open."""
        with self._targets:
            self._close_engine()
        self.sensors.close()
