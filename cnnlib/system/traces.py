"""Where a supervised call was when it ended, from its traceback or from faulthandler's."""

import contextlib
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from cnnlib.paths import PACKAGE, ROOT

SUPERVISING = {
    str(Path(__file__).with_name(name)) for name in ("supervisor.py", "stop_requests.py")
}
"""Files whose frames surround every supervised call."""

FOLDERS: dict[Path, None] = {}
"""Folders of stages from outside the repository, whose lines say more than those of cnnlib."""


def watch(folder: Path) -> None:
    """Count the lines of the files in `folder` among those that say the most."""
    FOLDERS[folder] = None


def place_of(trace: TracebackType | None) -> str:
    """The innermost line of cnnlib, or else of all: `train of cnnlib/stages/mine.py:9`."""
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(trace)]
    return innermost(frames[::-1])


def place_in(text: str) -> str:
    """`place_of` for the current thread in faulthandler's text."""
    text = text.partition("(most recent call first)")[2].partition("\n\n")[0]
    found = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', text, re.MULTILINE)
    return innermost([(file, int(line), name) for file, line, name in found])


def innermost(frames: list[tuple[str, int | None, str]]) -> str:
    """The first of the frames (file, line, function) in words: of a stage from outside the
    repository if there are any, or else of cnnlib.

    Empty where nothing but the supervisor is on the stack.
    """
    frames = [frame for frame in frames if frame[0] not in SUPERVISING]
    inside = [frame for frame in frames if Path(frame[0]).is_relative_to(PACKAGE)]
    outside = [f for f in frames if any(Path(f[0]).is_relative_to(each) for each in FOLDERS)]
    for file, line, name in outside or inside or frames:
        path = Path(file)
        shown = path.relative_to(ROOT) if inside and not outside else path.name
        return f"{name} of {shown}:{line}"
    return ""


@contextlib.contextmanager
def trace_file() -> Iterator[IO[bytes]]:
    """An unnamed file into which faulthandler writes."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("trace"), "w+b", buffering=0) as file:
            yield file
        return
    with tempfile.TemporaryFile(buffering=0) as file:
        yield file


def read_trace(trace: IO[bytes]) -> str:
    """The text that faulthandler has written, without its list of extension modules."""
    trace.seek(0)
    return trace.read().decode(errors="replace").partition("\nExtension modules:")[0].strip()
