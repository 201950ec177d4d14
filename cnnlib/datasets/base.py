"""What the settings of all kinds of data sets have in common."""

import hashlib
import json
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

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
