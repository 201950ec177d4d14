"""Every kind of data set, from its files to arrays; each damage named with file and place."""

import hashlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnnlib.datasets import Dataset, download, load, prepare, problem
from cnnlib.datasets.folder import checksum, fingerprint
from cnnlib.datasets.split import held_out
from cnnlib.errors import DataError
from cnnlib.levels import for_maps
from tests.support import formats
from tests.support.formats import CLASS_NAMES, SPEC, colours, packed, sha
from tests.support.mirrors import arrays

pytestmark = pytest.mark.quick

Settings = dict[str, Any]
KINDS: dict[str, Callable[[Path], Settings]] = {
    "npz": formats.npz,
    "cifar": formats.cifar,
    "folder": formats.pictures,
}


def made(settings: Settings, folder: Path) -> Dataset:
    """The data set, fetched, prepared and loaded in `folder`."""
    spec = SPEC.validate_python(settings)
    download("mine", spec, folder / "raw", lambda _: None)
    prepare("mine", spec, folder / "raw", folder / "mine.npz")
    return load("mine", folder / "mine.npz", spec)


def refused(settings: Settings, folder: Path) -> str:
    """The one line that refuses the data set; nothing is written then."""
    spec = SPEC.validate_python(settings)
    download("mine", spec, folder / "raw", lambda _: None)
    with pytest.raises(DataError) as error:
        prepare("mine", spec, folder / "raw", folder / "out" / "mine.npz")
    assert not (folder / "out").exists()
    said = str(error.value)
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_put_in(tmp_path: Path, kind: str) -> None:
    data = made(KINDS[kind](tmp_path / "source"), tmp_path)
    for role, array in colours().items():
        np.testing.assert_array_equal(getattr(data, role), array)
    pixels = (data.train_images - for_maps(data.mean, float)) / for_maps(data.deviation, float)
    assert np.shape(data.mean) == (3,)
    assert np.abs(pixels.mean(axis=(0, 2, 3))).max() < 1e-12
    assert np.abs(pixels.std(axis=(0, 2, 3)) - 1).max() < 1e-12
    assert data.class_names == (CLASS_NAMES if kind == "folder" else ())


def test_one_mean_of_all_channels(tmp_path: Path) -> None:
    settings = formats.npz(tmp_path / "source")
    data = made(settings | {"normalise": "all"}, tmp_path)
    assert data.mean == pytest.approx(data.train_images.mean())
    assert data.deviation == pytest.approx(data.train_images.std())
    with pytest.raises(DataError, match="mean or deviation is no number of each channel"):
        load("mine", tmp_path / "mine.npz", SPEC.validate_python(settings))


def test_emnist_is_turned_and_counted_from_zero(tmp_path: Path) -> None:
    data = made(formats.emnist(tmp_path / "source"), tmp_path)
    train_images, train_labels, test_images, test_labels = arrays(side=6)
    np.testing.assert_array_equal(data.train_images[:, 0], train_images)
    np.testing.assert_array_equal(data.train_labels, train_labels)
    np.testing.assert_array_equal(data.test_images[:, 0], test_images)
    np.testing.assert_array_equal(data.test_labels, test_labels)
    assert os.listdir(tmp_path / "raw") == ["gzip.zip"]  # nothing is unpacked there


@pytest.mark.parametrize("name", ["cifar.tar.gz", "cifar.zip"])
def test_the_last_label_of_cifar_100_counts(tmp_path: Path, name: str) -> None:
    data = made(formats.cifar(tmp_path / "source", name, label_bytes=2), tmp_path)
    np.testing.assert_array_equal(data.train_labels, colours()["train_labels"])


def test_md5_where_no_sha256_is_published(tmp_path: Path) -> None:
    settings = formats.cifar(tmp_path / "source")
    content = (tmp_path / "source/cifar.tar.gz").read_bytes()
    settings["archive"] = {"name": "cifar.tar.gz", "md5": hashlib.md5(content).hexdigest()}
    assert len(made(settings, tmp_path).train_labels) == 18
    settings["archive"]["md5"] = 32 * "0"
    with pytest.raises(DataError, match=r"\d+ bytes with MD5 \w+, expected MD5 0"):
        download("mine", SPEC.validate_python(settings), tmp_path / "other", lambda _: None)


# archives ---------------------------------------------------------------------------------------


def of_archive(tmp_path: Path, files: dict[str, bytes], name: str = "a.tar.gz") -> Settings:
    """Settings of a CIFAR data set of one batch in an archive of these files."""
    path = packed(files, tmp_path / "source" / name)
    return formats.settings(
        "cifar",
        archive={"name": name, "sha256": sha(path)},
        files={"train": ["b/train.bin"], "test": ["b/test.bin"]},
        mirrors=[{"folder": str(tmp_path / "source")}],
    )


def batch() -> bytes:
    return formats.cifar_bytes(colours()["train_images"], colours()["train_labels"])


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
def test_members_that_an_archive_lacks(tmp_path: Path, name: str) -> None:
    settings = of_archive(tmp_path, {"b/train.bin": batch(), "test.bin": batch()}, name)
    said = refused(settings, tmp_path)
    assert f"{tmp_path}/raw/{name} lacks b/test.bin, which datasets.mine.files names" in said


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
@pytest.mark.parametrize("keep", [0, 10, 100])
def test_archives_that_are_damaged_at_their_source(tmp_path: Path, name: str, keep: int) -> None:
    settings = of_archive(tmp_path, {"b/train.bin": batch(), "b/test.bin": batch()}, name)
    path = tmp_path / "source" / name
    path.write_bytes(path.read_bytes()[:keep])
    settings["archive"]["sha256"] = sha(path)
    said = refused(settings, tmp_path)
    assert f"{tmp_path}/raw/{name}" in said
    assert "damaged" in said


def test_a_member_that_is_a_link_is_none(tmp_path: Path) -> None:
    path = tmp_path / "source" / "a.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name in ("b/train.bin", "b/test.bin"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    settings = of_archive(tmp_path / "unused", {})
    settings |= {
        "archive": {"name": "a.tar.gz", "sha256": sha(path)},
        "mirrors": [{"folder": str(path.parent)}],
    }
    assert "lacks b/train.bin" in refused(settings, tmp_path)


def test_a_member_with_a_checksum_of_its_own(tmp_path: Path) -> None:
    settings = of_archive(tmp_path, {"b/train.bin": batch(), "b/test.bin": batch()})
    settings["files"]["train"] = [{"name": "b/train.bin", "sha256": 64 * "0"}]
    said = refused(settings, tmp_path)
    assert "raw/a.tar.gz: b/train.bin has SHA-256 " in said
    assert f"expected SHA-256 {64 * '0'}" in said


def test_an_archive_that_was_changed_after_its_download(tmp_path: Path) -> None:
    settings = formats.cifar(tmp_path / "source")
    spec = SPEC.validate_python(settings)
    download("mine", spec, tmp_path / "raw", lambda _: None)
    path = tmp_path / "raw/cifar.tar.gz"
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(DataError, match=r"cifar\.tar\.gz has SHA-256 .*; `python -m cnnlib downl"):
        prepare("mine", spec, tmp_path / "raw", tmp_path / "mine.npz")


# CIFAR ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "b/train.bin is truncated or another format: its 0 bytes"),
        (batch()[:-1], "its 1097 bytes are no whole number of records of 61 (1 for labels"),
        (b"\3" + batch()[1:], "b/train.bin: label 3 of image 0 is not below 3"),
    ],
)
def test_damaged_batches(tmp_path: Path, content: bytes, problem: str) -> None:
    settings = of_archive(tmp_path, {"b/train.bin": content, "b/test.bin": batch()})
    assert problem in refused(settings, tmp_path)


# .npz -------------------------------------------------------------------------------------------

GREY = colours()["train_images"][:, 0]


@pytest.mark.parametrize(
    ("array", "more"),
    [
        (GREY, {}),
        (GREY[:, None], {}),
        (GREY[..., None], {}),
        (GREY.reshape(18, -1), {}),
        (GREY, {"layout": "NHW"}),
        (GREY.astype(np.int64), {}),
        (GREY / 255, {"range": [0, 1]}),
        ((GREY / 255).astype(np.float32), {"range": [0, 1]}),
        (GREY.astype(np.float32) - 128, {"range": [-128, 127]}),
        (GREY.astype(np.int16) - 128, {"range": [-128, 127]}),
    ],
)
def test_layouts_and_ranges(tmp_path: Path, array: np.ndarray, more: Settings) -> None:
    settings = formats.npz(tmp_path / "source", x_train=array, x_test=array[:9])
    data = made(settings | {"shape": [1, 5, 4]} | more, tmp_path)
    np.testing.assert_array_equal(data.train_images[:, 0], GREY)


def test_one_file_for_each_array(tmp_path: Path) -> None:
    files, wanted = [], {}
    for role, array in colours().items():
        np.savez(tmp_path / f"{role}.npz", array)
        files.append({"name": f"{role}.npz", "sha256": sha(tmp_path / f"{role}.npz")})
        wanted[role] = {"file": f"{role}.npz", "array": "arr_0"}
    mirrors = [{"folder": str(tmp_path)}]
    settings = formats.settings("npz", files=files, arrays=wanted, mirrors=mirrors)
    np.testing.assert_array_equal(made(settings, tmp_path).test_images, colours()["test_images"])


def test_a_layout_that_could_be_two(tmp_path: Path) -> None:
    images = np.arange(9 * 27, dtype=np.uint8).reshape(9, 3, 3, 3)
    labels = np.arange(9) % 3
    source = tmp_path / "source"
    both = dict(x_train=images, x_test=images, y_train=labels, y_test=labels)
    settings = formats.npz(source, **both) | {"shape": [3, 3, 3]}
    said = refused(settings, tmp_path)
    assert "array 'x_train' has sizes (9, 3, 3, 3), which fit NCHW and NHWC: say which" in said
    data = made(settings | {"layout": "NHWC"}, tmp_path)
    np.testing.assert_array_equal(data.train_images, images.transpose(0, 3, 1, 2))


FLOATS = colours()["train_images"] / 255


@pytest.mark.parametrize(
    ("changes", "more", "problem"),
    [
        ({"x_train": FLOATS}, {}, "pixels of type float64, not bytes; give `range: [lowest"),
        ({"x_train": FLOATS > 0.5}, {}, "pixels of type bool, not bytes; give `range"),
        ({"x_train": FLOATS.astype(complex)}, {}, "pixels of type complex128, not bytes"),
        ({"x_train": FLOATS * 2}, {"range": [0, 1]}, "outside of `range`"),
        ({"x_train": FLOATS * np.nan}, {"range": [0, 1]}, "a pixel of image 0 is nan, outside"),
        ({"x_train": np.full((18, 3, 5, 4), 256)}, {}, "a pixel of image 0 is 256, no byte"),
        ({"x_train": np.full((18, 3, 5, 4), -1)}, {}, "a pixel of image 0 is -1, no byte"),
        ({"x_train": FLOATS[:, :, 1:]}, {"range": [0, 1]}, "has sizes (18, 3, 4, 4): not those of"),
        ({}, {"layout": "NCHW"}, "not those of images of (3, 5, 4) in layout NCHW, such as (N, 3,"),
        ({}, {"layout": "NHW"}, "in layout NHW, such as (N, H, W)"),
        ({"x_train": np.uint8(3)}, {}, "array 'x_train' has sizes (): not those"),
        ({"y_train": None}, {}, "mine.npz: no array 'y_train', which datasets.mine.arrays.train_l"),
        ({"y_train": np.zeros(18)}, {}, "array 'y_train' holds float64: labels are whole numbers"),
        ({"y_train": np.zeros((18, 3), int)}, {}, "has sizes (18, 3): labels have (N,) or (N, 1)"),
        ({"y_train": np.zeros(17, int)}, {}, "holds 18 images, but "),
        ({"y_train": np.full(18, -1)}, {}, "label -1 of image 0 is below 0, the first label"),
        ({"y_train": np.full(18, 3)}, {}, "label 3 of image 0 is not below 3, the number of"),
        ({"y_train": np.arange(18) % 3 + 1}, {"first_label": 2}, "is below 2, the first label"),
        ({"y_train": np.array([{}] * 18)}, {}, "Object arrays cannot be loaded"),
        ({}, {"train_limit": 19}, "datasets.mine.train_limit is 19, but "),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, changes: Settings, more: Settings, problem: str
) -> None:
    said = refused(formats.npz(tmp_path / "source", **changes) | more, tmp_path)
    assert problem in said
    assert "mine.npz" in said


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"hello", b"\x93NUMPY"])
def test_files_that_are_no_npz(tmp_path: Path, content: bytes) -> None:
    settings = formats.npz(tmp_path / "source")
    path = tmp_path / "source/mine.npz"
    path.write_bytes(content)
    settings["files"][0]["sha256"] = sha(path)
    assert f"{tmp_path}/raw/mine.npz" in refused(settings, tmp_path)


# pictures ---------------------------------------------------------------------------------------


def save(path: Path, width: int, height: int, colour: tuple[int, ...] = (9, 200, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_other_sizes_are_made_to_fit(tmp_path: Path, resize: str) -> None:
    settings = formats.pictures(tmp_path)
    wide = Image.new("RGB", (12, 5), (200, 0, 0))
    wide.paste((0, 0, 200), (4, 0, 8, 5))
    wide.save(tmp_path / "train/bird/000.png")
    data = made(settings | {"resize": resize}, tmp_path)
    blue = data.train_images[0, 2]
    # The middle third is blue: all that is left by a crop, and a stripe of a stretched picture.
    if resize == "crop":
        assert (blue == 200).all()
    else:
        assert (blue[:, 1:3] > 100).all()
        assert (blue[:, [0, 3]] < 50).all()


def test_grey_pictures_of_colours_and_colours_of_grey_ones(tmp_path: Path) -> None:
    settings = formats.pictures(tmp_path)
    data = made(settings | {"shape": [1, 5, 4]}, tmp_path)
    red, green, blue = colours()["train_images"][4].astype(float)
    # The weights of ITU-R 601-2, by which Pillow makes grey of colours.
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    place = [i for i, label in enumerate(data.train_labels) if label == 1][1]
    assert np.abs(data.train_images[place, 0] - expected).max() <= 1
    for path in tmp_path.glob("*/*/*.png"):
        Image.open(path).convert("L").save(path)
    grey = made(settings, tmp_path).train_images
    np.testing.assert_array_equal(grey[:, 0], grey[:, 2])


def test_jpeg_files_and_others_that_lie_beside_pictures(tmp_path: Path) -> None:
    settings = formats.pictures(tmp_path, suffix="jpg")
    (tmp_path / "train/bird/.DS_Store").write_bytes(b"x")
    (tmp_path / "train/cat/Thumbs.db").write_bytes(b"x")
    (tmp_path / "train/.hidden").mkdir()
    data = made(settings, tmp_path)
    assert np.bincount(data.train_labels).tolist() == [6, 6, 6]


def test_class_names_give_the_order(tmp_path: Path) -> None:
    settings = formats.pictures(tmp_path) | {"class_names": ["dog", "cat", "bird"]}
    data = made(settings, tmp_path)
    assert data.class_names == ("dog", "cat", "bird")
    brightest = data.train_images.mean(axis=(2, 3)).argmax(axis=1)
    np.testing.assert_array_equal(brightest, 2 - data.train_labels.astype(int))


def test_other_folders(tmp_path: Path) -> None:
    settings = formats.pictures(tmp_path)
    (tmp_path / "train").rename(tmp_path / "training")
    (tmp_path / "test").rename(tmp_path / "val")
    data = made(settings | {"train": "training", "test": "val"}, tmp_path)
    assert len(data.train_labels) == 18


def broken(path: str, how: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: how(folder / path)


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "more", "problem"),
    [
        (
            broken("train/cat/001.png", lambda p: p.write_bytes(b"x")),
            {},
            "cat/001.png is not",
        ),
        (
            broken("test/dog/002.png", lambda p: p.write_bytes(p.read_bytes()[:50])),
            {},
            "test/dog/002.png is damaged",
        ),
        (
            broken("train/cat/001.png", lambda p: save(p, 6, 5)),
            {},
            "train/cat/001.png has 6x5 pixels, not 4x5; `resize: stretch` or `resize: crop`",
        ),
        (broken("train/cat", emptied), {}, "class 'cat' has no pictures: "),
        (broken("train/owl", lambda p: p.mkdir()), {}, "class 'owl' has no pictures: "),
        (broken("test/owl/1.png", lambda p: save(p, 4, 5)), {}, "test/owl is a class that "),
        (broken("train/owl/1.png", lambda p: save(p, 4, 5)), {}, "test has no folder 'owl', a"),
        (broken("train/x.png", lambda p: save(p, 4, 5)), {}, "train/x.png is no folder: "),
        (broken("train/cat/in/x.png", lambda p: save(p, 4, 5)), {}, "train/cat/in is a folder: "),
        (
            lambda p: None,
            {"classes": 4},
            "has 3 folders of classes (bird, cat, dog), but ",
        ),
        (lambda p: None, {"path": "nowhere"}, "cannot read nowhere/train: No such file"),
        (lambda p: None, {"test": "check"}, "check: No such file"),
        (
            lambda p: None,
            {"class_names": ["bird", "cat", "cow"]},
            "class_names: 'cow' is no folder of ",
        ),
        (
            lambda p: None,
            {"class_names": ["bird", "cat"], "classes": 2},
            "class_names: 'dog' is not among them",
        ),
        (lambda p: None, {"sha256": 64 * "0"}, f"expected {64 * '0'}"),
    ],
)
def test_damaged_folders(
    tmp_path: Path, damage: Callable[[Path], object], more: Settings, problem: str
) -> None:
    settings = formats.pictures(tmp_path / "mine") | more
    damage(tmp_path / "mine")
    assert problem in refused(settings, tmp_path)


def test_more_classes_than_a_byte_can_count(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for index in range(257):
            save(tmp_path / f"mine/{part}/{index}/0.png", 4, 5)
    settings = formats.settings("folder", path=str(tmp_path / "mine")) | {"classes": 256}
    assert "train has 257 classes: at most 256" in refused(settings, tmp_path)


def test_pictures_that_changed_are_a_reason_to_prepare_again(tmp_path: Path) -> None:
    settings = formats.pictures(tmp_path / "mine")
    made(settings, tmp_path)
    spec = SPEC.validate_python(settings)
    assert problem("mine", tmp_path / "mine.npz", spec) == ""
    save(tmp_path / "mine/train/cat/001.png", 4, 5)
    assert "was made of other pictures than are in" in problem("mine", tmp_path / "mine.npz", spec)
    load("mine", tmp_path / "mine.npz", spec)  # which has them as they were
    (tmp_path / "mine").rename(tmp_path / "elsewhere")
    assert problem("mine", tmp_path / "mine.npz", spec) == ""


def test_the_checksum_of_a_folder(tmp_path: Path) -> None:
    settings = formats.pictures(tmp_path)
    whole = checksum(tmp_path, ("train", "test"))
    before = fingerprint(SPEC.validate_python(settings))
    data = made(settings | {"sha256": whole}, tmp_path)
    assert len(data.train_labels) == 18
    (tmp_path / "train/cat/001.png").rename(tmp_path / "train/cat/xxx.png")
    assert fingerprint(SPEC.validate_python(settings)) != before
    assert whole in refused(settings | {"sha256": whole}, tmp_path)
    (tmp_path / "train/cat/xxx.png").rename(tmp_path / "train/cat/001.png")
    save(tmp_path / "train/cat/001.png", 4, 5)
    assert whole in refused(settings | {"sha256": whole}, tmp_path)


def test_where_a_folder_lies_does_not_matter_with_a_checksum(tmp_path: Path) -> None:
    digests = set()
    for place in ("one", "two"):
        settings = formats.pictures(tmp_path / place)
        settings["sha256"] = checksum(tmp_path / place, ("train", "test"))
        digests.add(SPEC.validate_python(settings).digest())
    assert len(digests) == 1


# validation images ------------------------------------------------------------------------------


def test_validation_images_are_left_out(tmp_path: Path) -> None:
    settings = formats.npz(tmp_path / "source")
    data = made(settings | {"validation": 6}, tmp_path)
    assert len(data.train_labels) == 12
    assert np.bincount(data.validation_labels).tolist() == [2, 2, 2]
    assert data.has_validation
    whole = {image.tobytes() for image in colours()["train_images"]}
    parts = [image.tobytes() for image in (*data.train_images, *data.validation_images)]
    assert len(parts) == len(whole)
    assert set(parts) == whole
    np.testing.assert_array_equal(data.test_images, colours()["test_images"])
    assert data.mean == pytest.approx(tuple(data.train_images.mean(axis=(0, 2, 3))))
    again = made(settings | {"validation": 6}, tmp_path)
    np.testing.assert_array_equal(again.validation_images, data.validation_images)
    other = made(settings | {"validation": 6, "validation_seed": 2}, tmp_path)
    assert (other.validation_images != data.validation_images).any()
    assert len(made(settings | {"validation": 1 / 3}, tmp_path).validation_labels) == 6
    assert not made(settings, tmp_path).has_validation


@pytest.mark.parametrize(
    ("share", "problem"),
    [(18, "none is left to train on"), (0.01, "of 18 training images that is none")],
)
def test_splits_without_images(tmp_path: Path, share: float, problem: str) -> None:
    settings = formats.npz(tmp_path / "source") | {"validation": share}
    assert problem in refused(settings, tmp_path)


def test_each_class_gives_its_share() -> None:
    labels = np.repeat(np.arange(4, dtype=np.uint8), [100, 50, 7, 3])
    for count in (1, 16, 33, 159):
        mask = held_out(labels, count, seed=1)
        assert mask.sum() == count
        found = np.bincount(labels[mask], minlength=4)
        assert np.abs(found - np.array([100, 50, 7, 3]) * count / 160).max() < 1
    # The same on every machine and in every version.
    assert np.flatnonzero(held_out(labels, 5, seed=1)).tolist() == [8, 16, 48, 103, 140]
