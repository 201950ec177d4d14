"""Fixtures of the tests of the command line."""

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cnnlib.paths import ROOT
from tests.support.command_line import (
    Home,
    Start,
)


@pytest.fixture
def home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Home]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        yield Home(tmp_path, capsys)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def start(home: Home) -> Iterator[Start]:
    """Start commands in processes of their own, each in a process group as in a terminal."""
    processes = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", "cnnlib", *arguments],
            cwd=home.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            text=True,
            start_new_session=True,
            # Tests that run in a shell's background ignore SIGINT, and children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
