"""Files that appear whole or not at all."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import stat
import struct
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cnnlib.errors import DataError, UserError


@contextmanager
def write_whole(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one rename.

    The temporary file is flushed to disk before the rename, so that a crash leaves either the old
    file or the new one, and it is removed when the block raises. Missing parent folders are made.
    An OSError (full disk, read-only folder) becomes a UserError that names `path`.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        _check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_left_over(target)
        # The target's suffix is kept, because numpy and matplotlib choose a format by it. The name
        # is known before the file exists, because Ctrl-C may come between any two calls.
        unique = secrets.token_hex(4)
        temporary = target.with_name(f".{target.stem}.{unique}{target.suffix}")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


LEFT_OVER_SECONDS = 24 * 3600.0
"""Age at which a temporary file is taken to be left by a killed process."""


def _clear_left_over(target: Path) -> None:
    """Remove temporary files left by processes that were killed while they wrote `target`."""
    pattern = f".{glob.escape(target.stem)}.????????{glob.escape(target.suffix)}"
    for path in target.parent.glob(pattern):
        with contextlib.suppress(OSError):
            # A time in the future counts as old too: no write takes that long.
            if abs(time.time() - path.stat().st_mtime) > LEFT_OVER_SECONDS:
                path.unlink()


PROBE_BYTES = 4096
"""Space on the disk without which no result is computed."""


def check_writable(*paths: Path | str, size: int = PROBE_BYTES) -> None:
    """Raise the UserError of `write_whole` now if one of `paths` cannot be written later.

    Small files are written beside the targets, or in the nearest folder that exists, and removed
    again, because root passes every test of permissions even on a disk that is read-only or full.
    There must be space for `size` bytes. Each folder is tried once.
    """
    tried: set[Path] = set()
    for path in map(Path, paths):
        try:
            _check_target(path)
            folder = _nearest_folder(path.parent)
            if folder not in tried:
                _try_out(path, folder, size, sync=not tried)
                tried.add(folder)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _check_target(path: Path) -> None:
    """Raise OSError for a target that a file cannot or must not replace, such as a device."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError(errno.EINVAL, "it is no regular file")
    with contextlib.suppress(FileNotFoundError):
        # The name of its temporary file, ten characters longer, may be too long.
        path.with_name(f".{path.stem}.12345678{path.suffix}").lstat()


def _nearest_folder(folder: Path) -> Path:
    """`folder` or its nearest parent that exists; raises OSError if that is a file."""
    for parent in (folder, *folder.parents):
        if parent.is_dir():
            return parent
        if os.path.lexists(parent):
            raise NotADirectoryError(errno.ENOTDIR, f"{parent} is no folder")
    return folder


def _try_out(path: Path, folder: Path, size: int, sync: bool) -> None:
    """Write a file named like the temporary files for `path`, and remove it."""
    with contextlib.ExitStack() as undone:
        if folder != path.parent:
            # A folder of another name, since another process may be making the missing ones.
            folder = Path(tempfile.mkdtemp(prefix=".", dir=folder))
            undone.callback(folder.rmdir)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=folder)
        undone.callback(os.unlink, name)
        with open(handle, "wb") as out:
            out.write(bytes(PROBE_BYTES))
            if sync:
                out.flush()
                os.fsync(handle)
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of the file's bytes; OSError if it cannot be read."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_arrays(
    path: Path | str, names: Collection[str], what: str, perhaps: Collection[str] = ()
) -> dict[str, NDArray[Any]]:
    """The arrays `names` of an .npz file, and those of `perhaps` that it has.

    Other arrays are not read, and pickled ones never are.

    Raises DataError naming the file and `what` it was taken for when it cannot be read, is cut off,
    fails its checksums, is no .npz or lacks an array.
    """
    try:
        with open(path, "rb") as stream:
            return arrays_in(stream, path, names, what, perhaps)
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror or error}") from None


def arrays_in(
    stream: IO[bytes],
    path: Path | str,
    names: Collection[str] | None,
    what: str,
    perhaps: Collection[str] = (),
) -> dict[str, NDArray[Any]]:
    """The same from an open stream, which messages call `path`; None: all arrays."""
    try:
        # numpy would take any other file for a pickle and recommend loading it unsafely.
        if not stream.read(6).startswith((b"PK", b"\x93NUMPY")):
            raise DataError(f"{what} {path} is damaged: it does not begin like an .npz file")
        stream.seek(0)
        saved = np.load(stream, allow_pickle=False)
        if not isinstance(saved, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is no {what}: it holds one array")
        if missing := sorted(set(names or ()) - set(saved.files)):
            raise DataError(f"{path} is no {what}: it lacks {', '.join(missing)}")
        wanted = saved.files if names is None else names
        return {name: saved[name] for name in [*wanted, *(set(perhaps) & set(saved.files))]}
    except DataError:
        raise
    except (
        ValueError,
        KeyError,
        IndexError,
        EOFError,
        TypeError,
        AttributeError,
        MemoryError,
        RuntimeError,
        NotImplementedError,
        SyntaxError,
        OverflowError,
        struct.error,
        tokenize.TokenError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        # These are the exceptions of zipfile and numpy for foreign or damaged files. numpy quotes
        # a header that it cannot read.
        why = str(error)[:200] or type(error).__name__
        raise DataError(f"{what} {path} is damaged: {why}") from None


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold `path` exclusively among callers of this function, by a lock on .lock-NAME beside it.

    Raises UserError if another process holds it. Without support for locks (by the file system, or
    in a folder that cannot be written) nothing is locked, and writing `path` will report the error.
    """
    lock = path.with_name(f".lock-{path.name}")
    try:
        handle = _open_locked(lock, fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is in use: another training is saved there") from None
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is still locked
        os.close(handle)


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until no other process or thread holds `path` by this function, then hold it.

    Without support for locks, as in `exclusive`, nothing is locked.
    """
    lock = path.with_name(f".lock-{path.name}")
    handle = None
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(lock)
    try:
        yield
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)  # while it is still locked
            os.close(handle)


def _open_locked(lock: Path, patience: int = 0) -> int:
    """Open and lock the file; wait for the lock unless `patience` is LOCK_NB.

    Raises OSError, and BlockingIOError where it would have to wait.
    """
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | patience)
            # Its last holder may have removed it between the two calls.
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
