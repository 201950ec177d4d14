"""How many inputs are tried, how they are made from good ones, and what may happen to them.

CNNLIB_FUZZ=20000 tries so many inputs in each test, every time others; without it a few hundred
are tried, the same ones every time.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cnnlib.errors import UserError

WANTED = int(os.environ.get("CNNLIB_FUZZ", "0"))
MEMORY = 2 << 30
"""Bytes of address space that one input may add."""
SECONDS = 20.0
"""Far more than any input needs, on a busy machine too: what takes longer hangs."""


def inputs(usual: int) -> settings:
    """Settings of a test that tries `usual` inputs, or as many as CNNLIB_FUZZ says."""
    return settings(
        max_examples=WANTED or usual,
        derandomize=not WANTED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


Change = tuple[str, int, int]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(("bit", "byte", "cut", "delete", "double", "number", "splice")),
        st.integers(0, 1 << 16),
        st.integers(0, (1 << 32) - 1),
    ),
    min_size=1,
    max_size=4,
)
"""Damage: what, where, with which number."""


def damaged(data: bytes, changes: list[Change]) -> bytes:
    """`data` with all of the changes, one after the other."""
    for kind, place, number in changes:
        at = place % (len(data) + 1)
        before, after = data[:at], data[at:]
        length = number % 64
        if kind == "bit" and after:
            data = before + bytes([after[0] ^ (1 << number % 8)]) + after[1:]
        elif kind == "byte" and after:
            data = before + bytes([number % 256]) + after[1:]
        elif kind == "cut":
            data = before
        elif kind == "delete":
            data = before + after[length:]
        elif kind == "double":
            data = before + after[:length] + after
        elif kind == "number":
            data = before + number.to_bytes(4, "big") + after[4:]
        elif kind == "splice":
            data = before + data[number % (len(data) + 1) :]
    return data


@contextmanager
def bounded() -> Iterator[None]:
    """A limit on memory and time, so that an input that wants too much of either fails."""
    with open("/proc/self/statm") as stream:
        taken = int(stream.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, old[1]))
    began = time.process_time()  # that other programs want the processor is no fault of the input
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    assert time.process_time() - began < SECONDS


def refusal(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what `read` returns, None) or (None, its one line); any other exception comes through."""
    with bounded():
        try:
            return read(), None
        except UserError as error:
            said = str(error)
    assert said
    assert len(said) < 2000
    assert len(said.splitlines()) == 1, said
    return None, said
