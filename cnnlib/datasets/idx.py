"""The IDX format: two zero bytes, a type, the number of dimensions, their sizes, the elements.

Sizes are 32-bit and big-endian. Only type 0x08, unsigned bytes, is supported: the type of MNIST and
all its relatives. The format is described on Yann LeCun's page on MNIST.
"""

import math
import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnnlib.errors import DataError
from cnnlib.files import write_whole

UINT8 = 0x08
MOST_DIMENSIONS = 32
"""Images have three or four; numpy ends at 64."""


def read_idx(path: Path | str) -> NDArray[np.uint8]:
    """Read an uncompressed IDX file into a new array of uint8.

    Raises DataError naming the file, what was expected and what was found.
    """
    try:
        with open(path, "rb") as stream:
            found = os.fstat(stream.fileno()).st_size
            shape = _read_shape(path, stream.read(4 + 4 * 255), found)
            # Memory for the elements is taken only now that the sizes are known to be right.
            stream.seek(4 + 4 * len(shape))
            elements = np.frombuffer(bytearray(stream.read(math.prod(shape))), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(elements) != math.prod(shape):
        raise DataError(f"{path} changed while it was read")
    return elements.reshape(shape)


def parse_idx(data: bytes | bytearray, path: Path | str) -> NDArray[np.uint8]:
    """The array of an IDX file whose bytes are `data`; they are shared, not copied.

    Raises DataError that names `path` for anything else.
    """
    shape = _read_shape(path, bytes(data[: 4 + 4 * 255]), len(data))
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _read_shape(path: Path | str, data: bytes, found: int) -> tuple[int, ...]:
    """The sizes of a file of `found` bytes that begins with `data`; DataError if they are wrong."""
    if found < 4 or len(data) < 4:
        raise DataError(f"{path} is truncated: {found} bytes, an IDX file has 4 at the least")
    zeros, kind, dimensions = struct.unpack(">HBB", data[:4])
    if zeros != 0 or kind != UINT8 or dimensions == 0:
        raise DataError(
            f"{path} is no IDX file of bytes: it begins with {data[:4].hex(' ')}, "
            f"expected 00 00 08 and the number of dimensions"
        )
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(f"{path} is truncated: expected a header of {header} bytes, found {found}")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = header + math.prod(shape)
    sizes = " x ".join(map(str, shape[:MOST_DIMENSIONS]))
    if found != expected:
        wrong = "truncated" if found < expected else "too long"
        many = str(expected) if expected < 1 << 128 else "more than 2^128"
        raise DataError(f"{path} is {wrong}: expected {many} bytes for {sizes}, found {found}")
    # An empty array may have sizes whose product no machine can represent.
    if dimensions > MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= 1 << 63:
        raise DataError(
            f"{path} has {dimensions} dimensions of {sizes}: at most {MOST_DIMENSIONS} of them, "
            "and fewer than 2^63 elements, can be read"
        )
    return shape


def write_idx(path: Path | str, array: NDArray[np.uint8]) -> None:
    """Write `array` (uint8, 1 to 255 dimensions) as an IDX file, whole or not at all."""
    if array.dtype != np.uint8 or not 1 <= array.ndim <= 255:
        raise ValueError(f"IDX files here hold uint8 of 1 to 255 dimensions, not {array.dtype}")
    header = struct.pack(f">HBB{array.ndim}I", 0, UINT8, array.ndim, *array.shape)
    with write_whole(path) as temporary:
        temporary.write_bytes(header + array.tobytes())
