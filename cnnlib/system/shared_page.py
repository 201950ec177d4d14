"""A page of memory in which a supervised call leaves its notes and its outcome.

Caller and call share a page rather than a pipe: what it holds survives the death of its writer,
needs no open file, and cannot be held open by processes that the call has started.
"""

import contextlib
import json
import mmap
import pickle
from typing import Any

CAPACITY = 1 << 20
"""Size of the page in bytes, which bounds the result of a call."""


class Page:
    """Memory shared by caller and call: notes, the number of a request, and the outcome.

    Notes lie in two slots. One slot is valid, so that a writer that dies halfway destroys no note.
    """

    NOTES = 4096
    OUTCOME = 2 * NOTES

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, CAPACITY)
        self._notes: dict[str, str] = {}

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
