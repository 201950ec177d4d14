"""The figures of a lab report, drawn by Matplotlib."""

import math
from pathlib import Path

from cnnlib.errors import MissingLibrary
from cnnlib.exercises.lab_report import Report
from cnnlib.stages import LADDER


def check_libraries() -> None:
    """Raise MissingLibrary where there is no Matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingLibrary(
            "figures need Matplotlib: pip install 'cnnlib[judge]', or pass --no-figures"
        ) from None


def draw(report: Report, folder: Path, stem: str) -> list[tuple[str, str]]:
    """Draw what was measured into `folder`; (file name, caption) of each figure."""
    import matplotlib
    from matplotlib.figure import Figure

    styles = {stage.name: (stage.color, stage.marker) for stage in LADDER}
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    drawn = False
    for stage in report.stages:
        points = [(batch, report.seconds(stage, batch)) for batch in report.batches]
        points = [point for point in points if math.isfinite(point[1])]
        if not points:
            continue
        drawn = True
        color, marker = styles.get(stage, ("", "x"))
        axes.plot(
            *zip(*points, strict=True), color=color or None, marker=marker or "x", label=stage
        )
    if not drawn:
        return []
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="seconds an epoch")
    axes.set_xticks(report.batches, [str(batch) for batch in report.batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    name = f"{stem}_epochs.svg"
    with matplotlib.rc_context({"svg.hashsalt": "cnnlib"}):
        figure.savefig(folder / name, metadata={"Date": None})
    return [(name, f"Time of an epoch, {report.dataset}, {report.network}: medians")]
