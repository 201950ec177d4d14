"""Run a command while nothing else is timed here: python -m workflow.glue.exclusive COMMAND...

Snakemake sees to that within one call. This is for what it cannot see: another call, in another
folder perhaps, and a measurement that outlived a Snakemake that was killed.
"""

import fcntl
import os
import sys
import tempfile
from pathlib import Path


def lock_file() -> Path:
    """One for each user and machine. (Others' files in a shared folder may not be opened.)"""
    return Path(tempfile.gettempdir(), f"cnnlib-timer-{os.getuid()}.lock")


def main(command: list[str]) -> None:
    """Wait for the lock, saying so, and become `command`, which holds it as long as it lives."""
    handle = os.open(lock_file(), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for another measurement on this machine", file=sys.stderr, flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    os.set_inheritable(handle, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
