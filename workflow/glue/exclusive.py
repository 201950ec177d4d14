"""Run a command while nothing else is timed on this machine.

python -m workflow.glue.exclusive COMMAND...

Within one call Snakemake takes care of that. This program waits for what Snakemake cannot see:
another call, perhaps in another folder, or a measurement that outlived a killed Snakemake.
"""

import fcntl
import os
import sys
import tempfile
from pathlib import Path


def lock_file() -> Path:
    """The lock of this user on this machine; files of other users may not be opened."""
    return Path(tempfile.gettempdir(), f"cnnlib-timer-{os.getuid()}.lock")


def main(command: list[str]) -> None:
    """Wait for the lock, with a message, and become `command`, which then holds it."""
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
