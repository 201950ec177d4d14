"""Pictures as a network wants them: any PNG or JPEG -> bytes in the shape and manner of MNIST."""

import math
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cnnlib.errors import DataError
from cnnlib.ink import find_ink
from cnnlib.layers import Shape

Grey = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MOST_PIXELS = 50_000_000
"""Larger pictures are refused before they are unpacked; phones take up to 200 MP, few of digits."""
MOST_SIDE = 1000
"""Pixels a side that are looked at; larger pictures are made smaller first."""
LEAST_CONTRAST = 16.0
"""Grey levels between background and ink, below which a picture is taken to be empty."""
FAINT = 0.15
"""Ink of less than this share of the strongest is background: shadows, artefacts of JPEG."""
NOISE = 8.0
"""So is what is within so many times the paper's noise (median absolute deviation)."""
BOX = 20 / 28
"""Share of the map's sides that MNIST's digits fill (LeCun et al.: 20x20 in 28x28)."""


def read_image(path: Path | str, shape: Shape) -> Bytes:
    """The picture at `path` as one image (C, H, W) of bytes for a network that takes `shape`.

    One channel: the way MNIST was made. The background becomes 0 and the ink up to 255, whichever
    was the darker; the digit is cut out, scaled to fit a box of 20/28 of the map keeping its
    aspect, and placed with its centre of mass in the middle. Three channels: the middle of the
    picture, scaled to the map. Raises DataError when the file is no picture, is damaged or empty,
    or has more than MOST_PIXELS.
    """
    channels, height, width = shape if len(shape) == 3 else (0, 0, 0)
    if channels not in (1, 3):
        raise DataError(f"the network takes images of shape {shape}: no picture has that")
    picture = _open(path)
    if channels == 3:
        fitted = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))
    ink = find_ink(*_grey_and_opacity(picture))
    if ink is None:
        raise DataError(f"{path} is empty: nothing on it stands out from the background")
    return normalise(ink, height, width)[np.newaxis]


def _open(path: Path | str) -> Image.Image:
    """The picture, decoded and turned upright."""
    try:
        with warnings.catch_warnings():
            # Sizes are checked here, against a lower limit; other warnings are about metadata.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "JPEG")) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise DataError(
                        f"{path} is too large: {width}x{height} pixels; at most {MOST_PIXELS:,}"
                    )
                picture.load()
                return _eight_bits(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError:
        raise DataError(f"{path} is too large; at most {MOST_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a PNG or JPEG picture") from None
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        raise DataError(f"{path} is damaged: {error}") from None
    except (
        SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        # Pillow's decoders raise all of these for damaged files: a chunk that says it is
        # of gigabytes is given memory before it is read.
        raise DataError(f"{path} is damaged: {error or type(error).__name__}") from None


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16 bits of grey as 8; Pillow's own conversion would clip them at 255."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))


def _grey_and_opacity(picture: Image.Image) -> tuple[Grey, Grey]:
    """Brightness 0..255 and opacity 0..1 of every pixel, (H, W) each."""
    if picture.has_transparency_data:
        layers = np.asarray(_reduced(picture.convert("RGBA").convert("LA")), dtype=np.float32)
        return layers[..., 0], layers[..., 1] / np.float32(255)
    grey = np.asarray(_reduced(picture.convert("L")), dtype=np.float32)
    return grey, np.ones_like(grey)


def _reduced(picture: Image.Image) -> Image.Image:
    """The same with at most MOST_SIDE pixels a side: what comes next takes 20 bytes a pixel."""
    factor = math.ceil(max(picture.size) / MOST_SIDE)
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
    """Where to start so that the centre of `mass` falls on the middle pixel.

    Pixel 14 of 0 to 27, where all of MNIST's digits have it.
    """
    centre = float(np.average(np.arange(len(mass)) + 0.5, weights=mass))
    return min(max(0, math.floor(length // 2 + 1 - centre)), length - len(mass))
