"""How well colours stand out: contrast as the Web Content Accessibility Guidelines define it."""

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb

LEGIBLE = 4.5
"""The least contrast of text that is easy to read (level AA)."""

Color = str | tuple[float, float, float] | tuple[float, float, float, float]
WEIGHTS = np.array([0.2126, 0.7152, 0.0722])


def linear(color: Color) -> npt.NDArray[np.float64]:
    """Red, green and blue of an sRGB colour as shares of light (IEC 61966-2-1)."""
    coded = np.array(to_rgb(color))
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def luminance(color: Color) -> float:
    """Between 0 for black and 1 for white."""
    return float(WEIGHTS @ linear(color))


def contrast(one: Color, other: Color) -> float:
    """Between 1 for equal colours and 21 for black on white."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink_on(color: Color) -> str:
    """White if it is LEGIBLE on this colour, or else black, which then is."""
    return "white" if contrast("white", color) >= LEGIBLE else "black"
