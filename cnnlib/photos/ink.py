"""Finds the ink on a picture, without paper, uneven light, shadows, frames or the table.

The paper is estimated by a grey-scale closing, which fills everything that is dark and narrower
than a window, and changes nothing else. Strokes are narrow. Light that falls off, a vignette, a
hand's shadow and the table beside the sheet are wide, and so is a frame along the border, since the
picture is continued outwards by its outermost pixels. What the closing fills is therefore ink.
The width of the strokes is unknown, and so is whether they are darker or lighter than the paper.
Several windows are tried with both, and the connected piece that looks most like strokes wins.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from cnnlib.arithmetic import ceil_div

Grey = NDArray[np.float32]
Mask = NDArray[np.bool_]

LEAST_CONTRAST = 16.0
"""Grey levels between paper and ink, below which a picture is taken to be empty."""
NOISE = 5.0
"""Least distance of ink from the paper, in standard deviations of the picture's noise."""
COARSE_SIDE = 256
"""Pixels a side of the smaller picture in which strokes are searched."""
WINDOWS = (0.08, 0.14, 0.25, 0.45)
"""Sides of the closing's window, as shares of the picture's longer side."""
LEAST_WINDOW = 7
"""Least side of the window in pixels. Strokes of MNIST's own small images are up to six pixels wide
with their soft edges."""
WIDER = 1.1
"""Factor by which the score of each larger window is reduced: large ones follow shadows badly."""
CORE = 0.35
"""Least share of a stroke's contrast that its pixels have; less is a shadow or a ruled line."""
REACH = 0.4
"""Largest distance of paper from the edge of a stroke's dark core, in widths of the stroke."""
FAINT = 0.15
"""Share of a stroke's contrast below which ink near it is paper."""
DEEPEST_SHADOW = 0.25
"""Share of the brightest paper; on paper darker than that, contrasts are scaled up no further."""
LEAST_QUALITY = 0.25
"""Quality below which pieces are no strokes. Nearly all digits on photos are above 0.9."""
LEAST_LENGTH = 0.025
"""Least length of a piece, as a share of the picture's longer side; smaller ones are specks."""
MOST_PIECES = 16
"""Largest number of connected pieces that are examined, the largest ones first."""
EIGHT = np.ones((3, 3), dtype=bool)
"""The neighbourhood in which pixels are connected, also by a corner."""


class Found(NamedTuple):
    """One way to see ink on the coarse picture."""

    score: float
    """How much it looks like strokes of a pen; the larger, the better."""
    mask: Mask
    contrast: float
    paper: Grey


class View(NamedTuple):
    """A coarse picture with the paper as one window's closing estimates it."""

    coarse: Grey
    paper: Grey
    gain: Grey
    depth: Grey
    """How far the picture is below the paper, in even light."""
    window: int


class Piece(NamedTuple):
    """A connected piece of what may be ink, and its box."""

    score: float
    label: int
    contrast: float
    quality: float
    """How much it looks like strokes of a pen, 0 to 1."""
    top: int
    bottom: int
    left: int
    right: int

    @property
    def length(self) -> int:
        """The longer side of its box."""
        return max(self.bottom - self.top, self.right - self.left)

    def around(self, margin: int) -> tuple[slice, slice]:
        """The picture's part with its box in the middle."""
        return (
            slice(max(0, self.top - margin), self.bottom + margin),
            slice(max(0, self.left - margin), self.right + margin),
        )

    def contains(self, other: "Piece") -> bool:
        """Whether the other's box lies within this one's and does not touch it."""
        return (
            self.top < other.top
            and other.bottom < self.bottom
            and self.left < other.left
            and other.right < self.right
        )

    def gap(self, other: "Piece") -> int:
        """Pixels between the two boxes, along the axis where they are farther apart."""
        return max(
            self.top - other.bottom,
            other.top - self.bottom,
            self.left - other.right,
            other.left - self.right,
            0,
        )


def find_ink(grey: Grey, opacity: Grey) -> Grey | None:
    """How much ink each pixel holds, 0 for none, cut to the box of the writing.

    `grey` is the brightness, 0 to 255, and `opacity` is 0 to 1. None when there is no ink.
    """
    picture = on_paper(grey, opacity)
    if picture is None:
        return None
    factor = ceil_div(max(picture.shape), COARSE_SIDE)
    best: tuple[float, Grey] | None = None
    for light in (False, True):
        # Light ink on dark paper is dark ink on light paper in the negative.
        seen = 255 - picture if light else picture
        coarse = np.asarray(Image.fromarray(seen).reduce(factor))
        found = max(candidates(coarse, light), key=lambda one: one.score, default=None)
        if found is not None and (best is None or found.score > best[0]):
            best = found.score, _in_full(seen, found, factor, light)
    if best is None or not best[1].any():
        return None
    ink = best[1]
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def on_paper(grey: Grey, opacity: Grey) -> Grey | None:
    """The picture on paper that shows where it is transparent; None if it is so everywhere.

    The paper is like the border's opaque part or, where most of the border is transparent, black or
    white, whichever the opaque pixels are farther from.
    """
    if opacity.min() == 1:
        return grey
    border = np.ones(grey.shape, dtype=bool)
    border[1:-1, 1:-1] = False
    if np.median(opacity[border]) < 0.5:
        weight = float(opacity.sum())
        if not weight:
            return None
        paper = 255.0 if float((grey * opacity).sum()) / weight < 127.5 else 0.0
    else:
        paper = float(np.median(grey[border & (opacity >= 0.5)]))
    laid: Grey = grey * opacity + np.float32(paper) * (1 - opacity)
    return laid


def candidates(coarse: Grey, light: bool) -> Iterator[Found]:
    """Candidates for dark writing, as found by windows of growing size."""
    noise = noise_level(coarse)
    if min(coarse.shape) > COARSE_SIDE // 4:
        coarse = ndimage.gaussian_filter(coarse, 0.8, mode="nearest")
    windows = {max(LEAST_WINDOW, round(share * max(coarse.shape))) for share in WINDOWS}
    for order, window in enumerate(sorted(windows)):
        paper = closing(coarse, window)
        gain = even_light(paper, light)
        depth = np.asarray((paper - coarse) * gain, np.float32)
        least = np.maximum(LEAST_CONTRAST, np.float32(NOISE * noise) * gain)
        pieces = find_pieces(View(coarse, paper, gain, depth, window), least)
        if pieces is None:
            continue
        main, mask = pieces
        if main.quality < LEAST_QUALITY:
            continue
        score = main.score * WIDER**-order
        # Most of the surroundings is paper; light gaps between dark strokes are no writing.
        usual = float(np.median(coarse[main.around(main.length)]))
        level = float(np.median(paper[mask]))
        if abs(usual - level) > abs(usual - float(np.median(coarse[mask]))):
            score *= 0.6
        yield Found(score, mask, main.contrast, paper)


def closing(picture: Grey, window: int) -> Grey:
    """The picture without what is dark and narrower than `window`, continued over its border."""
    padded = np.pad(picture, window, mode="edge")
    closed = ndimage.grey_closing(padded, size=(window, window), mode="nearest")
    inner: Grey = closed[window:-window, window:-window]
    return inner


def even_light(paper: Grey, light: bool) -> Grey:
    """Factors that bring the contrast of ink to what it would be on the brightest paper.

    Ink reflects a share of the light that falls on it, so its contrast fades in the shade. In
    negatives, where the paper is black, it does not.
    """
    if light:
        return np.ones_like(paper)
    bright = max(1.0, float(np.quantile(paper, 0.98)))
    gain: Grey = (bright / np.maximum(paper, DEEPEST_SHADOW * bright)).astype(np.float32)
    return gain


def noise_level(picture: Grey) -> float:
    """The standard deviation of the noise, from second differences.

    The lower quarter of them is used: in small pictures most of the others come from strokes, and
    in very small ones all of them do.
    """
    if min(picture.shape) < 12:
        return 0.0
    around = picture[:-2, 1:-1] + picture[2:, 1:-1] + picture[1:-1, :-2] + picture[1:-1, 2:]
    differences = np.abs(4 * picture[1:-1, 1:-1] - around)
    # 0.3186 is this quantile of a standard normal variable's magnitude. The variance is 16 times
    # that of a pixel for the middle, and once for each of the four around it.
    return float(np.quantile(differences, 0.25)) / 0.3186 / 20**0.5


def find_pieces(view: View, least: Grey) -> tuple[Piece, Mask] | None:
    """The piece that looks most like strokes, and the mask of all pieces that belong to it."""
    first = _pieces(view, *_labelled(view.depth > least))
    if not first:
        return None
    # Pixels much fainter than the strokes, which may connect them with other things, are left out.
    labels, boxes = _labelled(view.depth > np.maximum(least, CORE * max(first).contrast))
    pieces = _pieces(view, labels, boxes)
    if not pieces:
        return None
    main = max(pieces)
    mask = labels == main.label
    area = int(mask.sum())
    # Digits are often written in two strokes that do not touch. Pieces that look like strokes, near
    # the first one, not much smaller and about as dark, belong to it.
    for piece in pieces:
        if (
            main.gap(piece) < 0.2 * max(main.length, piece.length)
            and piece.length > 0.15 * main.length
            and piece.contrast > 0.6 * main.contrast
            and piece.quality > 0.3 * main.quality
        ):
            part = labels == piece.label
            if part.sum() > 0.03 * area:
                mask |= part
    return main, mask


def _labelled(mask: Mask) -> tuple[NDArray[np.int32], list[tuple[int, tuple[slice, slice]]]]:
    """Connected pieces by number, and numbers and boxes of the largest ones."""
    labels, _ = ndimage.label(mask, EIGHT)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = np.argsort(-sizes, kind="stable")[:MOST_PIECES]
    boxes = ndimage.find_objects(labels)
    return labels, [(int(label), boxes[label - 1]) for label in largest if sizes[label] > 3]


def _pieces(
    view: View, labels: NDArray[np.int32], boxes: list[tuple[int, tuple[slice, slice]]]
) -> list[Piece]:
    """The pieces with their scores, without frames that are drawn around other pieces."""
    found: list[Piece] = []
    frames: list[Piece] = []
    for label, box in boxes:
        part = labels[box] == label
        if max(part.shape) < LEAST_LENGTH * max(labels.shape):
            continue
        contrast = float(np.percentile(view.depth[box][part], 90))
        quality = likeness(view, part, box, contrast)
        score = contrast * max(part.shape) ** 0.5 * quality
        (top, bottom), (left, right) = ((side.start, side.stop) for side in box)
        piece = Piece(score, label, contrast, quality, top, bottom, left, right)
        (frames if is_frame(part) else found).append(piece)
    for frame in frames:
        around = any(
            frame.contains(one)
            and one.length > 0.08 * frame.length
            and one.contrast > 0.5 * frame.contrast
            for one in found + frames
        )
        if not around:  # the frame may be a square zero
            found.append(frame)
    return found


def likeness(view: View, part: Mask, box: tuple[slice, slice], contrast: float) -> float:
    """How much a piece looks like strokes of a pen, 0 to 1."""
    depth = view.depth[box]
    own = depth[part]
    core = np.pad(part & (depth > 0.5 * contrast), 1)
    width = 2 * float(ndimage.distance_transform_edt(core).max()) - 1
    edge = (core & ~ndimage.binary_erosion(core))[1:-1, 1:-1]
    cut_off = 0.0
    for axis in (0, 1):
        for at, border in (
            (0, box[axis].start == 0),
            (-1, box[axis].stop == view.depth.shape[axis]),
        ):
            if border:
                cut_off += float(part.take(at, axis).mean())
                np.moveaxis(edge, axis, 0)[at] = False
    qualities = (
        # Strokes are slender.
        (0.6 - width / max(part.shape)) / 0.25,
        # They leave much of a square around them empty; a sheet of paper does not.
        (0.8 - float(part.sum()) / max(part.shape) ** 2) / 0.2,
        # Those that fill the window may be wider than what is seen of them.
        (1 - width / view.window) / 0.2,
        # All along their edge the picture itself changes, not only the estimate of the paper.
        (_share_of_steps(view, edge, box, reach=max(2, round(REACH * width))) - 0.5) / 0.4,
        # Their edges are sharp, unlike those of shadows.
        float((own > 0.65 * contrast).sum() / (own > 0.35 * contrast).sum()) / 0.5,
    )
    return float(np.prod(np.clip(qualities, 0.02, 1))) / (1 + cut_off)


def _share_of_steps(view: View, edge: Mask, box: tuple[slice, slice], reach: int) -> float:
    """The share of an edge's pixels that have much brighter paper within `reach`."""
    if not edge.any():
        return 0.0
    grown = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in box)
    brightest = ndimage.maximum_filter(view.coarse[grown], 2 * reach + 1, mode="nearest")
    inner = tuple(
        slice(side.start - outer.start, side.stop - outer.start)
        for side, outer in zip(box, grown, strict=True)
    )
    step = (brightest[inner] - view.coarse[box]) * view.gain[box]
    return float((step[edge] > 0.5 * view.depth[box][edge]).mean())


def is_frame(part: Mask) -> bool:
    """Whether a piece covers most of each of the four sides of its box."""
    height, width = (max(1, length // 15) for length in part.shape)
    covered = (
        part[:height].any(axis=0),
        part[-height:].any(axis=0),
        part[:, :width].any(axis=1),
        part[:, -width:].any(axis=1),
    )
    return bool(min(side.mean() for side in covered) > 0.8)


def _in_full(picture: Grey, found: Found, factor: int, light: bool) -> Grey:
    """The ink that was found on the coarse picture, at full resolution."""
    height, width = picture.shape
    paper = np.asarray(
        Image.fromarray(found.paper).resize(
            (width, height), Image.Resampling.BILINEAR, box=(0, 0, width / factor, height / factor)
        )
    )
    near = ndimage.binary_dilation(found.mask, EIGHT, iterations=2)
    near = near.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width]
    ink: Grey = (paper - picture) * even_light(paper, light)
    ink[~near | (ink < FAINT * found.contrast)] = 0
    strongest = np.percentile(ink[ink > 0], 98) if ink.any() else 0
    return np.minimum(ink, np.float32(strongest))
