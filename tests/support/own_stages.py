"""Stages outside the repository, written into a folder of a test."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnnlib.measuring import cards
from cnnlib.stages import _own
from cnnlib.system import traces

HEAD = "from dataclasses import replace\nfrom cnnlib.stages import gemm\n"
SOUND = HEAD + "STAGE = replace(gemm.STAGE, name='mine', title='My own')\n"

Write = Callable[..., str]


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process know no stage from outside the repository."""
    for name in ("_loaded", "_declared", "_known"):
        monkeypatch.setattr(_own, name, {})
    _own.installed.cache_clear()
    monkeypatch.setattr(cards, "_cards", {})
    monkeypatch.setattr(traces, "FOLDERS", {})
    monkeypatch.setattr(sys, "path", [*sys.path])


def writer(folder: Path) -> Iterator[Write]:
    """A function that writes a file into `folder` and returns its path as a user writes it."""
    before = set(sys.modules)

    def write(text: str, name: str = "mine.py") -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return f"./{name}"

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
