"""What `datasets:` of config.yaml may hold: one class for each kind."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cnnlib import patterns
from cnnlib.datasets.base import FileSpec, ImagesSpec, PositiveInt
from cnnlib.datasets.sources import DataFile, Settings


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
    """Bytes of labels before each image; the last one counts. CIFAR-100 has 2."""

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
