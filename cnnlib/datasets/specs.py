"""What `datasets:` of config.yaml may hold: one class for each kind."""

import hashlib
import json
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cnnlib import patterns
from cnnlib.datasets.sources import DataFile, Mirror, Settings, distinct

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
# YAML has no tuples, so that lists are accepted too.
Shape = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)]
Share = Annotated[float, Field(gt=0, lt=1)]

MOST_CLASSES = 256
"""Labels are bytes."""


class ImagesSpec(Settings):
    """Settings that all kinds of data sets have."""

    shape: Shape
    """channels, height, width of an image."""
    classes: Annotated[int, Field(ge=2, strict=True)]
    """Labels are 0 to classes - 1; at most 256."""
    class_names: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """What the classes are called, in the order of the labels; empty: by their numbers."""
    hard_images: list[Annotated[int, Field(ge=0, strict=True)]] = Field(default=[])
    """Indices of test images that are hard to recognise; figures follow them through a training."""
    normalise: Literal["all", "per_channel"] | None = None
    """Whether all channels share one mean and deviation or each has its own; null: each its own."""
    validation: PositiveInt | Share | None = None
    """Training images, or a share of them, that are left out of training and watched instead. They
    are drawn by chance, as many of each class as its share; the test set is not touched."""
    validation_seed: int = Field(default=1, ge=0)
    """Another seed draws others."""

    @field_validator("classes")
    @classmethod
    def _few_classes(cls, classes: int) -> int:
        if classes > MOST_CLASSES:
            raise ValueError(f"labels are bytes, so there are at most {MOST_CLASSES} classes")
        return classes

    @field_validator("hard_images")
    @classmethod
    def _once(cls, indices: list[int]) -> list[int]:
        if len(set(indices)) < len(indices):
            raise ValueError("a hard image is named twice")
        return indices

    @model_validator(mode="after")
    def _named(self) -> "ImagesSpec":
        names = self.class_names
        if names and len(names) != self.classes:
            raise ValueError(f"{len(names)} class_names for {self.classes} classes")
        if len(set(names)) < len(names):
            raise ValueError("a name is twice in class_names")
        count = self.given_count
        if count is not None and self.validation_count(count) >= count:
            raise ValueError(f"validation takes all of the {count} training images")
        return self

    def specification(self) -> str:
        """Everything that decides the images, their labels and their order, as JSON.

        Where the files come from is not part of it, because their checksums say what is in them.
        Settings that earlier versions did not have are left out where they change nothing, so that
        what was made then is still recognised.
        """
        content = self.model_dump(mode="json", exclude=self.ignored())
        for name in self.newer():
            if content.get(name) == type(self).model_fields[name].get_default():
                content.pop(name, None)
        if self.per_channel:
            content["normalise"] = "per_channel"
        return json.dumps(content, sort_keys=True)

    def ignored(self) -> set[str]:
        """Settings that do not decide what the images and their labels are."""
        found = {"mirrors", "hard_images", "normalise", "class_names"}
        return found if self.validation else {*found, "validation_seed"}

    def newer(self) -> tuple[str, ...]:
        """Settings that results of earlier versions do not have."""
        return ("validation",)

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the specification."""
        return hashlib.sha256(self.specification().encode()).hexdigest()

    @property
    def per_channel(self) -> bool:
        """Whether each channel has a mean and a deviation of its own."""
        return self.shape[0] > 1 and self.normalise != "all"

    def validation_count(self, images: int) -> int:
        """How many of so many training images are left out of training."""
        if isinstance(self.validation, float):
            return round(self.validation * images)
        return self.validation or 0

    @property
    @abstractmethod
    def given_count(self) -> int | None:
        """Number of training images before validation images are taken, where settings decide."""

    @property
    def train_count(self) -> int | None:
        """Number of images that are trained on, where the settings decide it."""
        given = self.given_count
        return None if given is None else given - self.validation_count(given)

    @property
    @abstractmethod
    def test_count(self) -> int | None:
        """Number of test images, where the settings decide it."""

    def fetched(self) -> list[DataFile]:
        """The files that have to be fetched before the data set can be prepared."""
        return []


class FileSpec(ImagesSpec):
    """Settings of data sets that come as files."""

    archive: DataFile | None = None
    """A tar or zip archive in which the files lie; it is fetched and kept as it is."""
    mirrors: list[Mirror] = Field(default=[])
    """Places that hold the files, or the archive, tried in turn."""
    first_label: Annotated[int, Field(ge=0, strict=True)] = 0
    """The label of the first class in the files: 1 for the letters of EMNIST."""
    train_limit: PositiveInt | None = None
    """Use only this many training images, the first ones."""
    test_limit: PositiveInt | None = None
    """Use only this many test images, the first ones."""

    @abstractmethod
    def each(self) -> list[DataFile]:
        """Every file of the data set."""

    def newer(self) -> tuple[str, ...]:
        return *super().newer(), "archive", "first_label"

    def fetched(self) -> list[DataFile]:
        return self.each() if self.archive is None else [self.archive]

    @property
    def given_count(self) -> int | None:
        return self.train_limit

    @property
    def test_count(self) -> int | None:
        return self.test_limit

    @model_validator(mode="after")
    def _certain(self) -> "FileSpec":
        if not distinct(self.each()):
            raise ValueError("each of the files needs a name of its own")
        for file in self.fetched():
            if not file.has_checksum:
                what = "the archive" if file is self.archive else file.name
                raise ValueError(
                    f"{what} needs sha256 or md5; `python -m cnnlib checksum` prints it"
                )
            if "/" in file.name:
                raise ValueError(f"{file.name} is a path: only files in an archive have one")
        return self


class IdxFiles(Settings):
    """The four files of an IDX data set."""

    train_images: DataFile
    train_labels: DataFile
    test_images: DataFile
    test_labels: DataFile


class IdxSpec(FileSpec):
    """Images and labels in four IDX files, as MNIST and its relatives come."""

    kind: Literal["idx"]
    """IDX files, as MNIST has them."""
    files: IdxFiles
    """The four files, each with its name and checksum; those whose names end in .gz are gzipped."""
    transpose: bool = False
    """Whether rows and columns are exchanged in the files, as in those of EMNIST."""

    def newer(self) -> tuple[str, ...]:
        return *super().newer(), "transpose"

    def each(self) -> list[DataFile]:
        files = self.files
        return [files.train_images, files.train_labels, files.test_images, files.test_labels]


class ArrayOf(Settings):
    """An array in one of several .npz files."""

    file: str = Field(pattern=patterns.MEMBER)
    """The name of the file, as in `files`."""
    array: str = Field(min_length=1)
    """The name of the array in it."""


class NpzArrays(Settings):
    """Names of the arrays of an .npz data set."""

    train_images: str | ArrayOf = "train_images"
    """The training images."""
    train_labels: str | ArrayOf = "train_labels"
    """Their labels: whole numbers, (N,) or (N, 1)."""
    test_images: str | ArrayOf = "test_images"
    """The test images."""
    test_labels: str | ArrayOf = "test_labels"
    """Their labels."""


class NpzSpec(FileSpec):
    """Images and labels as numpy's arrays in one .npz file, or in several."""

    kind: Literal["npz"]
    """Arrays in .npz files."""
    files: list[DataFile] = Field(min_length=1)
    """The .npz file, or all of them."""
    arrays: NpzArrays = NpzArrays()
    """What the arrays are called."""
    layout: Literal["NHW", "NCHW", "NHWC", "flat"] | None = None
    """The order of an image array's axes: N images, C channels, H rows, W columns; flat: (N, CHW).
    null: the one that its sizes fit."""
    range: tuple[float, float] | None = Field(default=None, strict=False)
    """The lowest and the highest value of a pixel, which become the bytes 0 and 255; null: pixels
    are whole numbers from 0 to 255."""

    @field_validator("range")
    @classmethod
    def _ascending(cls, limits: tuple[float, float] | None) -> tuple[float, float] | None:
        if limits is not None and not limits[0] < limits[1]:
            raise ValueError("range is [lowest, highest] of a pixel")
        return limits

    @model_validator(mode="after")
    def _known_files(self) -> "NpzSpec":
        known = [file.name for file in self.files]
        for role in NpzArrays.model_fields:
            array = getattr(self.arrays, role)
            if isinstance(array, ArrayOf) and array.file not in known:
                raise ValueError(f"arrays.{role}: unknown file {array.file!r}; known: {known}")
        return self

    def each(self) -> list[DataFile]:
        return self.files


class CifarFiles(Settings):
    """The files of a data set in the binary format of CIFAR."""

    train: list[DataFile] = Field(min_length=1)
    """Files with training images, one behind the other."""
    test: list[DataFile] = Field(min_length=1)
    """Files with test images."""


class CifarSpec(FileSpec):
    """Records of a label and an image, as the binary version of CIFAR-10 comes."""

    kind: Literal["cifar"]
    """Records of a label and the image's bytes."""
    files: CifarFiles
    """The files with records."""
    label_bytes: PositiveInt = 1
    """Bytes of labels before each image, of which the last one counts: 2 for CIFAR-100."""

    def each(self) -> list[DataFile]:
        return [*self.files.train, *self.files.test]


class FolderSpec(ImagesSpec):
    """Pictures in folders train/CLASS and test/CLASS."""

    kind: Literal["folder"]
    """A folder of labelled pictures."""
    path: str = Field(min_length=1)
    """The folder, in which `train` and `test` lie."""
    train: str = Field(default="train", pattern=patterns.FILE)
    """The folder within it that holds a folder of training pictures for each class."""
    test: str = Field(default="test", pattern=patterns.FILE)
    """The same for the test pictures."""
    resize: Literal["stretch", "crop"] | None = None
    """What happens to pictures of other sizes: stretch changes their aspect, crop takes the middle;
    null: they are refused."""
    sha256: str | None = Field(default=None, pattern=patterns.SHA256)
    """Checksum of all pictures with their names, as `python -m cnnlib checksum` prints it; null:
    whatever lies there is taken."""

    @field_validator("shape")
    @classmethod
    def _picture(cls, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        if shape[0] not in (1, 3):
            raise ValueError("pictures have 1 channel (grey) or 3 (colour)")
        return shape

    @model_validator(mode="after")
    def _two_folders(self) -> "FolderSpec":
        if self.train == self.test:
            raise ValueError("train and test are the same folder")
        return self

    def ignored(self) -> set[str]:
        # Names decide which label a class has. The checksum says what lies there, wherever it is.
        return (super().ignored() - {"class_names"}) | ({"path"} if self.sha256 else set())

    @property
    def given_count(self) -> int | None:
        return None

    @property
    def test_count(self) -> int | None:
        return None


class SyntheticSpec(ImagesSpec):
    """Made-up images of classes that can be distinguished; see cnnlib.datasets.synthetic."""

    kind: Literal["synthetic"]
    """Images that are made up."""
    train_images: PositiveInt
    """How many images there are to train on."""
    test_images: PositiveInt
    """How many images there are to test with."""
    seed: int = Field(default=1, ge=0)
    """Other seeds give other images."""

    @property
    def given_count(self) -> int:
        return self.train_images

    @property
    def test_count(self) -> int:
        """Number of test images."""
        return self.test_images


AnySpec = IdxSpec | NpzSpec | CifarSpec | FolderSpec | SyntheticSpec
SPECS: dict[str, type[ImagesSpec]] = {
    "idx": IdxSpec,
    "npz": NpzSpec,
    "cifar": CifarSpec,
    "folder": FolderSpec,
    "synthetic": SyntheticSpec,
}
"""Kind -> its settings."""
DatasetSpec = Annotated[AnySpec, Field(discriminator="kind")]
