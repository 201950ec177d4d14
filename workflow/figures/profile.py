"""What a training step is spent on, part by part of the network, in every stage.

There is one bar for each stage and batch size: the times of a step's kernels, each timed separately
and grouped by layer and direction, as shares of the step as timed in whole epochs. No kernel is
timed as shorter than a launch takes (some 4 µs), so bars of small batches show mostly launches. The
remainder of a step is not a kernel: gathering images, waiting. On a CPU the shares are those of a
step profiled separately, with its images gathered before. Operators are timed in one of several
processes, and "the rest" is the loss, adding up gradients, and waiting for the slowest process.
"""

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cnnlib.measuring.runs import usual_size
from workflow.plotting import ladder, layout, panels, reasons, style, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("kernels", "epochs")

# Okabe and Ito's colours distinguish directions; layers are named.
COLOURS = {
    "forward": "#56b4e9",
    "backward": "#d08a00",
    "update": "#009e73",
    "loss": "#c264a0",
    "the rest": "#d9a9c9",
    "input": "#8c6bb1",
    "no kernel": "#e4e4e4",
}
ORDER = ["input", "forward", "loss", "backward", "the rest", "update"]
"""The order of the parts within a step."""
LETTER_INCHES = 0.08
"""Room that a letter of a part's name takes in a bar."""
BAR = 0.7
"""Share of the figure's width that a whole bar takes, about."""
THIN = 0.008
"""Share up to which a part is too thin for an edge of its own."""
CELL = ["stage", "device", "device_kind", "batch_size"]


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """A panel for each of up to three batch sizes, a bar a stage; emulated kernels apart."""
    kernels = tables["kernels"]
    kernels = kernels[(kernels["status"] == "ok") & (kernels["launches"] > 0)]
    kernels = kernels[kernels["kernel_seconds"] > 0]
    # Engines on a CPU count as the loss all that is no operator.
    rest = (kernels["device_kind"] == "cpu") & (kernels["part"] == "loss")
    kernels = kernels.assign(part=kernels["part"].mask(rest, "the rest"))
    cell = panels.first_cell(kernels)
    if cell is None:
        return layout.nothing(
            sheet,
            "No profile was taken",
            "There are no kernels in the table.",
            reasons.left_out(tables["epochs"]),
        )
    parts = of_parts(panels.of_cell(kernels, cell))
    parts = parts.join(step_seconds(panels.of_cell(tables["epochs"], cell)), on=CELL)
    sizes = sorted(set(parts["batch_size"]))
    sizes = sorted({*([] if sheet.compact else sizes[:1]), usual_size(sizes), sizes[-1]})
    stages = ladder.ordered(parts["stage"])
    emulated = parts["device_kind"] == "emulated"
    places = [
        (lines, built) for built, lines in ((False, parts[~emulated]), (True, parts[emulated]))
    ]
    shown = [
        (size, built, lines, ladder.ordered(lines["stage"]))
        for lines, built in places
        for size in sizes
        if len(lines)
    ]
    heights = [0.55 + 0.42 * len(rows) for *_, rows in shown]
    figure, column = pyplot.subplots(
        len(shown),
        1,
        figsize=sheet.size(12.6, 1.9 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
        sharex=True,
    )
    words = layout.headline(
        figure,
        sheet,
        title(parts, sizes, stages),
        subtitle(parts, panels.named(cell, kernels)),
        left_out=reasons.left_out(tables["epochs"], cell),
    )
    for axes, (size, built, lines, rows) in zip(column.flat, shown, strict=True):
        draw_bars(axes, lines[lines["batch_size"] == size], rows)
        note = f" ({wording.EMULATED})" if built else ""
        axes.set_title(f"batch {size}{note}", fontsize=11, loc="left", color=style.INK)
    last = column.flat[-1]
    last.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    last.set_xlabel("share of a training step")
    present = [name for name in COLOURS if name in {*parts["part"], "no kernel"}]
    figure.legend(
        [Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in present],
        present,
        loc="outside right upper",
        frameon=False,
        fontsize=9.5,
    )
    return Drawing(figure, words)


def of_parts(kernels: pd.DataFrame) -> pd.DataFrame:
    """Seconds a step for each part of the layers: launches x seconds summed, median of repeats."""
    kernels = kernels.assign(seconds=kernels["launches"] * kernels["kernel_seconds"])
    keys = [*CELL, "layers", "part"]
    sums = kernels.groupby([*keys, "repeat"], sort=False)["seconds"].sum()
    return sums.groupby(keys, sort=False).median().reset_index()


def step_seconds(epochs: pd.DataFrame) -> pd.Series:
    """Median time of a step by CELL; for scaled runs that of the blocks that were timed."""
    good = epochs[epochs["status"] == "ok"]
    whole = good.loc[~good["extrapolated"]].groupby("batch_size")["images"].max()
    images = good["batch_size"].map(whole).fillna(good["images"].max())
    seconds = good["epoch_seconds"] * good["batch_size"] / images
    return seconds.groupby([good[name] for name in CELL]).median().rename("step_seconds")


def draw_bars(axes: Axes, parts: pd.DataFrame, stages: list[str]) -> None:
    """One bar a stage; parts in the order of the step, the large ones named."""
    axes.set_xlim(0, 1)
    axes.set_ylim(len(stages) - 0.45, -0.55)
    axes.grid(False)
    axes.set_yticks(range(len(stages)), [wording.title(stage) for stage in stages], fontsize=10)
    for label, stage in zip(axes.get_yticklabels(), stages, strict=True):
        label.set_color(style.mark(stage).color)
        label.set_fontweight("bold")
    for row, stage in enumerate(stages):
        group = parts[parts["stage"] == stage]
        if not len(group):
            axes.annotate("not measured", (0.01, row), va="center", fontsize=9, color=style.QUIET)
            continue
        # Stage 1 is profiled on fewer images than a batch has: there the shares are of the parts.
        group = group.sort_values("part", key=place_in_step, kind="stable")
        total, step = group["seconds"].sum(), group["step_seconds"].iloc[0]
        whole = max(total, step) if group["device_kind"].iloc[0] != "cpu" else total
        at = 0.0
        for _, part in group.iterrows():
            width = part["seconds"] / whole
            draw_part(axes, row, at, width, name_of(part), COLOURS.get(part["part"], "#a6761d"))
            at += width
        if at < 0.999:
            draw_part(axes, row, at, 1 - at, "no kernel", COLOURS["no kernel"])
        if step == step:
            axes.annotate(
                wording.duration(step),
                (1, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
                annotation_clip=False,
            )


def place_in_step(parts: pd.Series) -> pd.Series:
    """Numbers in the order of a step; what is not known comes last."""
    return parts.map({name: i for i, name in enumerate(ORDER)}).fillna(len(ORDER))


def draw_part(axes: Axes, row: int, at: float, width: float, name: str, colour: str) -> None:
    """One piece of a bar, named if there is room."""
    # An edge would cover the whole of a very small piece.
    edge = 0.8 if width > THIN else 0
    axes.barh(row, width, left=at, height=0.72, color=colour, edgecolor="white", linewidth=edge)
    inches = axes.figure.bbox.width / axes.figure.dpi
    if width * inches * BAR > LETTER_INCHES * (len(name) + 1):
        axes.annotate(name, (at + width / 2, row), ha="center", va="center", fontsize=8.5)


def name_of(part: pd.Series) -> str:
    """conv1: the first of the layers that a kernel serves; or the part, if there is no layer."""
    first = str(part["layers"]).partition("+")[0]
    return str(part["part"]) if first == "batch" else first


def title(parts: pd.DataFrame, sizes: list[int], stages: list[str]) -> str:
    """The part that takes longest in the last stage at the largest batch, in one sentence.

    The stage ran on a GPU, or else on a CPU, or else emulated. On a GPU the sentence also says how
    much of a step kernels fill.
    """
    large = parts[parts["batch_size"] == sizes[-1]]
    kind = next((k for k in ("cuda", "cpu", "emulated") if k in set(large["device_kind"])), None)
    large = large[large["device_kind"] == kind]
    stage = next(stage for stage in reversed(stages) if stage in set(large["stage"]))
    group = large[large["stage"] == stage]
    largest = group.nlargest(1, "seconds").iloc[0]
    place = f"a step of {stage} at batch {sizes[-1]}"
    longest = f"{whole_name(largest)} takes longest"
    share = group["seconds"].sum() / group["step_seconds"].iloc[0]
    if kind != "cuda" or share != share:
        built = f" ({wording.EMULATED})" if kind == "emulated" else ""
        return f"In {place}{built} {longest}"
    return f"Kernels fill {100 * min(1.0, share):.0f} % of {place}; {longest}"


def whole_name(part: pd.Series) -> str:
    """`conv1 backward`; of what belongs to no layer the part alone."""
    name = name_of(part)
    return name if name == part["part"] else f"{name} {part['part']}"


def subtitle(parts: pd.DataFrame, what: str) -> str:
    """Network, devices; what is counted, and how."""
    return (
        f"{what}; {panels.devices(parts)}\n"
        "kernels timed one by one, medians over the repeats; at the right: the time of a step"
    )
