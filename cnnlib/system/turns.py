"""Turns of processes that prepare side by side while each of them is timed alone.

What is timed has the machine to itself: `alone` waits until no other process that takes part is
preparing. Those that want to be alone go before those that want to prepare, one after the other,
so that the pauses in which all preparing stops are few. Both wait for finitely many others: who
has been alone has to prepare again before it can be alone once more.

The locks are those of fcntl.lockf, which belong to a process and end with it, however it ends. No
other lock may be held while a process waits for its turn.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from typing import Literal

from cnnlib.system.supervisor import waiting

Turn = Literal["away", "preparing", "alone"]

WANTED, ROOM = 0, 1
"""Bytes of the file that are locked.

ROOM is shared by those that prepare, and one's own when alone. WANTED is shared by those that are
alone or wait for it; whoever begins to prepare has it for a moment.
"""


class Turns:
    """The turns of all processes that are forked from the one which has made this object."""

    def __init__(self, preparing: int) -> None:
        self.preparing = preparing
        """How many runs are measured side by side."""
        self.owner = os.getpid()
        """The process from which all that take part descend."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lasts as long as this object
        self._turn: Turn = "away"
        self._process = self.owner

    def take(self, turn: Turn) -> None:
        """Wait for a turn of another kind, if this process does not have it; the one before ends.

        "away" waits for nothing: the process neither prepares nor is timed.
        """
        if _untimed and turn == "alone":
            turn = "preparing"
        if not self.differs(turn):
            return
        self._lock(ROOM, fcntl.LOCK_UN)
        self._lock(WANTED, fcntl.LOCK_UN)
        self._turn = "away"
        if turn != "away":
            with waiting():
                if turn == "preparing":
                    self._lock(WANTED, fcntl.LOCK_EX)
                    self._lock(ROOM, fcntl.LOCK_SH)
                    self._lock(WANTED, fcntl.LOCK_UN)
                else:
                    self._lock(WANTED, fcntl.LOCK_SH)
                    self._lock(ROOM, fcntl.LOCK_EX)
        self._turn = turn

    def differs(self, turn: Turn) -> bool:
        """Whether the process has a turn of another kind."""
        if self._process != os.getpid():  # forked from one that may have had a turn
            self._process, self._turn = os.getpid(), "away"
        return turn != self._turn

    def _lock(self, byte: int, kind: int) -> None:
        fcntl.lockf(self._file, kind, 1, byte)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which the process is alone; afterwards it goes on as before."""
        before = self._turn if self.differs("away") else "away"
        self.take("alone")
        try:
            yield
        finally:
            self.take(before)


_untimed = False
_turns: Turns | None = None


def take_part(turns: Turns | None) -> None:
    """Let this process, and all that it forks, take turns; None: it has the machine to itself."""
    global _turns
    _turns = turns


def turns() -> Turns | None:
    """The turns that this process takes part in, if any."""
    return _turns


def take_turn(turn: Turn) -> None:
    """Turns.take, where this process takes part in any."""
    if _turns is not None:
        _turns.take(turn)


def changes_turn(turn: Turn) -> bool:
    """Whether this process would have to wait for this turn."""
    return _turns is not None and _turns.differs(turn)


def alone() -> contextlib.AbstractContextManager[None]:
    """A context without other processes of the sweep, for a choice that is made by measuring."""
    return contextlib.nullcontext() if _turns is None else _turns.alone()


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """A context in which no time counts: nothing needs to be alone, or to be the fastest."""
    global _untimed
    before, _untimed = _untimed, True
    try:
        yield
    finally:
        _untimed = before


def is_untimed() -> bool:
    """Whether what is done now is for nothing that will be timed."""
    return _untimed
