"""Made-up images for tests and trials: noisy, shifted blobs, one arrangement of them per class.

The same settings give the same bytes on every machine: only integers and exactly rounded
operations (no exp, no sums of many terms in an order that a library chooses) decide a pixel.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from cnnlib.datasets.specs import SyntheticSpec

Bytes = NDArray[np.uint8]

BLOBS = 4
NOISE = 40
BACKGROUND, HEIGHT = 40, 180


def synthetic(spec: SyntheticSpec) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Train images (N,C,H,W), train labels (N,), test images, test labels, all uint8.

    Every image is its class's prototype, shifted by up to a fourteenth of its size, at a contrast
    of its own, with noise. The classes are as equally frequent as they can be.
    """
    generator = np.random.default_rng(spec.seed)
    _, height, width = spec.shape
    shifts = (height // 14, width // 14)
    prototypes = _prototypes(generator, spec, shifts)
    train = _draw(generator, prototypes, spec, spec.train_images)
    test = _draw(generator, prototypes, spec, spec.test_images)
    return *train, *test


def _prototypes(
    generator: np.random.Generator, spec: SyntheticSpec, shifts: tuple[int, int]
) -> NDArray[np.int16]:
    """(classes, C, H + 2 shift, W + 2 shift): per map the highest of some parabolic blobs."""
    channels, height, width = spec.shape
    rows = np.arange(-shifts[0], height + shifts[0])[:, None]
    columns = np.arange(-shifts[1], width + shifts[1])
    maps = np.zeros((spec.classes, channels, len(rows), len(columns)), np.int16)
    for each in maps.reshape(-1, len(rows), len(columns)):
        for y, x, size, peak in generator.random((BLOBS, 4)):
            reach = 0.15 + 0.15 * size
            down = (rows - y * (height - 1)) / (reach * height)
            right = (columns - x * (width - 1)) / (reach * width)
            blob = (0.6 + 0.4 * peak) * HEIGHT * (1.0 - down * down - right * right)
            np.maximum(each, blob.astype(np.int16), out=each)
    return maps


def _draw(
    generator: np.random.Generator, prototypes: NDArray[np.int16], spec: SyntheticSpec, count: int
) -> tuple[Bytes, Bytes]:
    labels = generator.permutation(np.arange(count) % spec.classes).astype(np.uint8)
    windows = sliding_window_view(prototypes, spec.shape[1:], axis=(2, 3))
    down = generator.integers(windows.shape[2], size=count)
    right = generator.integers(windows.shape[3], size=count)
    images = windows[labels, :, down, right]
    contrast = generator.integers(160, 256, (count, 1, 1, 1), np.int16)
    # 180 * 255 does not fit into 16 bits.
    images = (images.astype(np.int32) * contrast // 256).astype(np.int16) + BACKGROUND
    images += generator.integers(-NOISE, NOISE + 1, images.shape, np.int16)
    return np.clip(images, 0, 255).astype(np.uint8), labels
