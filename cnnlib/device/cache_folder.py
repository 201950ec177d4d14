"""Where compiled code is kept: a folder that can be written and whose files can be loaded."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cnnlib.errors import DeviceError

TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders for temporary files to try when that of TMPDIR is unsuitable."""
REMEDY = "CNNLIB_CACHE can name another folder"


def cache_folder() -> Path:
    """$CNNLIB_CACHE, or .cache/cnnlib in the home folder (or below $XDG_CACHE_HOME).

    Where the home folder is unknown, cannot be written or is mounted noexec, as in containers and
    on hardened machines, it is the user's own folder among the machine's temporary files. Raises
    DeviceError when there is no such folder either.
    """
    chosen = os.environ.get("CNNLIB_CACHE")
    if chosen:
        return Path(chosen)
    usual = _usual_folder()
    if usual is not None and _is_fit(usual):
        return usual
    for folder in _temporary_folders():
        if _is_fit(folder) and _is_private(folder):
            return folder
    if usual is not None:
        return usual  # using it will raise an error that says what is wrong
    raise DeviceError(f"there is no home folder to keep compiled code in; {REMEDY}")


def is_noexec(folder: Path) -> bool:
    """Whether a folder, existing or not, is on a file system from which no code can be loaded."""
    with contextlib.suppress(OSError, AttributeError):
        return bool(os.statvfs(_existing(folder)).f_flag & os.ST_NOEXEC)
    return False


def check_executable(folder: Path) -> None:
    """DeviceError when code cannot be loaded from a folder, before anything is compiled into it."""
    if is_noexec(folder):
        raise DeviceError(
            f"compiled code cannot be run from {folder}, whose file system is mounted noexec; "
            + REMEDY
        )


def _usual_folder() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "cnnlib"
    except RuntimeError:  # HOME is not set, and the user is in no list of users
        return None


def _temporary_folders() -> Iterator[Path]:
    name = f"cnnlib-{os.geteuid()}"
    for base in dict.fromkeys((tempfile.gettempdir(), *TEMPORARY)):
        yield Path(base, name)


def _is_fit(folder: Path) -> bool:
    """Whether files can be written into a folder, made if need be, and code loaded from it."""
    if is_noexec(folder):
        return False
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest folder above it that exists."""
    folder = folder.absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _is_private(folder: Path) -> bool:
    """Whether only this user can write to a folder among the temporary files of all users.

    The code in it will be run, so that a folder prepared by another user is not used.
    """
    found = folder.lstat()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
