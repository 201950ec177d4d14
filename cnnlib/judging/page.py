"""The page "your stage against the ladder": one HTML file that opens without a network."""

import base64
import io
import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cnnlib.errors import UserError
from cnnlib.files import write_whole
from cnnlib.judging.record import Findings, arms
from cnnlib.judging.tools import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("page.html.j2")
COLORS = {"judged": "#c2185b", "stage": "#0072b2", "peer": "#7a7a7a"}
NAME_HEIGHT = 13.0
"""Points between the names of two marks, at least."""


NEEDED = ("jinja2", "matplotlib")


def check_libraries() -> None:
    """Raise UserError, before anything is judged, if a library that the page needs is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the page of a judgement needs {' and '.join(missing)}: pip install 'cnnlib[judge]'"
        )


def write(path: Path, findings: Findings) -> None:
    """Write the page with all that has been found so far, whole or not at all."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        findings=findings,
        ratios=ratio_rows(findings),
        times=_image(_times(findings)) if findings.timings else "",
        roofline=_image(_roofline(findings)) if findings.limits else "",
        profile=profile_rows(findings),
        counters=counter_rows(findings),
        metrics=list(METRICS.values()),
        facts=[(name, str(value)) for name, value in findings.provenance.items() if value],
    )
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def ratio_rows(findings: Findings) -> list[tuple[str, ...]]:
    """Stage, epoch in ms, and how many times as fast the judged one is."""
    rows: list[tuple[str, ...]] = []
    ratios = {ratio.other: ratio for ratio in findings.ratios}
    for arm in arms(findings):
        times = [timing.seconds for timing in findings.timings if timing.arm == arm]
        spread = f"{1e3 * min(times):.4g} to {1e3 * max(times):.4g}"
        factor = interval = ""
        if found := ratios.get(arm):
            factor = f"{found.factor:.3g}"
            interval = f"{found.low:.3g} to {found.high:.3g}" if found.low == found.low else ""
        median = f"{1e3 * statistics.median(times):.4g}"
        rows.append((str(arm), arm.role, median, spread, str(len(times)), factor, interval))
    return rows


def profile_rows(findings: Findings) -> list[tuple[str, ...]]:
    """Layers, part, kernel, launches, microseconds of a step, and share of it; longest first."""
    used = [kernel for kernel in findings.profile if kernel.launches]
    whole = sum(kernel.launches * kernel.seconds for kernel in used) or 1.0
    ordered = sorted(used, key=lambda kernel: -kernel.launches * kernel.seconds)
    return [
        (
            kernel.layers,
            kernel.part,
            kernel.kernel,
            str(kernel.launches),
            f"{1e6 * kernel.launches * kernel.seconds:.4g}",
            f"{100 * kernel.launches * kernel.seconds / whole:.1f} %",
        )
        for kernel in ordered
    ]


def counter_rows(findings: Findings) -> list[list[str]]:
    """Kernel, launches and a cell for each of METRICS."""
    return [
        [counter.kernel, str(counter.launches), *(f"{value:.4g}" for value in counter.values)]
        for counter in findings.counters
    ]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _times(findings: Findings) -> "Figure":
    """Each epoch a dot, each stage a line, the median a bar."""
    timed = arms(findings)
    figure = _figure(8.0, 0.9 + 0.6 * len(timed))
    axes = figure.subplots()
    for place, arm in enumerate(timed):
        times = [1e3 * t.seconds for t in findings.timings if t.arm == arm]
        own = arm.role == "judged"
        color = (findings.color if own else "") or COLORS[arm.role]
        axes.barh(place, statistics.median(times), height=0.55, color=color, alpha=0.35)
        axes.plot(times, [place] * len(times), "o", color=color, markersize=4)
    axes.set_yticks(range(len(timed)), [f"{arm} ({arm.role})" for arm in timed])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"milliseconds for an epoch of {findings.images} images")
    _plain(axes)
    return figure


def _roofline(findings: Findings) -> "Figure":
    """The limits as lines, the stages as marks."""
    import numpy as np

    limits = findings.limits
    assert limits is not None
    figure = _figure(8.0, 4.6)
    axes = figure.subplots()
    ridge = limits.peak / limits.bandwidth
    intensities = [point.intensity for point in findings.points]
    across = np.geomspace(min(*intensities, ridge) / 4, max(*intensities, ridge) * 4, 64)
    axes.loglog(across, [limits.attainable(each) for each in across], color="#222", linewidth=1.2)
    axes.annotate(limits.peak_of, (across[-1], limits.peak), ha="right", va="bottom")
    axes.annotate(
        limits.bandwidth_of, (across[2], limits.attainable(across[2])), ha="left", va="top"
    )
    for place, point in enumerate(findings.points):
        color = COLORS["judged" if not place else "stage"]
        axes.plot(point.intensity, point.rate, "o" if place else "D", color=color, markersize=8)
    axes.set_xlabel("least arithmetic intensity (operations per byte)")
    axes.set_ylabel("operations per second")
    _plain(axes)
    figure.draw_without_rendering()
    # stages of one network have the same intensity, so that names beside close marks would overlap
    marks = [axes.transData.transform((point.intensity, point.rate)) for point in findings.points]
    heights = apart([float(mark[1]) for mark in marks], NAME_HEIGHT * figure.dpi / 72)
    for place, point in enumerate(findings.points):
        axes.annotate(
            f"  {point.name}",
            (point.intensity, point.rate),
            xytext=(0, (heights[place] - float(marks[place][1])) * 72 / figure.dpi),
            textcoords="offset points",
            color=COLORS["judged" if not place else "stage"],
            va="center",
        )
    return figure


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights in their order, moved up where they are closer than `gap` to a lower one."""
    moved = list(heights)
    lowest = -math.inf
    for place in sorted(range(len(moved)), key=moved.__getitem__):
        moved[place] = lowest = max(moved[place], lowest + gap)
    return moved


def _plain(axes: object) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def _image(figure: "Figure") -> str:
    """The figure as SVG in base64, the same bytes for the same figure."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "judge"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return base64.b64encode(out.getvalue().encode()).decode()
