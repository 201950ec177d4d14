"""The entry that is printed for files is the entry by which they are read."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnlib.datasets import Dataset, download, load, prepare
from cnnlib.datasets.describe import describe
from cnnlib.errors import DataError, UserError
from tests.support import formats
from tests.support.formats import SPEC, colours, packed
from tests.support.mirrors import NAMES, arrays, write_files

pytestmark = pytest.mark.quick

WIDE = (3, 32, 32)


def read(entry: dict[str, Any], folder: Path) -> Dataset:
    spec = SPEC.validate_python(entry)
    download("mine", spec, folder / "raw", lambda _: None)
    prepare("mine", spec, folder / "raw", folder / "mine.npz")
    return load("mine", folder / "mine.npz", spec)


Make = Callable[[Path], dict[str, Any]]
MADE: dict[str, tuple[Make, str]] = {
    "pictures": (formats.pictures, ""),
    "npz": (formats.npz, "mine.npz"),
    "emnist": (formats.emnist, "gzip.zip"),
    "cifar": (lambda folder: formats.cifar(folder, shape=WIDE), "cifar.tar.gz"),
    "cifar_100": (lambda folder: formats.cifar(folder, "c.zip", 2, WIDE), "c.zip"),
}


@pytest.mark.parametrize("case", MADE)
def test_an_entry_reads_the_same_images(tmp_path: Path, case: str) -> None:
    make, file = MADE[case]
    settings = make(tmp_path / "here")
    entry = describe([tmp_path / "here" / file])
    found, wanted = read(entry, tmp_path / "a"), read(settings, tmp_path / "b")
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(found, part), getattr(wanted, part))


@pytest.mark.parametrize("zipped", [False, True])
def test_four_idx_files(tmp_path: Path, zipped: bool) -> None:
    here = write_files(tmp_path / "here")
    paths = [here / name for name in reversed(NAMES)]
    if zipped:
        for path in paths:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        paths = [path.with_name(f"{path.name}.gz") for path in paths]
    data = read(describe(paths), tmp_path)
    np.testing.assert_array_equal(data.train_images[:, 0], arrays()[0])
    np.testing.assert_array_equal(data.test_labels, arrays()[3])


def test_floats_and_labels_from_three(tmp_path: Path) -> None:
    changes = {
        "x_train": (colours()["train_images"] / 255).astype(np.float32),
        "x_test": (colours()["test_images"] / 255).astype(np.float32),
        "y_train": colours()["train_labels"] + 3,
        "y_test": colours()["test_labels"] + 3,
    }
    formats.npz(tmp_path / "here", **changes)
    entry = describe([tmp_path / "here/mine.npz"])
    assert (entry["range"], entry["first_label"], entry["classes"]) == ([0, 1], 3, 3)
    data = read(entry, tmp_path)
    np.testing.assert_array_equal(data.train_images, colours()["train_images"])
    np.testing.assert_array_equal(data.train_labels, colours()["train_labels"])


def saved(**content: np.ndarray) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        np.savez(folder / "a.npz", **content)
        return [folder / "a.npz"]

    return make


def written(**content: bytes) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        for name, data in content.items():
            (folder / name).write_bytes(data)
        return [folder / name for name in content]

    return make


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (written(letter=b"hello"), r"letter is no IDX file, no \.npz and no \.bin"),
        (written(), "no file is given"),
        (written(letter=b""), "letter is empty"),
        (lambda folder: [folder / "none"], "cannot read .*none: No such file"),
        (
            lambda folder: [write_files(folder) / NAMES[0]],
            "looks like train_labels: a set has four",
        ),
        (
            lambda folder: [write_files(folder) / n for n in (*NAMES, NAMES[0])][::2],
            "looks like train_labels",
        ),
        (saved(a=np.zeros((3, 4, 5))), r"no array looks like train_labels; found: a \(3, 4, 5\)"),
        (
            saved(x=np.zeros((3, 4)), y=np.zeros(3, int), x_test=np.zeros(3), y_test=np.zeros(3)),
            "no array looks like test_images",
        ),
        (lambda folder: [folder], "train: No such file"),
        (
            lambda folder: [packed({"a.txt": b"x"}, folder / "a.zip")],
            r"a\.zip holds no IDX, \.bin or \.npz file; --only TEXT .* among: a\.txt",
        ),
        (
            lambda folder: [packed({f"{i}-idx1-ubyte": b"x" for i in range(5)}, folder / "a.zip")],
            r"holds 5 IDX files, not four; --only TEXT",
        ),
        (
            lambda folder: [packed({"a.bin": b"x"}, folder / "a.tar.gz")],
            r"a\.bin: their sizes are no whole number of records",
        ),
    ],
)
def test_what_cannot_be_guessed(
    tmp_path: Path, make: Callable[[Path], list[Path]], problem: str
) -> None:
    with pytest.raises((UserError, DataError), match=problem):
        describe(make(tmp_path))
