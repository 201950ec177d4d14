"""Files dated in the future, which a wrong clock, an archive or another machine leaves behind.

Snakemake compares the times of files. An input that is dated in the future is newer than all that
is made from it: the job that made it fails after its work, and every call would run it again.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cnnlib.errors import UserError

TOLERANCE = 1.0
"""Seconds by which the clock of a file server may be ahead."""
SHOWN = 3
"""The most files that are named."""


def date_now(folders: Iterable[Path | str], now: float | None = None) -> list[Path]:
    """Give every file in the folders that is dated in the future the present time, and say which.

    All get the same time, so that none of them is newer than another. Raises UserError naming a
    file whose time cannot be changed.
    """
    now = time.time() if now is None else now
    found = sorted(ahead(folders, now + TOLERANCE))
    for path in found:
        try:
            os.utime(path, (now, now))
        except OSError as error:
            raise UserError(
                f"{path} is dated in the future, and its time cannot be changed: {error.strerror}"
            ) from None
    if found:
        names = ", ".join(map(str, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
        files = "1 file" if len(found) == 1 else f"{len(found)} files"
        print(f"dated in the future, now dated today: {files} ({names})", file=sys.stderr)
    return found


def ahead(folders: Iterable[Path | str], limit: float) -> Iterator[Path]:
    """Files in the folders, and in folders in these, whose time is later than `limit`."""
    for folder in folders:
        for place, inner, files in os.walk(folder):
            inner[:] = [name for name in inner if name not in ("__pycache__", "reference")]
            for name in files:
                path = Path(place, name)
                if path.lstat().st_mtime > limit and not path.is_symlink():
                    yield path
