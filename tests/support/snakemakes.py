"""Snakemake for tests that call it often: a process that has imported it forks for each call.

Importing takes longer than planning the tiny experiment. A forked process goes on as one that
`python -m snakemake` has started: with its own arguments, folder, environment and end. What belongs
to the repository is imported after the fork, from the folder of the call.

Run as a program, this file is the process that forks.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LATER = ("pandas", "pydantic", "requests", "smart_open", "yte")
"""What Snakemake or the Snakefile imports during a call."""


class Forking:
    """The process that forks: it starts with the first call and ends no later than this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def call(
        self, arguments: Sequence[str], folder: Path, env: Mapping[str, str], timeout: float
    ) -> tuple[int, str]:
        """Exit code and output of `python -m snakemake` with these arguments, in the folder.

        The code is that of SIGKILL, -9, for a call that takes longer than so many seconds.
        """
        with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
            request = {
                "arguments": list(arguments),
                "folder": str(folder),
                "env": dict(env),
                "out": f"/proc/{os.getpid()}/fd/{said.fileno()}",
            }
            child = self._ask(json.dumps(request))
            late = threading.Timer(timeout, os.kill, (child, signal.SIGKILL))
            late.start()
            try:
                code = self._answer()
            except BaseException:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                self.end()
                raise
            finally:
                late.cancel()
            said.seek(0)
            return code, said.read()

    def _ask(self, line: str) -> int:
        if self._process is None:
            kept = {k: v for k, v in os.environ.items() if not k.startswith("SNAKEMAKE_")}
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=kept,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            atexit.register(self.end)
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return int(line)

    def end(self) -> None:
        """End it; the next call starts another."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


SNAKEMAKE = Forking()


def serve() -> None:
    """Fork for every line that comes, and answer with the process id, then with the exit code."""
    cli = importlib.import_module("snakemake.cli")
    cli.get_argument_parser()  # imports all plugins
    for name in LATER:
        importlib.import_module(name)
    gc.freeze()  # what is there already is not looked through in every call
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
            cli.main()  # exits
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(request: dict[str, Any]) -> None:
    """Make this process what `python -m snakemake` is at its start."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    out = os.open(request["out"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for new, old in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(new, old)
    os.close(nothing)
    os.close(out)
    tempfile.tempdir = None  # found anew, in this environment
    sys.path[0] = request["folder"]
    sys.argv = [str(Path(sys.modules["snakemake"].__path__[0], "__main__.py"))]
    sys.argv += request["arguments"]


if __name__ == "__main__":
    serve()
