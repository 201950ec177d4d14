"""Turns any photo or scan into bytes of the shape and the manner of MNIST."""

import math
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cnnlib.arithmetic import ceil_div
from cnnlib.errors import DataError
from cnnlib.layers import Shape
from cnnlib.photos.ink import find_ink

Grey = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Kinds of files by Pillow's names. Of animations and of several pages the first is read."""
MOST_PIXELS = 50_000_000
"""Pictures of more pixels are refused before they are unpacked. Phones take up to 200 MP, though
rarely of digits."""
MOST_SIDE = 1000
"""Largest side in pixels of the picture that is examined; larger ones are reduced first."""
BOX = 20 / 28
"""Share of the map's sides that MNIST's digits fill (LeCun et al. 1998: 20x20 in 28x28)."""


def read_image(path: Path | str, shape: Shape) -> Bytes:
    """The picture at `path` as one image (C, H, W) of bytes for a network that takes `shape`.

    An image of one channel is made as MNIST was. The paper becomes 0 and the ink up to 255,
    whichever was darker; shadows, frames and everything beside the paper are left out. The digit is
    cut out, scaled with its aspect to fit a box of 20/28 of the map, and placed with its centre of
    mass in the middle. An image of three channels is the middle of the picture, scaled to the map.
    Raises DataError when the file is no picture, is damaged or empty, or has more than MOST_PIXELS.
    """
    channels, height, width = shape if len(shape) == 3 else (0, 0, 0)
    if channels not in (1, 3):
        raise DataError(f"the network takes images of shape {shape}: no picture has that")
    if channels == 3:
        picture = _open(path, ("RGB",))
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))
    ink = find_ink(*_grey_and_opacity(_open(path, ("L", "LA"))))
    if ink is None:
        raise DataError(f"{path} is empty: nothing on it stands out from the background")
    return normalise(ink, height, width)[np.newaxis]


def picture_format(path: Path | str) -> str | None:
    """The kind of picture by the file's beginning; None if it cannot be read or is no picture."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.format
    except Exception:  # see _open
        return None


def _open(path: Path | str, modes: tuple[str, ...]) -> Image.Image:
    """The picture, decoded, turned upright and in the first of `modes`.

    A picture that is transparent somewhere has the second of them, if there is one.
    """
    try:
        with warnings.catch_warnings():
            # Sizes are checked here, against a lower limit; other warnings are about metadata.
            warnings.simplefilter("ignore")
            # A stream is opened, because Pillow 13 mistakes the rows of TIFF pictures that lie on
            # their side where it may map a file into memory.
            with open(path, "rb") as stream, Image.open(stream, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise DataError(
                        f"{path} is too large: {width}x{height} pixels; at most {MOST_PIXELS:,}"
                    )
                if picture.mode in ("LAB", "HSV"):
                    raise DataError(f"{path} has {picture.mode} colours: save it as RGB")
                picture.load()
                upright = _eight_bits(ImageOps.exif_transpose(picture))
                if len(modes) > 1 and upright.has_transparency_data:
                    return upright.convert("RGBA").convert(modes[1])
                return upright.convert(modes[0])
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{path} is too large; at most {MOST_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is {_instead(path)}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        # Pillow's decoders raise errors of a dozen kinds for damaged files. One is MemoryError:
        # memory for a chunk that claims gigabytes is allocated before the chunk is read.
        raise DataError(f"{path} is damaged: {error or type(error).__name__}") from None


def _instead(path: Path | str) -> str:
    """Describe a file that Pillow does not recognise."""
    with open(path, "rb") as stream:
        start = stream.read(12)
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "a HEIC photo, which cannot be read here: save it as JPEG"
    return "not a PNG or JPEG, nor a WebP, BMP, TIFF or GIF picture"


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Reduce more than 8 bits of grey to 8; Pillow's own conversion would clip them at 255.

    TIFF's 32-bit values, integers or not, may have any range. The smallest of 0 to 1, to 255, to
    65535 and to the largest value that holds them all is taken.
    """
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode not in ("I", "F"):
        return picture
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0, neginf=0)
    values -= min(0, values.min())
    largest = values.max()
    whole = 1 if picture.mode == "F" else 255
    top = next((range_ for range_ in (whole, 255, 65535) if largest <= range_), largest)
    return Image.fromarray((values * (255 / top)).astype(np.uint8))


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
