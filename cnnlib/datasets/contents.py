"""The bytes of a data set's files, wherever they lie, with their checksums compared."""

from pathlib import Path

from cnnlib.datasets.base import FileSpec
from cnnlib.datasets.http import FileFailed
from cnnlib.datasets.packed import MOST_BYTES, chunks, chunks_of, collected, members, unzipped
from cnnlib.datasets.sources import DataFile
from cnnlib.errors import DataError


class Contents:
    """The files of a data set in a folder, or in an archive that lies there.

    `read` gives the bytes of one; a file whose name ends in .gz is unzipped. Its checksums are
    compared by `check`, so that a reader can say first what is wrong with a damaged file.
    """

    def __init__(self, name: str, spec: FileSpec, folder: Path) -> None:
        """Read the members of an archive; DataError if it is missing, damaged or another one."""
        self._name, self._spec, self._folder = name, spec, folder
        self._wrong: dict[str, str] = {}
        """File -> what its checksum is instead of the right one."""
        self._members: dict[str, bytearray] = {}
        if spec.archive is not None:
            self._read_archive(spec.archive)

    @property
    def how_to_fetch(self) -> str:
        where = f"--dataset {self._name} --folder {self._folder}"
        return f"`python -m cnnlib download {where}` fetches it"

    def where(self, file: DataFile) -> str:
        """The file's path for people; with that of its archive."""
        if self._spec.archive is not None:
            return f"{self._folder / self._spec.archive.name}: {file.name}"
        return str(self._folder / file.name)

    def read(self, file: DataFile) -> bytearray:
        """The unpacked bytes of a file; DataError if it is missing, damaged or too large."""
        if self._spec.archive is not None:
            return self._members[file.name]
        path = self._folder / file.name
        try:
            if path.stat().st_size > MOST_BYTES:
                raise DataError(f"{path} is too long: more than {MOST_BYTES >> 30} GiB")
            data = collected(chunks_of(path, unzip=False))
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}; {self.how_to_fetch}"
            ) from None
        except FileFailed as failure:
            raise DataError(f"cannot read {path}: {failure}") from None
        return self._unpacked(file, data)

    def check(self, file: DataFile) -> None:
        """Raise DataError if the file that was read has another checksum than the config says."""
        if found := self._wrong.get(file.name):
            raise DataError(
                f"{self.where(file)} has {found}, expected {file.expected}; {self.how_to_fetch}"
            )

    def _unpacked(self, file: DataFile, data: bytearray) -> bytearray:
        """The data of a file, unzipped if it is packed; notes a wrong checksum."""
        found = file.hashes()
        found.update(data)
        if not found.right:
            self._wrong[file.name] = str(found)
        if not file.name.endswith(".gz"):
            return data
        try:
            return collected(unzipped(_Stream(data)))
        except FileFailed as failure:
            # A file with the right checksum is damaged at its source.
            self.check(file)
            raise DataError(f"{self.where(file)} is no gzip file: {failure}") from None

    def _read_archive(self, archive: DataFile) -> None:
        path = self._folder / archive.name
        wanted = {file.name: file for file in self._spec.each()}
        try:
            found = archive.hashes()
            for chunk in chunks_of(path, unzip=False):
                found.update(chunk)
            if not found.right:
                raise DataError(
                    f"{path} has {found}, expected {archive.expected}; {self.how_to_fetch}"
                )
            for name, stream in members(path, wanted.keys()):
                data = collected(chunks(stream))
                self._members[name] = self._unpacked(wanted[name], data)
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}; {self.how_to_fetch}"
            ) from None
        except FileFailed as failure:
            raise DataError(f"{path}: {failure}") from None
        if lacking := [name for name in wanted if name not in self._members]:
            raise DataError(
                f"{path} lacks {lacking[0]}, which datasets.{self._name}.files names; "
                f"`python -m cnnlib checksum {path}` lists what it holds"
            )


class _Stream:
    """Just as much of a stream as `unzipped` needs, without a copy of the data."""

    def __init__(self, data: bytearray) -> None:
        self._data, self._at = memoryview(data), 0

    def read(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        return bytes(piece)
