"""The exercises: one for each stage but the last, with its parts, points, texts and files.

The texts of an exercise are in texts/STAGE.toml. Its code is not: that is cut from the shipped
sources whenever it is asked for, so that a solution is always what the stage does.
"""

import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnlib.errors import ConfigError
from cnnlib.exercises.cutting import Body, filled, find_body, lines_of, source_of
from cnnlib.network import Network, parse_layers
from cnnlib.paths import KERNELS, PACKAGE

TEXTS = Path(__file__).parent / "texts"
NAMES = ("naive", "gemm", "gemm_cuda", "fused", "ring")
"""The stages that have an exercise, in the order in which they are done."""
BATCH = 6
"""Images of a batch on which parts are tried, where an exercise says nothing else."""
HEADER = "exercise.cuh"
"""The file beside kernels that says what a part does as long as it is not written."""
INSERT = "#: "
"""Begins a line of a module's text that stands for a function: `#: FILE CLASS.FUNCTION`."""


@dataclass(frozen=True)
class Part:
    """A hole: one function, or the end of one."""

    name: str
    file: str
    function: str
    points: float
    task: str
    hints: tuple[str, ...]
    after: str = ""
    """The hole begins after the line of the function with this text; "": it is the whole body."""

    def find(self, text: str) -> Body:
        """Where the part's lines are in its file. Raises NotFound."""
        return find_body(text, self.file, self.function, self.after)

    def put(self, lines: str, into: str) -> str:
        """The file with these lines for the part."""
        return filled(into, self.find(into), lines)

    def lines(self, text: str) -> str:
        """The part's lines in a text of its file."""
        return lines_of(text, self.find(text))


@dataclass(frozen=True)
class Exercise:
    """A copy of a stage whose parts are to be written."""

    name: str
    """The stage's."""
    title: str
    text: str
    module: str
    """The text of the stage's file, in which lines that begin with INSERT stand for functions."""
    sources: Mapping[str, str]
    """Name of a kernel file of the exercise -> the file of kernels/ that it is a copy of."""
    networks: tuple[Network, ...]
    """Small networks on which the parts are tried."""
    batch_size: int
    parts: tuple[Part, ...]

    @property
    def main(self) -> str:
        """The name of the stage's file."""
        return f"my_{self.name}.py"

    @property
    def points(self) -> float:
        return sum(part.points for part in self.parts)

    def part(self, name: str) -> Part:
        """The part of this name; ConfigError with the names that there are."""
        for part in self.parts:
            if part.name == name:
                return part
        known = ", ".join(part.name for part in self.parts)
        raise ConfigError(f"exercise {self.name} has no part {name!r}; it has: {known}")

    def solution(self) -> dict[str, str]:
        """Name -> text of each file, as the shipped stage has it."""
        files = {self.main: mark(self, self.main) + _module(self.module)}
        for name, source in self.sources.items():
            files[name] = mark(self, name) + _kernels(source)
        if self.sources:
            files[HEADER] = (TEXTS / HEADER).read_text(encoding="utf-8")
        return files


def mark(exercise: Exercise, file: str) -> str:
    """The first line of an exercise's file, by which one that is handed in is known."""
    comment = "#" if file.endswith(".py") else "//"
    return f"{comment} cnnlib exercise {exercise.name}, file {file}\n"


def find_exercise(name: str) -> Exercise:
    """The exercise on a stage; ConfigError with the stages that have one."""
    if name not in NAMES:
        raise ConfigError(f"there is no exercise {name!r}; there are: {', '.join(NAMES)}")
    return _load(name)


@functools.cache
def _load(name: str) -> Exercise:
    given = tomllib.loads((TEXTS / f"{name}.toml").read_text(encoding="utf-8"))
    networks = [_network(number, each) for number, each in enumerate(given["network"], 1)]
    parts = [
        Part(
            each["name"],
            each.get("file", f"my_{name}.py"),
            each["function"],
            each["points"],
            " ".join(each["task"].split()),
            tuple(each["hints"]),
            each.get("after", ""),
        )
        for each in given["part"]
    ]
    return Exercise(
        name,
        given["title"],
        " ".join(given["text"].split()),
        given["module"].lstrip("\n"),
        given.get("files", {}),
        tuple(networks),
        given.get("batch_size", BATCH),
        tuple(parts),
    )


def _network(number: int, given: Mapping[str, Any]) -> Network:
    """A network that ends in as many classes as its last layer has elements."""
    name = f"try{number}"
    layers = parse_layers(name, given["layers"])
    shape = tuple(given["input_shape"])
    end = functools.reduce(lambda source, layer: layer.output_shape(source), layers, shape)
    return Network(name, shape, math.prod(end), layers)


def _module(text: str) -> str:
    """The stage's file: each function of the shipped sources at its place."""
    lines = []
    for line in text.splitlines(keepends=True):
        if not line.startswith(INSERT):
            lines.append(line)
            continue
        path, function = line.removeprefix(INSERT).split()
        source = PACKAGE.parent / path
        found = source_of(source.read_text(encoding="utf-8"), path, function)
        lines += [f"    {each}" if each.strip() else each for each in found.splitlines(True)]
        lines.append("\n")
    return "".join(lines).replace("\n\n\n\n", "\n\n\n")


def _kernels(source: str) -> str:
    """A file of kernels/, with includes as they are seen from there."""
    text = (KERNELS / source).read_text(encoding="utf-8").replace('#include "../', '#include "')
    return text.replace("#pragma once\n", f'#pragma once\n#include "{HEADER}"\n', 1)
