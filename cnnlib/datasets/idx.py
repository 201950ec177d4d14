"""The IDX format: two zero bytes, a type, the number of dimensions, their sizes, the elements.

Sizes are 32-bit and big-endian. Only type 0x08, unsigned bytes, is known here: the type of
MNIST and all its relatives. Format: Yann LeCun's page on MNIST.
"""

import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnnlib.errors import DataError
from cnnlib.files import write_whole

UINT8 = 0x08


def read_idx(path: Path | str) -> NDArray[np.uint8]:
    """The array in an uncompressed IDX file, uint8, in memory of its own.

    Raises DataError naming the file, what was expected and what was found.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(data) < 4:
        raise DataError(f"{path} is truncated: {len(data)} bytes, an IDX file has 4 at the least")
    zeros, kind, dimensions = struct.unpack(">HBB", data[:4])
    if zeros != 0 or kind != UINT8 or dimensions == 0:
        raise DataError(
            f"{path} is no IDX file of bytes: it begins with {data[:4].hex(' ')}, "
            f"expected 00 00 08 and the number of dimensions"
        )
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(
            f"{path} is truncated: expected a header of {header} bytes, found {len(data)}"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = header + math.prod(shape)
    if len(data) != expected:
        wrong = "truncated" if len(data) < expected else "too long"
        sizes = " x ".join(map(str, shape))
        raise DataError(
            f"{path} is {wrong}: expected {expected} bytes for {sizes}, found {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def write_idx(path: Path | str, array: NDArray[np.uint8]) -> None:
    """Write `array` (uint8, 1 to 255 dimensions) as an IDX file, whole or not at all."""
    if array.dtype != np.uint8 or not 1 <= array.ndim <= 255:
        raise ValueError(f"IDX files here hold uint8 of 1 to 255 dimensions, not {array.dtype}")
    header = struct.pack(f">HBB{array.ndim}I", 0, UINT8, array.ndim, *array.shape)
    with write_whole(path) as temporary:
        temporary.write_bytes(header + array.tobytes())
