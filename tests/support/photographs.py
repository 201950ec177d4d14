"""Digits as people photograph them: uneven light, shadows, a table in view, frames, noise.

A photo begins as `ink`, the share of each pixel that is covered, 0 to 1. A style draws it on paper
and lights it; brightness is 0 to 255 as a float until the end.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from cnnlib.paths import ROOT

Floats = NDArray[np.float64]
Style = Callable[[Floats, np.random.Generator], Floats]

PICTURES = ROOT / "results/reference/nvidia-h100/tables/pictures.csv"
SIZES = ((240, 200), (150, 200), (300, 400), (100, 100))


def mnist() -> list[NDArray[np.uint8]]:
    """The test images of MNIST that the published table shows: all ten digits, and hard ones."""
    with open(PICTURES, newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["dataset"] == "mnist"]
    return [np.frombuffer(bytes.fromhex(row["pixels"]), np.uint8).reshape(28, 28) for row in rows]


def on_sheet(
    digit: NDArray[np.uint8], random: np.random.Generator, size: tuple[int, int]
) -> Floats:
    """The digit somewhere on a sheet, a third to two thirds as high or as wide as it."""
    height, width = size
    scale = random.uniform(0.35, 0.65) * min(size) / 20
    side = round(28 * scale)
    large = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC))
    # The edges of a pen's strokes are sharper than those of an enlarged picture.
    smooth = ndimage.gaussian_filter(large / 255, 0.3 * scale)
    sharp = np.clip((smooth - 0.5) * max(1, scale) + 0.5, 0, 1)
    rows, columns = np.flatnonzero(sharp.any(axis=1)), np.flatnonzero(sharp.any(axis=0))
    sharp = sharp[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top = random.integers(height // 20, height - len(sharp) - height // 20)
    left = random.integers(width // 20, width - sharp.shape[1] - width // 20)
    sheet = np.zeros(size)
    sheet[top : top + len(sharp), left : left + sharp.shape[1]] = sharp
    return sheet


def written(ink: Floats, paper: float | Floats = 220.0, share: float = 0.25) -> Floats:
    """Ink that reflects a share of the light, on paper of this brightness."""
    return paper * (1 - ink * (1 - share))


def coordinates(ink: Floats) -> tuple[Floats, Floats]:
    """Row and column of every pixel, -1 to 1."""
    rows, columns = np.linspace(-1, 1, ink.shape[0]), np.linspace(-1, 1, ink.shape[1])
    return np.broadcast_arrays(rows[:, None], columns[None])


def ramp(ink: Floats, random: np.random.Generator) -> Floats:
    """0 to 1 in any direction across the picture."""
    rows, columns = coordinates(ink)
    angle = random.uniform(0, 2 * np.pi)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    return (along - along.min()) / (along.max() - along.min())


def falling_light(levels: float) -> Style:
    """Paper that is darker on one side than on the other by so many levels."""
    return lambda ink, random: written(ink, 240 - levels * ramp(ink, random))


def vignette(ink: Floats, random: np.random.Generator) -> Floats:
    rows, columns = coordinates(ink)
    return written(ink, 225 * (1 - random.uniform(0.2, 0.35) * (rows**2 + columns**2)))


def shadow(ink: Floats, random: np.random.Generator) -> Floats:
    """A hand's: over one corner, round or straight, with an edge that is more or less soft."""
    rows, columns = coordinates(ink)
    rows, columns = rows * random.choice([-1, 1]) + 1, columns * random.choice([-1, 1]) + 1
    height, width = random.uniform(0.6, 1.3, 2)
    if random.random() < 0.5:
        inside = np.hypot(rows / height, columns / width) < 1
    else:
        inside = rows / height + columns / width < 1.2
    soft = ndimage.gaussian_filter(inside * 1.0, random.uniform(0.005, 0.05) * min(ink.shape))
    return written(ink, 220 * (1 - random.uniform(0.3, 0.55) * soft))


def fingers(ink: Floats, random: np.random.Generator) -> Floats:
    """A hand's shadow with fingers, which are about as wide as strokes."""
    rows, columns = coordinates(ink)
    angle = random.uniform(0, 2 * np.pi)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    across = rows * np.cos(angle) - columns * np.sin(angle)
    inside = along > 0.75
    for finger in range(3):
        middle = 0.3 * (finger - 1)
        inside |= (along > random.uniform(0.4, 0.7)) & (abs(across - middle) < 0.08)
    soft = ndimage.gaussian_filter(inside * 1.0, 0.02 * min(ink.shape))
    return written(ink, 220 * (1 - 0.4 * soft))


def table(ink: Floats, random: np.random.Generator) -> Floats:
    """The sheet ends within the picture; beside it is wood, darker and with a grain."""
    rows, columns = coordinates(ink)
    angle = random.integers(4) * np.pi / 2 + random.uniform(-0.25, 0.25)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    beside = along > max(along[ink > 0].max() + 0.05, random.uniform(0.5, 0.8))
    grain = ndimage.gaussian_filter(random.normal(size=ink.shape), (1, ink.shape[1] / 10))
    wood = random.uniform(40, 150) + random.uniform(0, 10) * grain / grain.std()
    return np.where(beside, wood, written(ink))


def sheet_on_table(ink: Floats, random: np.random.Generator) -> Floats:
    """All of a sheet, with the table around it."""
    inside = np.zeros(ink.shape, dtype=bool)
    rows, columns = np.nonzero(ink)
    inside[
        rows.min() // 4 : (rows.max() + 3 * len(ink)) // 4 + 1,
        columns.min() // 4 : (columns.max() + 3 * ink.shape[1]) // 4 + 1,
    ] = True
    return np.where(inside, written(ink), random.uniform(30, 130))


def frame(pixels: int, ground: float = 220.0, level: float = 20.0) -> Style:
    """A line along the whole border."""

    def draw(ink: Floats, random: np.random.Generator) -> Floats:
        inner = written(ink, ground)[pixels:-pixels, pixels:-pixels]
        return np.pad(inner, pixels, constant_values=level)

    return draw


def drawn_frame(ink: Floats, random: np.random.Generator) -> Floats:
    """A box near the border that goes round the digit."""
    picture = written(ink)
    near, far = 3, 5
    for rows, columns in (
        (slice(near, far), slice(near, -near)),
        (slice(-far, -near), slice(near, -near)),
        (slice(near, -near), slice(near, far)),
        (slice(near, -near), slice(-far, -near)),
    ):
        picture[rows, columns] = 60
    return picture


def ruled(ink: Floats, random: np.random.Generator) -> Floats:
    paper = np.full(ink.shape, 220.0)
    paper[5 :: len(ink) // 8] -= 40
    return written(ink, paper)


def chalk(ink: Floats, random: np.random.Generator) -> Floats:
    """Light ink on a board that is lit from one side."""
    light = ramp(ink, random)
    return 30 + 60 * light + ink * (80 + 40 * light)


def glare(ink: Floats, random: np.random.Generator) -> Floats:
    rows, columns = coordinates(ink)
    middle = random.uniform(-1, 1, 2)
    spot = np.exp(-((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2) / 0.1)
    return written(ink, 170.0) + 80 * spot


def everything(ink: Floats, random: np.random.Generator) -> Floats:
    """A table beside the sheet, and a shadow over both in light that falls off."""
    empty = np.zeros_like(ink)
    light = shadow(empty, random) / 220 * (1 - 0.3 * ramp(ink, random))
    return table(ink, random) * light


STYLES: dict[str, Style] = {
    "light falls by 40": falling_light(40),
    "light falls by 85": falling_light(85),
    "light falls by 130": falling_light(130),
    "vignette": vignette,
    "shadow": shadow,
    "fingers": fingers,
    "table": table,
    "sheet on a table": sheet_on_table,
    "frame of 1": frame(1),
    "frame of 2": frame(2),
    "frame of 3": frame(3),
    "light frame": frame(2, ground=160, level=250),
    "drawn frame": drawn_frame,
    "ruled": ruled,
    "chalk": chalk,
    "glare": glare,
    "everything": everything,
}


def photograph(style: str, digit: NDArray[np.uint8], number: int, path: Path) -> Path:
    """A photo in this style, written beside `path` with an ending of its own: noisy, PNG or JPEG.

    The same for the same style and number.
    """
    random = np.random.default_rng([*style.encode(), number])
    ink = on_sheet(digit, random, SIZES[number % len(SIZES)])
    picture = STYLES[style](ink, random) + random.normal(0, random.uniform(1, 5), ink.shape)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if number % 3:
        path = path.with_suffix(".jpg")
        image.save(path, quality=int(random.integers(50, 95)))
    else:
        path = path.with_suffix(".png")
        image.save(path)
    return path
