"""A page of memory in which a supervised call leaves its notes and its outcome.

Caller and call share a page rather than a pipe: what it holds survives the death of its writer,
needs no open file, and cannot be held open by processes that the call has started.
"""

import contextlib
import json
import math
import mmap
import pickle
import struct
import time
from typing import Any

CAPACITY = 1 << 20
"""Size of the page in bytes, which bounds the result of a call."""


class Page:
    """Memory shared by caller and call: notes, the number of a request, and the outcome.

    Notes lie in two slots. One slot is valid, so that a writer that dies halfway destroys no note.
    """

    NOTES = 4096
    WAITING = 2 * NOTES
    """Two numbers: the seconds that the call has waited, and since when it waits, or nan."""
    OUTCOME = WAITING + 16

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, CAPACITY)
        self._notes: dict[str, str] = {}
        self._began = time.monotonic()
        self._put_waiting(0.0, math.nan)

    def note(self, **facts: str) -> None:
        self._notes |= facts
        text = json.dumps(self._notes).encode()
        slot = 1 - self._memory[0]
        begin = slot * self.NOTES + 8
        if begin + len(text) < (slot + 1) * self.NOTES:
            self._memory[begin : begin + len(text) + 1] = text + b"\0"
            self._memory[0] = slot

    @property
    def notes(self) -> dict[str, str]:
        begin = self._memory[0] * self.NOTES + 8
        text = self._memory[begin : self._memory.find(b"\0", begin)]
        with contextlib.suppress(ValueError):  # a stage may have written anywhere
            return dict(json.loads(text)) if text else {}
        return {}

    @property
    def request(self) -> int:
        """The signal that has asked the call to stop, or 0."""
        return self._memory[1]

    @request.setter
    def request(self, number: int) -> None:
        self._memory[1] = number

    def wait(self, since: float) -> None:
        """The call waits for other processes since this moment, by time.monotonic."""
        self._put_waiting(self._waiting()[0], since)

    def go_on(self, now: float) -> None:
        """The call does not wait any longer."""
        self._put_waiting(self.waited(now), math.nan)

    def begin_anew(self, now: float) -> None:
        """All that has gone by until now counts as waiting."""
        self._put_waiting(now - self._began, math.nan)

    def waited(self, now: float) -> float:
        """Seconds that the call has waited for other processes until now."""
        total, since = self._waiting()
        return total if math.isnan(since) else total + max(0.0, now - since)

    def _waiting(self) -> tuple[float, float]:
        total, since = struct.unpack_from("2d", self._memory, self.WAITING)
        return total, since

    def _put_waiting(self, total: float, since: float) -> None:
        struct.pack_into("2d", self._memory, self.WAITING, total, since)

    def put(self, outcome: tuple[str, Any]) -> None:
        data = pickle.dumps(outcome)
        begin = self.OUTCOME + 8
        self._memory[begin : begin + len(data)] = data
        self._memory[self.OUTCOME : begin] = len(data).to_bytes(8, "little")  # now it is whole

    def get(self) -> tuple[str, Any] | None:
        """How the call finished, or None if it did not."""
        begin = self.OUTCOME + 8
        size = int.from_bytes(self._memory[self.OUTCOME : begin], "little")
        if not size:
            return None
        with contextlib.suppress(Exception):
            kind, value = pickle.loads(self._memory[begin : begin + size])
            return kind, value
        return None

    def close(self) -> None:
        self._memory.close()


def can_be_passed(value: object) -> bool:
    """Whether another process can read `value` from a page."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True
