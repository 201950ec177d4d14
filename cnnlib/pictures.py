"""Opens picture files of any common kind, and names what is wrong with the others."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cnnlib.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Kinds of files by Pillow's names. Of animations and of several pages the first is read."""
MOST_PIXELS = 50_000_000
"""Pictures of more pixels are refused before they are unpacked. Phones take up to 200 MP, though
rarely of digits."""


def picture_format(path: Path | str) -> str | None:
    """The kind of picture by the file's beginning; None if it cannot be read or is no picture."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.format
    except Exception:  # see open_picture
        return None


def open_picture(path: Path | str, modes: tuple[str, ...]) -> Image.Image:
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
