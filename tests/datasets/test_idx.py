"""The IDX format, read strictly."""

import struct
from pathlib import Path

import numpy as np
import pytest

from cnnlib.datasets import read_idx, write_idx
from cnnlib.errors import DataError, UserError

pytestmark = pytest.mark.quick

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
HEADER = struct.pack(">HBBIII", 0, 8, 3, 2, 3, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images-idx3-ubyte"


def test_bytes_of_the_format(path: Path) -> None:
    write_idx(path, IMAGES)
    assert path.read_bytes() == HEADER + bytes(range(24))


@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3, 4), (2, 3, 4, 5), (0, 28, 28)])
def test_read_what_was_written(path: Path, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    write_idx(path, array[..., ::-1])
    found = read_idx(path)
    assert found.dtype == np.uint8
    assert found.flags.writeable
    np.testing.assert_array_equal(found, array[..., ::-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: 0 bytes"),
        (b"\0\0\x08", "is truncated: 3 bytes"),
        (HEADER[:10], "is truncated: expected a header of 16 bytes, found 10"),
        (HEADER, r"is truncated: expected 40 bytes for 2 x 3 x 4, found 16"),
        (HEADER + bytes(23), "is truncated: expected 40 bytes for 2 x 3 x 4, found 39"),
        (HEADER + bytes(25), "is too long: expected 40 bytes for 2 x 3 x 4, found 41"),
        (b"\x01" + HEADER[1:] + bytes(24), "is no IDX file of bytes: it begins with 01 00 08 03"),
        (b"\0\x01" + HEADER[2:] + bytes(24), "is no IDX file of bytes"),
        (b"\0\0\x0d" + HEADER[3:] + bytes(24), "begins with 00 00 0d 03"),
        (b"\0\0\x08\0", "begins with 00 00 08 00"),
        (b"\x1f\x8b\x08\0" + bytes(40), "begins with 1f 8b 08 00"),
        (b"<!DOCTYPE html>", "is no IDX file of bytes"),
        # sizes whose product does not fit into 64 bits
        (struct.pack(">HBBIII", 0, 8, 3, *[2**32 - 1] * 3), "is truncated: expected 792281624"),
        (b"\0\0\x08\xff" + b"\xff" * 1020, "is truncated"),
    ],
)
def test_broken_files_are_named(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*nowhere: No such file"):
        read_idx(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot read .*: Is a directory"):
        read_idx(tmp_path)


def test_only_bytes_are_written(path: Path) -> None:
    with pytest.raises(ValueError, match="int64"):
        write_idx(path, np.arange(3))  # type: ignore[arg-type]
    assert not path.exists()


def test_unwritable(path: Path) -> None:
    path.write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_idx(path / "below", IMAGES)
