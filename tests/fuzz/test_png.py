"""PNG pictures: the pixels that were put in, whatever their depth and kind, or one line."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cnnlib.photos.image import read_image
from tests.fuzz.support import CHANGES, Change, damaged, inputs, refusal

# Colour type -> (samples a pixel, permitted bits a sample), as in the PNG specification.
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
KINDS = {
    GREY: (1, (1, 2, 4, 8, 16)),
    RGB: (3, (8, 16)),
    PALETTE: (1, (1, 2, 4, 8)),
    GREY_ALPHA: (2, (8, 16)),
    RGBA: (4, (8, 16)),
}
FORMATS = [(colour, bits) for colour, (_, depths) in KINDS.items() for bits in depths]
# Adam7: first row, first column, step of rows, step of columns of each pass.
PASSES = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]
COLOURS = np.random.default_rng(3).integers(0, 256, (256, 3), np.uint8)


def chunk(name: bytes, content: bytes) -> bytes:
    checked = name + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def rows(samples: NDArray[np.uint16], bits: int) -> bytes:
    """Rows of (H, W, samples), each with filter 0 and packed to whole bytes."""
    lines = b""
    for row in samples.reshape(len(samples), -1):
        if bits == 16:
            packed = row.astype(">u2").tobytes()
        elif bits == 8:
            packed = row.astype(np.uint8).tobytes()
        else:
            places = (row[:, None] >> np.arange(bits - 1, -1, -1)) & 1
            packed = np.packbits(places.astype(np.uint8).reshape(-1)).tobytes()
        lines += b"\0" + packed
    return lines


def png(samples: NDArray[np.uint16], colour: int, bits: int, interlaced: bool) -> bytes:
    """The file, written here and by no library."""
    height, width, _ = samples.shape
    if interlaced:
        parts = [samples[y::down, x::right] for y, x, down, right in PASSES]
        data = b"".join(rows(part, bits) for part in parts if part.size)
    else:
        data = rows(samples, bits)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", COLOURS[: 1 << bits].tobytes()) if colour == PALETTE else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + palette
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def expected(samples: NDArray[np.uint16], colour: int, bits: int) -> NDArray[np.float64]:
    """Red, green and blue of 0 to 255, (3, H, W), by what the specification says."""
    if colour == PALETTE:
        return COLOURS[samples[..., 0]].transpose(2, 0, 1).astype(float)
    shown = samples[..., : 1 if colour in (GREY, GREY_ALPHA) else 3] * (255 / ((1 << bits) - 1))
    return np.broadcast_to(shown, (*samples.shape[:2], 3)).transpose(2, 0, 1)


def noise(colour: int, bits: int, height: int, width: int, seed: int) -> NDArray[np.uint16]:
    shape = (height, width, KINDS[colour][0])
    samples = np.random.default_rng(seed).integers(0, 1 << bits, shape, np.uint16, endpoint=False)
    if colour in (GREY_ALPHA, RGBA):
        samples[..., -1] = (1 << bits) - 1
    return samples


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("png") / "picture.png"


SIDE = st.integers(1, 19)


@inputs(400)
@given(
    kind=st.sampled_from(FORMATS),
    interlaced=st.booleans(),
    height=SIDE,
    width=SIDE,
    seed=st.integers(0, 1 << 32),
)
def test_good_pictures(
    path: Path, kind: tuple[int, int], interlaced: bool, height: int, width: int, seed: int
) -> None:
    samples = noise(*kind, height, width, seed)
    path.write_bytes(png(samples, *kind, interlaced))
    found, said = refusal(lambda: read_image(path, (3, height, width)))
    assert said is None
    shown = expected(samples, *kind)
    # 16 bits become 8 by leaving out the lower ones, or by rounding
    assert np.abs(found - shown).max() <= (1.01 if kind[1] == 16 else 0.51)

    grey, why = refusal(lambda: read_image(path, (1, 28, 28)))
    Image.fromarray(found.transpose(1, 2, 0)).save(path)
    same, why_not = refusal(lambda: read_image(path, (1, 28, 28)))
    assert why == why_not
    if grey is not None:
        assert (np.abs(grey.astype(int) - same) <= 2).all()


def seeds() -> list[bytes]:
    """Small good files to damage: every format, and one with all kinds of further chunks."""
    files = [png(noise(*kind, 9, 7, 1), *kind, bool(kind[1] & 1)) for kind in FORMATS]
    head, body = files[3][:33], files[3][33:]
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    more = [
        chunk(b"gAMA", struct.pack(">I", 45455)),
        chunk(b"pHYs", struct.pack(">IIB", 1, 1, 1)),
        chunk(b"tRNS", struct.pack(">H", 3)),
        chunk(b"eXIf", exif),
        chunk(b"zTXt", b"note\0\0" + zlib.compress(b"text")),
        chunk(b"tEXt", b"a\0b"),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"b")),
        chunk(b"cHRM", bytes(32)),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200))),
        chunk(b"sRGB", b"\0"),
        chunk(b"acTL", struct.pack(">II", 2, 0)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 7, 9, 0, 0, 1, 1, 0, 0)),
    ]
    return [*files, head + b"".join(more) + body, *(head + each + body for each in more)]


SEEDS = seeds()


def with_right_checksums(data: bytes) -> bytes:
    """The same with right checksums, so that what lies behind them is reached."""
    result, at = data[:8], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        result += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return result + data[at:]


@inputs(800)
@given(
    seed=st.sampled_from(SEEDS),
    changes=CHANGES,
    repair=st.booleans(),
    channels=st.sampled_from([1, 3]),
)
def test_damaged_pictures(
    path: Path, seed: bytes, changes: list[Change], repair: bool, channels: int
) -> None:
    data = damaged(seed, changes)
    path.write_bytes(with_right_checksums(data) if repair else data)
    shape = (channels, 12, 10)
    found, said = refusal(lambda: read_image(path, shape))
    if found is None:
        assert str(path) in str(said)
    else:
        assert found.shape == shape
        assert found.dtype == np.uint8


@inputs(200)
@given(
    width=st.integers(0, (1 << 32) - 1),
    height=st.integers(0, (1 << 32) - 1),
    bits=st.sampled_from([1, 8, 16]),
    colour=st.sampled_from([0, 2, 3, 4, 6]),
    lace=st.integers(0, 1),
)
def test_sizes_that_promise_much(
    path: Path, width: int, height: int, bits: int, colour: int, lace: int
) -> None:
    """Refused by the header alone or for want of pixels, before memory is taken."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, lace)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b""))
    found, said = refusal(lambda: read_image(path, (1, 12, 10)))
    assert found is None or width * height <= 100 * 8
    assert found is not None or str(path) in str(said)


def test_a_chunk_that_says_it_is_vast(path: Path) -> None:
    """Four gigabytes are asked for, a few bytes are there."""
    whole = SEEDS[3]
    at = whole.index(b"IDAT") - 4
    path.write_bytes(whole[:at] + b"\xff\xff\xff\xf0" + whole[at + 4 :])
    found, said = refusal(lambda: read_image(path, (1, 12, 10)))
    assert found is None
    assert f"{path} is damaged" in str(said)
