"""What lies in gzip files and in tar or zip archives, read without writing anything anywhere.

Members of an archive are found by their whole name and only their bytes are used: no path in an
archive decides where something is written, and links are not followed.
"""

import gzip
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Protocol, cast

from cnnlib.datasets.http import FileFailed

GZIP = b"\x1f\x8b"
ZIP = b"PK"
CHUNK = 1 << 20
MOST_BYTES = 4 << 30
"""Largest size of one unpacked file: a few kilobytes of gzip can hold a disk full of zeros."""
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What tarfile and zipfile raise for damaged or foreign archives, and for encrypted members."""


def chunks_of(source: Path, unzip: bool = True) -> Iterator[bytes]:
    """The contents of a file, unzipped where it is gzipped; FileFailed if it is damaged.

    The content decides whether it is gzipped, not the name: servers may unzip or zip files on the
    way. Without `unzip` they are the file's own bytes.
    """
    try:
        with open(source, "rb") as stream:
            zipped = unzip and stream.read(len(GZIP)) == GZIP
            stream.seek(0)
            yield from unzipped(stream) if zipped else chunks(stream)
    except IsADirectoryError:
        raise FileFailed("is a folder") from None
    except PermissionError:
        raise FileFailed("no permission to read it") from None


def chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """The bytes of a stream; FileFailed where it turns out to be damaged."""
    while True:
        try:
            chunk = stream.read(CHUNK)
        except (OSError, *DAMAGE) as error:
            raise FileFailed(f"truncated or damaged, not kept: {str(error)[:200]}") from None
        if not chunk:
            return
        yield chunk


class Readable(Protocol):
    """As much of a stream as is read here."""

    def read(self, size: int, /) -> bytes: ...


def unzipped(stream: Readable) -> Iterator[bytes]:
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
            raise FileFailed(f"truncated or damaged, not kept: {str(error)[:200]}") from None
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


def collected(pieces: Iterable[bytes]) -> bytearray:
    """All the pieces together; FileFailed as soon as they are more than MOST_BYTES."""
    found = bytearray()
    for piece in pieces:
        found += piece
        if len(found) > MOST_BYTES:
            raise FileFailed(f"more than {MOST_BYTES >> 30} GiB unpacked")
    return found


def members(archive: Path, names: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, stream) of each member of a tar or zip archive that is one of `names`, in any order.

    A stream can be read until the next one is asked for. Only regular files count. Raises
    FileFailed if the archive is damaged or is none, and OSError if it cannot be read.
    """
    with open(archive, "rb") as stream:
        zipped = stream.read(len(ZIP)) == ZIP
    try:
        yield from (_in_zip if zipped else _in_tar)(archive, names)
    except DAMAGE as error:
        raise _damaged(error) from None


def _in_zip(archive: Path, names: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as content:
        for info in content.infolist():
            if info.filename in names and not info.is_dir():
                with content.open(info) as stream:
                    yield info.filename, stream


def _in_tar(archive: Path, names: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
    left = set(names)
    with tarfile.open(archive, "r:*") as content:
        for member in content:
            if member.name in left and member.isfile():
                left.discard(member.name)
                yield member.name, cast(IO[bytes], content.extractfile(member))
                if not left:
                    return


def _damaged(error: Exception) -> FileFailed:
    return FileFailed(f"the archive is damaged: {str(error)[:200] or type(error).__name__}")


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, or a zip archive other than an .npz file."""
    try:
        if zipfile.is_zipfile(path):
            return not all(name.endswith(".npy") for name in member_names(path))
        return tarfile.is_tarfile(path)
    except DAMAGE:  # a gzip file that is cut off
        return False


def member_names(archive: Path) -> list[str]:
    """Names of the regular files in a tar or zip archive, in their order.

    Raises FileFailed if it is damaged or no archive.
    """
    with open(archive, "rb") as stream:
        zipped = stream.read(len(ZIP)) == ZIP
    try:
        if zipped:
            with zipfile.ZipFile(archive) as content:
                return [info.filename for info in content.infolist() if not info.is_dir()]
        with tarfile.open(archive, "r:*") as tar:
            return [member.name for member in tar if member.isfile()]
    except DAMAGE as error:
        raise _damaged(error) from None
