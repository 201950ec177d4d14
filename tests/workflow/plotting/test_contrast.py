"""Colours can be told from each other by colour-blind readers and in grey, and text can be read.

Deuteranopia, the commonest kind, is simulated by the matrix of Machado, Oliveira and Fernandes, "A
Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, for a severity of 1.
"""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import colormaps, colors

from cnnlib.peers import PEERS
from cnnlib.stages import LADDER
from workflow.figures import energy, profile
from workflow.plotting import recognition, shading, style
from workflow.plotting.contrast import LEGIBLE, Color, contrast, ink_on, linear

pytestmark = pytest.mark.quick

DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.95047, 1.0, 1.08883])
APART = 25.0
"""Distance in CIELAB of what is compared with each other; 2 is just noticeable side by side."""
STEP = 9.0
"""Difference of lightness in CIELAB, of 0 to 100, that is seen in grey between thin lines."""
VISIBLE = 3.0
"""The least contrast of a line or mark with its ground (WCAG 2.1, 1.4.11)."""
COMPARED = ("fused", "ring", "tuned", "torch")


def lab(color: Color, seen: npt.NDArray[np.float64] | None = None) -> npt.NDArray[np.float64]:
    """CIELAB of a colour, as it is or as eyes that `seen` describes see it."""
    light = linear(color) if seen is None else np.clip(seen @ linear(color), 0, 1)
    ratio = TO_XYZ @ light / WHITE
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("pair", [*itertools.combinations(COMPARED, 2)], ids="-".join)
def test_what_is_compared_stays_apart(pair: tuple[str, str]) -> None:
    one, other = (style.mark(stage).color for stage in pair)
    for seen in (None, DEUTERANOPIA):
        assert np.linalg.norm(lab(one, seen) - lab(other, seen)) >= APART
    assert abs(lab(one)[0] - lab(other)[0]) >= STEP


def test_the_simulation_confuses_what_colour_blind_readers_confuse() -> None:
    """The colours that were here before: orange and green of the same lightness."""
    before, after = "#d55e00", "#009e73"
    assert np.linalg.norm(lab(before) - lab(after)) > 90
    red, green = "#c04040", "#5f7a20"
    assert np.linalg.norm(lab(red, DEUTERANOPIA) - lab(green, DEUTERANOPIA)) < APART


def test_all_stages_can_be_seen_and_libraries_differ_by_their_dashes() -> None:
    for stage in (*LADDER, *PEERS):
        assert contrast(style.mark(stage.name).color, "white") >= VISIBLE, stage.name
    assert {style.mark(peer.name).color for peer in PEERS} == {style.mark("torch").color}
    red, green, blue = colors.to_rgb(style.mark("torch").color)
    assert red == green == blue
    dashes = [style.dashes(peer.name) for peer in PEERS]
    assert len(set(dashes)) == len({style.mark(peer.name).marker for peer in PEERS}) == len(PEERS)
    assert all(style.dashes(stage.name) == "-" for stage in LADDER)


def test_all_text_can_be_read() -> None:
    for text in (style.INK, style.QUIET):
        for ground in ("white", shading.SHADE, style.GRID, energy.WAITING):
            assert contrast(text, ground) >= LEGIBLE, (text, ground)
    for name, ground in profile.COLOURS.items():
        assert contrast(style.INK, ground) >= LEGIBLE, name
    for shades in (*recognition.SHADES.values(), colormaps["gray"]):
        for depth in np.linspace(0, 1, 101):
            assert contrast(ink_on(shades(depth)), shades(depth)) >= LEGIBLE
