"""prepare and load: four IDX files, or none, to one checked file and back."""

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cnnlib.datasets import Dataset, SyntheticSpec, load, prepare
from cnnlib.errors import DataError, UserError
from cnnlib.levels import for_maps
from tests.support.mirrors import arrays, spec_of, write_files

pytestmark = pytest.mark.quick


def made(**changes: Any) -> SyntheticSpec:
    settings = {
        "kind": "synthetic",
        "shape": [1, 28, 28],
        "classes": 10,
        "train_images": 400,
        "test_images": 200,
        "seed": 3,
    }
    return SyntheticSpec.model_validate(settings | changes)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_files(tmp_path / "raw")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "digits.npz"


def test_what_is_prepared_is_loaded(raw: Path, target: Path) -> None:
    spec = spec_of(raw, [])
    prepare("digits", spec, raw, target)
    data = load("digits", target, spec)
    train_images, train_labels, test_images, test_labels = arrays()
    assert (data.name, data.classes) == ("digits", 4)
    np.testing.assert_array_equal(data.train_images, train_images[:, None])
    np.testing.assert_array_equal(data.train_labels, train_labels)
    np.testing.assert_array_equal(data.test_images, test_images[:, None])
    np.testing.assert_array_equal(data.test_labels, test_labels)
    assert {a.dtype for a in (data.train_images, data.test_labels)} == {np.dtype(np.uint8)}
    assert data.mean == pytest.approx(train_images.mean(), rel=1e-14)
    assert data.deviation == pytest.approx(train_images.std(), rel=1e-12)


def test_mean_and_deviation_normalise_the_training_images(raw: Path, target: Path) -> None:
    spec = spec_of(raw, [])
    prepare("digits", spec, raw, target)
    data = load("digits", target, spec)
    pixels = normalised(data, data.train_images)
    assert abs(pixels.mean()) < 1e-6
    assert abs(pixels.std() - 1) < 1e-6


def test_limits_take_the_first_images(raw: Path, target: Path) -> None:
    spec = spec_of(raw, [], train_limit=7, test_limit=3)
    assert (spec.train_count, spec.test_count) == (7, 3)
    prepare("digits", spec, raw, target)
    data = load("digits", target, spec)
    np.testing.assert_array_equal(data.train_images[:, 0], arrays()[0][:7])
    np.testing.assert_array_equal(data.test_labels, arrays()[3][:3])
    assert data.mean == pytest.approx(arrays()[0][:7].mean())
    with pytest.raises(DataError, match="it has 7 train images, the config says 8; prepare it"):
        load("digits", target, spec_of(raw, [], train_limit=8, test_limit=3))


def test_the_same_bytes_every_time(raw: Path, tmp_path: Path) -> None:
    spec = spec_of(raw, [])
    for name in ("one.npz", "two.npz"):
        prepare("digits", spec, raw, tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_colour_images(tmp_path: Path, target: Path) -> None:
    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (n, 3, 5, 4), np.uint8) for n in (6, 4)]
    labels = [np.arange(n, dtype=np.uint8) % 2 for n in (6, 4)]
    raw = write_files(tmp_path / "raw", [images[0], labels[0], images[1], labels[1]])
    spec = spec_of(raw, [], shape=[3, 5, 4], classes=2)
    prepare("colours", spec, raw, target)
    np.testing.assert_array_equal(load("colours", target, spec).train_images, images[0])


Changed = Callable[[list[np.ndarray]], dict[str, Any] | None]


def change(index: int, how: Callable[[np.ndarray], np.ndarray]) -> Changed:
    def apply(content: list[np.ndarray]) -> None:
        content[index] = how(content[index])

    return apply


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            change(0, lambda a: a[:, 1:]),
            r"train-images holds images of \(1, 5, 6\), expected \(1, 6, 6\)",
        ),
        (change(2, lambda a: a[:, None].repeat(3, 1)), r"test-images holds images of \(3, 6, 6\)"),
        (change(0, lambda a: a[0, 0]), r"train-images holds images of \(\), expected"),
        (change(1, lambda a: a[:, None]), "train-labels has 2 dimensions, labels have 1"),
        (change(1, lambda a: a[1:]), "train-images holds 20 images, but .*train-labels 19 labels"),
        (change(3, lambda a: a + 1), "test-labels: label 4 of image 3 is not below 4"),
        (change(0, lambda a: a * 0 + 9), "cannot be learnt: all its training pixels are 9"),
        (lambda c: c.__setitem__(slice(2, 4), [c[2][:0], c[3][:0]]), "test-images holds no images"),
        (lambda c: {"train_limit": 21}, "train_limit is 21, but .*train-images holds 20 images"),
        (lambda c: {"test_limit": 11}, "test_limit is 11, but .*test-images holds 10 images"),
    ],
)
def test_data_that_do_not_fit(tmp_path: Path, target: Path, changed: Changed, message: str) -> None:
    content = arrays()
    settings = changed(content) or {}
    raw = write_files(tmp_path / "raw", content)
    with pytest.raises(DataError, match=message):
        prepare("digits", spec_of(raw, [], **settings), raw, target)
    assert not target.parent.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is truncated: 0 bytes"),
        (b"\0\0\x08\x03" + bytes(20), "too long: expected 16 bytes"),
    ],
)
def test_raw_files_that_are_broken(
    raw: Path, target: Path, content: bytes | None, message: str
) -> None:
    spec = spec_of(raw, [])
    (raw / "test-images").unlink()
    if content is not None:
        (raw / "test-images").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare("digits", spec, raw, target)
    assert str(raw / "test-images") in str(error.value)


def test_raw_files_of_another_data_set(raw: Path, target: Path) -> None:
    spec = spec_of(raw, [])
    content = arrays()
    content[0][3, 2, 1] ^= 1
    write_files(raw, content)
    with pytest.raises(DataError, match=r"train-images has SHA-256 \w+, expected"):
        prepare("digits", spec, raw, target)


def test_unwritable_target(raw: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*train-images/digits.npz"):
        prepare("digits", spec_of(raw, []), raw, raw / "train-images" / "digits.npz")


def test_damaged_files_are_named(raw: Path, target: Path) -> None:
    spec = spec_of(raw, [])
    prepare("digits", spec, raw, target)
    whole = target.read_bytes()
    at = whole.index(arrays()[0].tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for content in (None, b"", b"PK\x03\x04", whole[:100], whole[:-1], whole[30:], flipped):
        target.unlink()
        if content is not None:
            target.write_bytes(content)
        with pytest.raises(DataError) as error:
            load("digits", target, spec)
        assert str(target) in str(error.value)
        assert "'digits'" in str(error.value)
        target.touch()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "lacks train_images"),
        ({"train_images": np.zeros((20, 1, 6, 6))}, "train_images is float64"),
        ({"train_images": np.zeros((20, 6, 6), np.uint8)}, "is uint8 of 3 dimensions, expected"),
        ({"train_images": np.array([{}], dtype=object)}, "digits.npz"),
        ({"test_images": np.zeros((10, 1, 6, 5), np.uint8)}, r"its test images are \(1, 6, 5\)"),
        ({"test_labels": np.zeros(9, np.uint8)}, "it has 10 test images and 9 labels"),
        ({"test_labels": np.full(10, 4, np.uint8)}, "a test label is 4"),
        ({"classes": np.int64(5)}, "it has 5 classes, the config says 4"),
        ({"mean": np.float64("nan")}, "mean or deviation"),
        ({"deviation": np.float64(0)}, "mean or deviation"),
        (
            {
                "train_images": np.zeros((0, 1, 6, 6), np.uint8),
                "train_labels": np.zeros(0, np.uint8),
            },
            "no train images",
        ),
    ],
)
def test_files_of_something_else(
    raw: Path, target: Path, changes: dict[str, Any], message: str
) -> None:
    spec = spec_of(raw, [])
    prepare("digits", spec, raw, target)
    with np.load(target) as saved:
        content = dict(saved) | changes
    np.savez(target, **{key: value for key, value in content.items() if value is not None})
    with pytest.raises(DataError, match=message) as error:
        load("digits", target, spec)
    assert str(target) in str(error.value)


# made-up images -----------------------------------------------------------------------------


def make(spec: SyntheticSpec, folder: Path) -> Dataset:
    prepare("made", spec, folder / "not looked at", folder / "made.npz")
    assert os.listdir(folder) == ["made.npz"]
    return load("made", folder / "made.npz", spec)


def normalised(data: Dataset, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    return (images - for_maps(data.mean, float)) / for_maps(data.deviation, float)


def nearest_mean_accuracy(data: Dataset) -> float:
    train = normalised(data, data.train_images).reshape(len(data.train_labels), -1)
    test = normalised(data, data.test_images).reshape(len(data.test_labels), -1)
    means = np.stack([train[data.train_labels == k].mean(0) for k in range(data.classes)])
    distances = ((test[:, None] - means) ** 2).sum(2)
    return float((distances.argmin(1) == data.test_labels).mean())


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 10, 10), (3, 12, 9), (1, 8, 8)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_made_up_images_can_be_learnt(tmp_path: Path, shape: tuple[int, ...], seed: int) -> None:
    data = make(made(shape=list(shape), seed=seed), tmp_path)
    assert data.train_images.shape == (400, *shape)
    assert data.test_images.shape == (200, *shape)
    assert np.bincount(data.train_labels).tolist() == [40] * 10
    assert nearest_mean_accuracy(data) > 0.8
    # but not by heart, nor because all images of a class are the same
    assert len(np.unique(data.train_images.reshape(400, -1), axis=0)) == 400


def test_made_up_images_are_the_same_on_every_machine(tmp_path: Path) -> None:
    data = make(made(train_images=30, test_images=10), tmp_path)
    digest = hashlib.sha256()
    for array in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "7eff3502defc8685"


def test_another_seed_makes_other_images(tmp_path: Path) -> None:
    images = []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        images.append(make(made(seed=seed), folder).train_images)
    assert (images[0] != images[1]).mean() > 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [1, 1, 1], "classes": 2},
        {"shape": [2, 3, 40], "classes": 3, "train_images": 1, "test_images": 1},
        {"classes": 256, "train_images": 300},
    ],
)
def test_made_up_images_of_odd_sizes(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = made(**changes)
    data = make(spec, tmp_path)
    assert data.train_images.shape == (spec.train_images, *spec.shape)
