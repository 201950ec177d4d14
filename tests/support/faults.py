"""Run a command repeatedly, with the disk full at its first call that writes, its second, ...

python -m tests.support.faults FOLDER COMMAND..., under LD_PRELOAD of tests/support/faults.cpp: each
line printed is JSON on one attempt; the last is one in which nothing failed. COMMAND is a command
of cnnlib, or `workflow.NAME` with its arguments. FOLDER is restored before each
attempt.
"""

import contextlib
import ctypes
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnlib.__main__ import main
from cnnlib.measuring import isolated
from cnnlib.measuring import run as measuring
from cnnlib.measuring.record import RunRecord


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def restore(folder: Path, files: dict[str, bytes] | None) -> None:
    """Make `folder` hold exactly these files; None removes it."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def call_of(command: list[str]) -> Callable[[], int]:
    """The command as a function that returns its exit code."""
    if not command[0].startswith("workflow."):
        return lambda: main(command)

    def call() -> int:
        sys.argv = command
        try:
            runpy.run_module(command[0], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def measure_once() -> None:
    """Make further measurements only write what the first one has measured."""
    write, found = RunRecord.write, []

    def first(record: RunRecord, folder: Path) -> None:
        found.append(record)
        write(record, folder)

    def again(config: Any, run: Any, dataset: Any, folder: Path, **options: Any) -> Path:
        if not found:
            return measure(config, run, dataset, folder, **options)
        write(found[0], folder)
        return folder

    measure = measuring.measure
    RunRecord.write, measuring.measure = first, again  # type: ignore[assignment,method-assign]
    # The calls must be made in this process, where the preloaded library counts them.
    isolated.supervise = lambda call, **options: call()


def attempts(folder: Path, command: list[str]) -> None:
    preloaded = ctypes.CDLL(None)
    preloaded.fault_hit.restype = ctypes.c_char_p
    before = files_in(folder) if folder.exists() else None
    call, number = call_of(command), 0
    measure_once()
    call()
    while True:
        number += 1
        restore(folder, before)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            preloaded.fault_at(bytes(folder), number)
            code = call()
            failed = preloaded.fault_hit()
            preloaded.fault_at(b"", 0)
        left = files_in(folder) if folder.exists() else {}
        attempt = {
            "failed": (failed or b"").decode(),
            "code": code,
            "said": said.getvalue(),
            "left": {name: content.decode("latin-1") for name, content in left.items()},
        }
        print(json.dumps(attempt))
        if not failed:
            return


if __name__ == "__main__":
    attempts(Path(sys.argv[1]).resolve(), sys.argv[2:])
