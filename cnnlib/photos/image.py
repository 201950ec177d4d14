"""Turns any photo or scan into bytes of the shape and the manner of MNIST."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cnnlib.arithmetic import ceil_div
from cnnlib.errors import DataError
from cnnlib.layers import Shape
from cnnlib.photos.ink import find_ink
from cnnlib.pictures import FORMATS, MOST_PIXELS, open_picture, picture_format

__all__ = ["FORMATS", "MOST_PIXELS", "normalise", "picture_format", "read_image"]

Grey = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MOST_SIDE = 1000
"""Largest side in pixels of the picture that is examined; larger ones are reduced first."""
BOX = 20 / 28
"""Share of the map's sides that MNIST's digits fill (LeCun et al. 1998: 20x20 in 28x28)."""


def read_image(path: Path | str, shape: Shape, ink: bool | None = None) -> Bytes:
    """The picture at `path` as one image (C, H, W) of bytes for a network that takes `shape`.

    `ink` says whether an image of one channel is made of what is written on the picture, as MNIST
    was; None: it is. The paper becomes 0 and the ink up to 255,
    whichever was darker; shadows, frames and everything beside the paper are left out. The digit is
    cut out, scaled with its aspect to fit a box of 20/28 of the map, and placed with its centre of
    mass in the middle. Any other image is the middle of the picture, scaled to the map, grey or in
    colours as it is. Raises DataError when the file is no picture, is damaged or empty, or has more
    than MOST_PIXELS, and where there should be ink on a network's colours.
    """
    channels, height, width = shape if len(shape) == 3 else (0, 0, 0)
    if channels not in (1, 3):
        raise DataError(f"the network takes images of shape {shape}: no picture has that")
    if channels == 3 and ink:
        raise DataError("the network takes colours: ink on paper has none")
    if channels == 3 or ink is False:
        picture = open_picture(path, ("L" if channels == 1 else "RGB",))
        fitted = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))
        return np.ascontiguousarray(fitted.reshape(height, width, channels).transpose(2, 0, 1))
    written = find_ink(*_grey_and_opacity(open_picture(path, ("L", "LA"))))
    if written is None:
        raise DataError(f"{path} is empty: nothing on it stands out from the background")
    return normalise(written, height, width)[np.newaxis]


def _grey_and_opacity(picture: Image.Image) -> tuple[Grey, Grey]:
    """Brightness 0..255 and opacity 0..1 of every pixel, (H, W) each."""
    values = np.asarray(_reduced(picture), dtype=np.float32)
    if picture.mode == "LA":
        return values[..., 0], values[..., 1] / np.float32(255)
    return values, np.ones_like(values)


def _reduced(picture: Image.Image) -> Image.Image:
    """Reduce a picture to at most MOST_SIDE pixels a side: finding ink takes 20 bytes a pixel."""
    factor = ceil_div(max(picture.size), MOST_SIDE)
    return picture.reduce(factor) if factor > 1 else picture


def normalise(ink: Grey, height: int, width: int) -> Bytes:
    """`ink` scaled into the middle box of an (height, width) map, by its centre of mass.

    The strongest ink becomes 255. No part of the digit is pushed over the map's edge.
    """
    box_height, box_width = max(1, round(BOX * height)), max(1, round(BOX * width))
    scale = min(box_height / ink.shape[0], box_width / ink.shape[1])
    new_height = min(box_height, max(1, round(scale * ink.shape[0])))
    new_width = min(box_width, max(1, round(scale * ink.shape[1])))
    # Bilinear in Pillow averages over all source pixels when it makes an image smaller.
    resized = Image.fromarray(ink).resize((new_width, new_height), Image.Resampling.BILINEAR)
    digit = np.clip(np.asarray(resized, dtype=np.float64), 0, None)
    digit *= 255 / digit.max()
    target = np.zeros((height, width), dtype=np.uint8)
    top = _offset(digit.sum(axis=1), height)
    left = _offset(digit.sum(axis=0), width)
    target[top : top + new_height, left : left + new_width] = np.round(digit)
    return target


def _offset(mass: NDArray[np.float64], length: int) -> int:
    """The first index at which the centre of `mass` falls on the middle pixel.

    That is pixel 14 of 0 to 27, where all of MNIST's digits have it.
    """
    centre = float(np.average(np.arange(len(mass)) + 0.5, weights=mass))
    return min(max(0, math.floor(length // 2 + 1 - centre)), length - len(mass))
