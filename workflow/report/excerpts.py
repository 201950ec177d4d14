"""The lines of a kernel that matter, cut out of the files that are compiled.

workflow/report/excerpts.toml says which function a kernel's lines are in; the function is found by
its name, so that the page shows what is there now. A test looks for each of them.
"""

import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from cnnlib.errors import DataError
from cnnlib.paths import ROOT

LIST = ROOT / "workflow/report/excerpts.toml"
LINES = 24
"""The most lines of an excerpt, without the comment above it."""
COMMENT = 8
"""The most lines of the comment above a function that are shown."""


@dataclass(frozen=True)
class Entry:
    """An entry of excerpts.toml."""

    stage: tuple[str, ...]
    layer: str
    kernel: tuple[str, ...]
    file: str
    function: str
    start: str
    """The text with which the excerpt begins, where the function is too long; "" for its head."""

    @property
    def key(self) -> str:
        """A name for the excerpt on the page."""
        return re.sub(r"[^\w]+", "-", f"code-{Path(self.file).with_suffix('')}-{self.function}")


@dataclass(frozen=True)
class Excerpt:
    """A piece of a file: where it is, its text, and whether the function goes on behind it."""

    key: str
    file: str
    function: str
    line: int
    text: str
    more: bool


@functools.cache
def entries() -> tuple[Entry, ...]:
    """What excerpts.toml says."""
    with LIST.open("rb") as file:
        found = tomllib.load(file)["excerpt"]
    return tuple(
        Entry(
            tuple(each["stage"]),
            each["layer"],
            tuple(each["kernel"]),
            each["file"],
            each["function"],
            each.get("from", ""),
        )
        for each in found
    )


def entry_of(stage: str, layer: str, kernel: str) -> Entry | None:
    """The entry for a kernel of a stage that serves this layer."""
    for entry in entries():
        if stage in entry.stage and layer.startswith(entry.layer) and kernel in entry.kernel:
            return entry
    return None


@functools.cache
def excerpt(entry: Entry) -> Excerpt:
    """The lines of an entry. Raises DataError naming the function if the file has it no longer."""
    lines = (ROOT / entry.file).read_text(encoding="utf-8").splitlines()
    python = entry.file.endswith(".py")
    name = re.escape(entry.function)
    head = re.compile(rf"^\s*def {name}\(" if python else rf"__device__ .*[\s&*]{name}\(")
    first = next((i for i, line in enumerate(lines) if head.search(line)), None)
    if first is None:
        raise DataError(f"{entry.file} has no function {entry.function}: see {LIST.name}")
    end = end_of(lines, first)
    begin = first
    if entry.start:
        begin = next((i for i in range(first, end) if entry.start in lines[i]), -1)
        if begin < 0:
            raise DataError(
                f"{entry.file}, {entry.function}: no line with {entry.start!r}: see {LIST.name}"
            )
    else:
        while begin and is_comment(lines[begin - 1]) and first - begin < COMMENT:
            begin -= 1
    last = min(end, max(begin, first) + LINES)
    shown = dedent(lines[begin:last])
    return Excerpt(
        entry.key, entry.file, entry.function, begin + 1, "\n".join(shown).rstrip(), last < end
    )


def is_comment(line: str) -> bool:
    """Whether a line is a comment above a function, or the head of a template."""
    return line.strip().startswith(("//", "template <", "#", "@"))


def end_of(lines: list[str], first: int) -> int:
    """The line behind the function that begins at line `first`: by its indentation."""
    depth = indent(lines[first])
    for i in range(first + 1, len(lines)):
        line = lines[i]
        if line.startswith(" " * depth + "}"):
            return i + 1
        if line.strip() and indent(line) <= depth and lines[first].lstrip().startswith("def "):
            return i
    return len(lines)


def indent(line: str) -> int:
    """Spaces at the beginning of a line."""
    return len(line) - len(line.lstrip())


def dedent(lines: list[str]) -> list[str]:
    """The lines without the spaces that all of them begin with, but for those of a preprocessor."""
    least = min((indent(line) for line in lines if line.strip() and line[0] != "#"), default=0)
    return [line[min(least, indent(line)) :] for line in lines]
