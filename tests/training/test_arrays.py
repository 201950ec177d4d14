"""What callers of the library may give as images, labels and parameters."""

from typing import Any

import numpy as np
import pytest

from cnnlib.errors import ConfigError
from cnnlib.training.arrays import as_images, as_labels, as_parameters

pytestmark = pytest.mark.quick

RANDOM = np.random.default_rng(3)
BYTES = RANDOM.integers(0, 256, (7, 1, 4, 5), dtype=np.uint8)
SHAPE = (1, 4, 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bytes_divided_by_255_come_back(dtype: type) -> None:
    everything = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    divided = (everything / dtype(255)).astype(dtype)
    assert np.array_equal(as_images(divided, (1, 16, 16)), everything)


def test_other_numbers_from_0_to_1_are_rounded_to_the_nearest_level() -> None:
    images = RANDOM.random((5, *SHAPE))
    found = as_images(images, SHAPE)
    assert np.abs(found / 255 - images).max() <= 0.5 / 255 + 1e-12


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.uint32])
def test_whole_numbers_are_levels(dtype: type) -> None:
    assert np.array_equal(as_images(BYTES.astype(dtype), SHAPE), BYTES)


def test_bytes_are_not_copied_and_others_become_contiguous() -> None:
    assert np.shares_memory(as_images(BYTES, SHAPE), BYTES)
    turned = np.asfortranarray(BYTES)
    found = as_images(turned, SHAPE)
    assert found.flags.c_contiguous
    assert np.array_equal(found, BYTES)


def test_one_channel_may_be_left_out_and_lists_are_taken() -> None:
    assert np.array_equal(as_images(BYTES[:, 0], SHAPE), BYTES)
    assert np.array_equal(as_images(BYTES.tolist(), SHAPE), BYTES)
    assert as_images(BYTES[:0], SHAPE).shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (BYTES.transpose(0, 2, 3, 1), "images.transpose(0, 3, 1, 2) puts channels first"),
        (BYTES.reshape(7, 20), "images.reshape(-1, 1, 4, 5) makes images of rows"),
        (BYTES[..., :3], "images have shape (7, 1, 4, 3), expected (N, 1, 4, 5)"),
        (np.uint8(3), "images have shape ()"),
        (BYTES * 1.0, "images / 255, or images.astype('uint8')"),
        (BYTES / 255 - 0.5, "expected 0 to 1: the trainer normalises them itself"),
        (BYTES[0, 0], "images[None] is a batch of one"),
        (BYTES.astype(int) + 1, "expected 0 to 255"),
        (BYTES.astype(int) - 1, "expected 0 to 255"),
        (np.where(BYTES > 9, np.nan, 0.5), "images are not all finite"),
        (
            BYTES > 100,
            "numbers from 0 to 1 (float): images * np.uint8(255)",
        ),
        (BYTES.astype(str), "expected bytes"),
        ([[1], [2, 3]], "images are no array"),
        (None, "images have shape ()"),
    ],
)
def test_other_images_are_refused_with_what_would_fit(images: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        as_images(images, SHAPE)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_single_image_of_several_channels_is_no_batch() -> None:
    with pytest.raises(ConfigError, match=r"images\[None\] is a batch of one"):
        as_images(np.zeros((3, 4, 5), np.uint8), (3, 4, 5))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
def test_labels_are_whole_numbers(dtype: type) -> None:
    found = as_labels(np.array([0, 2, 1], dtype), 3, 3)
    assert found.tolist() == [0, 2, 1]
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 3, 1], "labels[1] is 3, expected a class from 0 to 2"),
        ([0, 1, -1], "labels[2] is -1"),
        ([0, 1], "there are 3 images, but 2 labels"),
        ([0.0, 1.0, 2.0], "labels are float64, expected whole numbers; labels.astype(int)"),
        ([0.0, 1.5, 2.0], "expected whole numbers: labels[1] is 1.5"),
        ([0.0, 1.0, np.nan], "expected whole numbers: labels[2] is nan"),
        (["0", "1", "2"], "labels.astype(int)"),
        (["cat", "dog", "eel"], "np.unique(labels, return_inverse=True)[1] makes class numbers"),
        (np.array([0, 1, None]), "labels are object, expected whole numbers"),
        ([1, 2, 3], "labels[2] is 3, expected a class from 0 to 2: labels - 1 counts from 0"),
        ([True, False, True], "labels are bool"),
        (np.eye(3), "labels.argmax(axis=1)"),
        ([[0], [1], [2]], "labels have shape (3, 1), expected (N,): labels.ravel() makes it so"),
        (7, "labels have shape ()"),
    ],
)
def test_other_labels_are_refused(labels: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        as_labels(labels, 3, 3)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (np.zeros(3), "parameters have shape (3,), but the network has 4"),
        (np.zeros((2, 2)), "expected (4,)"),
        ([0, 1, np.nan, 3], "not all finite"),
        (list("abcd"), "expected numbers"),
        (np.zeros(4, complex), "parameters are complex128"),
    ],
)
def test_other_parameters_are_refused(vector: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        as_parameters(vector, 4)
    assert words in str(refused.value)
