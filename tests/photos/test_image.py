"""Pictures: whatever the paper, ink, size and file kind, the network sees the same digit."""

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, features

from cnnlib.errors import DataError
from cnnlib.photos.image import FORMATS, MOST_PIXELS, normalise, picture_format, read_image
from tests.support.photographs import STYLES, mnist, photograph

SHAPE = (1, 28, 28)


def seven(scale: int = 4, at: tuple[int, int] = (40, 20)) -> NDArray[np.uint8]:
    """Ink 0..255 of a seven somewhere on a sheet that is not square."""
    sheet = Image.new("L", (75 * scale, 50 * scale))
    points = [(0, 0), (60, 0), (25, 130)]
    line = [((x + at[0]) * scale // 4, (y + at[1]) * scale // 4) for x, y in points]
    ImageDraw.Draw(sheet).line(line, fill=255, width=3 * scale)
    return np.asarray(sheet)


INK = seven()
DARK_ON_LIGHT = Image.fromarray(255 - INK)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean of the absolute difference, in grey levels."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.fixture
def expected(tmp_path: Path) -> NDArray[np.uint8]:
    return read_image(saved(tmp_path / "expected.png", Image.fromarray(INK)), SHAPE)


def test_it_is_like_mnist(expected: NDArray[np.uint8]) -> None:
    assert expected.shape == SHAPE
    assert expected.dtype == np.uint8
    digit = expected[0].astype(float)
    rows, columns = np.flatnonzero(digit.any(axis=1)), np.flatnonzero(digit.any(axis=0))
    assert rows[-1] - rows[0] + 1 == 20
    assert columns[-1] - columns[0] + 1 < 15  # a seven is narrower than high: not stretched
    assert digit.max() == 255
    centre = [np.average(np.arange(28) + 0.5, weights=digit.sum(axis=axis)) for axis in (1, 0)]
    assert centre == pytest.approx([14.5, 14.5], abs=0.51)


def transparent(ink_level: int) -> Image.Image:
    colour = np.full(INK.shape, ink_level, np.uint8)
    return Image.fromarray(np.stack([colour, colour, colour, INK], axis=-1), "RGBA")


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray((INK > 127).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 20, 30, 40])
    image.info["transparency"] = 0
    return image


VARIANTS = {
    "dark on light": DARK_ON_LIGHT,
    "RGB": DARK_ON_LIGHT.convert("RGB"),
    "RGBA, opaque": DARK_ON_LIGHT.convert("RGBA"),
    "grey and opacity": DARK_ON_LIGHT.convert("LA"),
    "palette": DARK_ON_LIGHT.quantize(16),
    "black and white": DARK_ON_LIGHT.convert("1", dither=Image.Dither.NONE),
    "16 bits": Image.fromarray((255 - INK).astype(np.uint16) * 257),
    "dark ink on nothing": transparent(0),
    "light ink on nothing": transparent(255),
    "palette on nothing": palette_with_transparency(),
    "blue on cream": Image.composite(
        Image.new("RGB", DARK_ON_LIGHT.size, (30, 40, 160)),
        Image.new("RGB", DARK_ON_LIGHT.size, (250, 240, 215)),
        Image.fromarray(INK),
    ),
    "grey on grey": Image.fromarray((140 - INK * 0.2).astype(np.uint8)),
    "noisy paper": Image.fromarray(
        np.clip(230 - INK * 0.8 + np.random.default_rng(0).normal(0, 3, INK.shape), 0, 255).astype(
            np.uint8
        )
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_paper_ink_and_mode_do_not_matter(
    tmp_path: Path, expected: NDArray[np.uint8], name: str
) -> None:
    found = read_image(saved(tmp_path / "picture.png", VARIANTS[name]), SHAPE)
    assert difference(found, expected) < 5
    assert np.argmax(found.sum(axis=(0, 2))) == pytest.approx(
        np.argmax(expected.sum(axis=(0, 2))), abs=1
    )


def test_a_jpeg(tmp_path: Path, expected: NDArray[np.uint8]) -> None:
    path = saved(tmp_path / "picture.jpg", DARK_ON_LIGHT.convert("RGB"), quality=60)
    assert difference(read_image(path, SHAPE), expected) < 5
    cmyk = saved(tmp_path / "cmyk.jpg", DARK_ON_LIGHT.convert("CMYK"))
    assert difference(read_image(cmyk, SHAPE), expected) < 5


def test_a_photograph_taken_sideways(tmp_path: Path, expected: NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise before it is shown
    turned = DARK_ON_LIGHT.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    path = saved(tmp_path / "picture.jpg", turned, exif=exif, quality=95)
    assert difference(read_image(path, SHAPE), expected) < 5


@pytest.mark.parametrize("scale", [2, 3, 10])
def test_size_and_place_do_not_matter(
    tmp_path: Path, expected: NDArray[np.uint8], scale: int
) -> None:
    ink = Image.fromarray(255 - seven(scale, at=(90, 30)))
    assert difference(read_image(saved(tmp_path / "picture.png", ink), SHAPE), expected) < 8


def test_a_large_photograph(tmp_path: Path, expected: NDArray[np.uint8]) -> None:
    large = DARK_ON_LIGHT.resize((6000, 4000), Image.Resampling.BICUBIC)
    path = saved(tmp_path / "picture.png", large, compress_level=1)
    assert difference(read_image(path, SHAPE), expected) < 5


def test_a_picture_that_is_like_mnist_stays(tmp_path: Path, expected: NDArray[np.uint8]) -> None:
    again = read_image(saved(tmp_path / "again.png", Image.fromarray(expected[0])), SHAPE)
    assert difference(again, expected) < 3


def test_a_long_stroke_stays_inside(tmp_path: Path) -> None:
    """All the mass at one end would push the other over the edge."""
    ink = np.zeros((100, 400), np.float32)
    ink[:, :40] = 255
    ink[45:55] = 255
    found = normalise(ink, 28, 28)
    assert found.shape == (28, 28)
    assert np.flatnonzero(found.any(axis=0)).size == 20


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 64, 40), (1, 1, 1), (3, 32, 32), (3, 17, 13)])
def test_other_shapes(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    found = read_image(saved(tmp_path / "picture.png", DARK_ON_LIGHT.convert("RGB")), shape)
    assert found.shape == shape
    assert found.dtype == np.uint8
    assert found.max() > 200


def test_three_channels_are_red_green_blue(tmp_path: Path) -> None:
    path = saved(tmp_path / "picture.png", Image.new("RGB", (50, 40), (10, 20, 30)))
    found = read_image(path, (3, 4, 4))
    assert (found == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("shape", [(2, 28, 28), (784,)])
def test_shapes_no_picture_has(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="no picture has"):
        read_image(saved(tmp_path / "picture.png", DARK_ON_LIGHT), shape)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_empty_pictures(tmp_path: Path, level: int) -> None:
    for size in ((28, 28), (1, 1), (500, 3)):
        path = saved(tmp_path / "empty.png", Image.new("L", size, level))
        with pytest.raises(DataError, match=r"empty\.png is empty"):
            read_image(path, SHAPE)
    path = saved(tmp_path / "empty.png", Image.new("RGBA", (30, 30), (level, level, level, 0)))
    with pytest.raises(DataError, match=r"empty\.png is empty"):
        read_image(path, SHAPE)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"picture\.png is (not a PNG|damaged)"):
            read_image(path, SHAPE)
    DARK_ON_LIGHT.save(path, "PPM")
    with pytest.raises(DataError, match="is not a PNG or JPEG"):
        read_image(path, SHAPE)
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(DataError, match=r"is a HEIC photo.*save it as JPEG"):
        read_image(path, SHAPE)
    with pytest.raises(DataError, match="cannot read .*No such file"):
        read_image(tmp_path / "nothing.png", SHAPE)
    with pytest.raises(DataError, match="cannot read .*Is a directory"):
        read_image(tmp_path, SHAPE)


# Kinds of files -----------------------------------------------------------------------------------

KINDS = [kind for kind in FORMATS if kind != "WEBP" or features.check("webp")]
MODES = {
    "PNG": ("1", "L", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "GIF": ("1", "L", "P", "RGB"),
}


def in_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return VARIANTS["16 bits"]
    if mode == "1":
        return VARIANTS["black and white"]
    return DARK_ON_LIGHT.convert("RGB").convert(mode)


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in KINDS for mode in MODES[kind]])
def test_kinds_of_files(tmp_path: Path, expected: NDArray[np.uint8], kind: str, mode: str) -> None:
    path = tmp_path / "picture"
    in_mode(mode).save(path, kind)
    assert difference(read_image(path, SHAPE), expected) < 5
    grey = read_image(path, (3, *INK.shape)).transpose(1, 2, 0).astype(int).mean(axis=2)
    # JPEG's and WebP's losses and the edges of black and white are on few pixels.
    assert np.median(np.abs(grey - (255 - INK))) <= 2
    assert picture_format(path) == kind


@pytest.mark.parametrize("top", [1.0, 3.0, 250.0, 60_000.0, 1e9])
def test_tiff_of_any_range(tmp_path: Path, expected: NDArray[np.uint8], top: float) -> None:
    values = (255 - INK.astype(np.float32)) * np.float32(top / 255)
    values[0, 0] = np.nan
    path = saved(tmp_path / "picture.tif", Image.fromarray(values))
    if top != 3.0:  # which is nearly black among 0 to 255
        assert difference(read_image(path, SHAPE), expected) < 5
    path = saved(tmp_path / "picture.tif", Image.fromarray(values - top / 2))
    if top != 3.0:
        assert difference(read_image(path, SHAPE), expected) < 5


def test_the_first_picture_counts(tmp_path: Path, expected: NDArray[np.uint8]) -> None:
    other = Image.new("L", DARK_ON_LIGHT.size, 255)
    for kind in ("GIF", "WEBP", "TIFF"):
        path = tmp_path / "picture"
        if kind in KINDS:
            DARK_ON_LIGHT.save(path, kind, save_all=True, append_images=[other])
            assert difference(read_image(path, SHAPE), expected) < 5
    DARK_ON_LIGHT.save(path, "MPO", save_all=True, append_images=[other])  # telephones' JPEG
    assert difference(read_image(path, SHAPE), expected) < 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright(
    tmp_path: Path, expected: NDArray[np.uint8], kind: str
) -> None:
    if kind not in KINDS:
        pytest.skip(f"this Pillow does not read {kind}")
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned a quarter counterclockwise
    path = tmp_path / "picture"
    DARK_ON_LIGHT.transpose(Image.Transpose.ROTATE_270).save(path, kind, exif=exif)
    assert difference(read_image(path, SHAPE), expected) < 5


def test_colours_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "lab.tif", Image.new("LAB", (30, 30)))
    with pytest.raises(DataError, match=r"lab\.tif has LAB colours: save it as RGB"):
        read_image(path, SHAPE)


# Photos -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[NDArray[np.uint8], NDArray]]:
    """Test images of MNIST, and how they are read without any photo."""
    path = tmp_path_factory.mktemp("digits") / "digit.png"
    return [(digit, read_image(saved(path, Image.fromarray(digit)), SHAPE)) for digit in mnist()]


@pytest.mark.parametrize("style", STYLES)
def test_photos(
    tmp_path: Path, digits: list[tuple[NDArray[np.uint8], NDArray]], style: str
) -> None:
    """At least fifteen of sixteen are found where they are: nearest to themselves, and near."""
    right = 0
    for number, (digit, _) in enumerate(digits):
        path = photograph(style, digit, number, tmp_path / f"photo{number}")
        with contextlib.suppress(DataError):
            found = read_image(path, SHAPE)
            apart = [difference(found, plain) for _, plain in digits]
            right += int(np.argmin(apart)) == number and apart[number] < 30
    assert len(digits) == 16
    assert right >= 15


@pytest.mark.parametrize("style", ["light falls by 130", "shadow", "frame of 1", "frame of 3"])
def test_a_photo_of_nothing_is_empty(tmp_path: Path, style: str) -> None:
    """What surrounds digits is none, as long as there is nothing else."""
    for number in range(8):
        random = np.random.default_rng(number)
        sheet = STYLES[style](np.zeros((200, 150)), random) + random.normal(0, 3, (200, 150))
        path = tmp_path / "empty.png"
        Image.fromarray(np.clip(sheet, 0, 255).astype(np.uint8)).save(path)
        with pytest.raises(DataError, match=r"empty\.png is empty"):
            read_image(path, SHAPE)


@pytest.mark.parametrize("margin", [0, 1, 8])
@pytest.mark.parametrize("scale", [1, 20])
def test_digits_that_fill_the_picture(
    tmp_path: Path, digits: list[tuple[NDArray[np.uint8], NDArray]], margin: int, scale: int
) -> None:
    right = 0
    for number, (digit, _) in enumerate(digits):
        rows, columns = np.flatnonzero(digit.any(axis=1)), np.flatnonzero(digit.any(axis=0))
        cut = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        large = Image.fromarray(cut).resize((cut.shape[1] * scale, cut.shape[0] * scale))
        image = Image.fromarray(255 - np.pad(np.asarray(large), margin))
        with contextlib.suppress(DataError):
            found = read_image(saved(tmp_path / "cut.png", image), SHAPE)
            apart = [difference(found, plain) for _, plain in digits]
            right += int(np.argmin(apart)) == number
    assert right >= (15 if margin else 14)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_cut_off_pictures(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    DARK_ON_LIGHT.save(path, kind)
    whole, complete = path.read_bytes(), read_image(path, SHAPE)
    for length in range(0, len(whole) - 12, max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        if length < 0.9 * len(whole):
            with pytest.raises(DataError, match=r"picture is (not|damaged)"):
                read_image(path, SHAPE)
        else:  # perhaps only what comes after the last pixel is lost
            with contextlib.suppress(DataError):
                assert (read_image(path, SHAPE) == complete).all()


def test_damaged_pictures_are_read_or_refused(tmp_path: Path) -> None:
    """Never anything else: pillow raises a dozen kinds of errors."""
    random = np.random.default_rng(0)
    for kind in KINDS:
        path = tmp_path / "picture"
        DARK_ON_LIGHT.save(path, kind)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for number in range(150):
            # most of them in colour: to look for ink takes longer than to decode
            shape = (3, 28, 28) if number % 10 else SHAPE
            damaged = whole.copy()
            damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(DataError):
                assert read_image(path, shape).shape == shape


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])
def test_a_decompression_bomb_is_not_unpacked(tmp_path: Path, side: int) -> None:
    """A few kilobytes that would become up to 3.6 GB."""
    assert side * side > MOST_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"bomb\.png is too large"):
        read_image(path, SHAPE)


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "text.png", DARK_ON_LIGHT)
    whole = path.read_bytes()
    text = chunk(b"zTXt", b"note\x00\x00" + zlib.compress(bytes(80_000_000)))
    path.write_bytes(whole[:33] + text + whole[33:])
    with pytest.raises(DataError, match=r"text\.png is (damaged|not a PNG)"):
        read_image(path, SHAPE)


def test_a_grey_picture_as_it_is(tmp_path: Path) -> None:
    """For networks of other grey pictures than ink: no paper is looked for, nothing is turned."""
    pixels = np.random.default_rng(3).integers(0, 256, (10, 24), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    found = read_image(tmp_path / "photo.png", (1, 10, 8), ink=False)
    np.testing.assert_array_equal(found[0], pixels[:, 8:16])
    with pytest.raises(DataError, match="takes colours: ink on paper has none"):
        read_image(tmp_path / "photo.png", (3, 10, 8), ink=True)
