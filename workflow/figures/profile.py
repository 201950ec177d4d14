"""What a training step is spent on, part by part of the network, in every stage.

There is one bar for each stage on a GPU, in microseconds on one scale, so that a quicker stage has
a shorter bar: the times of a step's kernels, each timed separately and grouped by layer and
direction, in the order of the step. The marks at the edge of a bar are a step as timed in whole
epochs. Where it lies beyond the kernels, the rest of the step is between them: launching, gathering
images, waiting. Where it lies within them, kernels that are timed singly take longer than they do
one after another, since each includes what a launch takes. So do both phases of a stage that takes
a whole epoch in one launch: they were timed as launches of their own, the update being the second.
Barriers within a kernel are not timed apart. The last stage is shown once more, enlarged. Stages on
a CPU have shares of a step that was profiled by itself, of one of several processes; "the rest" is
the loss, adding up gradients, and waiting for the slowest process.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cnnlib.measuring.runs import usual_size
from workflow.plotting import ladder, layout, panels, reasons, style, timings, wording
from workflow.plotting.layout import Drawing, Sheet

TABLES = ("kernels", "epochs")

# Okabe and Ito's colours distinguish directions; layers are named.
COLOURS = {
    "forward": "#56b4e9",
    "backward": "#d08a00",
    "update": "#009e73",
    "loss": "#d284b8",
    "the rest": "#cfc8b4",
    "input": "#b49ad2",
    "between": "#e4e4e4",
}
ORDER = ["input", "forward", "loss", "backward", "the rest", "update"]
"""The order of the parts within a step."""
BETWEEN = "between kernels"
LETTER_INCHES = 0.08
"""Room that a letter of a part's name takes in a bar."""
BAR = 0.62
"""Share of the figure's width that the longest bar takes, about."""
OVERLAP = 1.15
"""Parts that add up to more than this share of a step cannot follow each other in it."""
THIN = 0.008
"""Share up to which a part is too thin for an edge of its own."""
MARGIN = 1.16
"""Width of a panel over the longest bar: the rest is for the time that is written behind it."""
CELL = ["stage", "device", "device_kind", "batch_size"]


@dataclass(frozen=True)
class Bars:
    """The bars of one panel, at one batch size: in microseconds, or in shares of each bar."""

    title: str
    lines: pd.DataFrame
    shares: bool

    @property
    def stages(self) -> list[str]:
        return ladder.ordered(self.lines["stage"])


def draw(tables: dict[str, pd.DataFrame], sheet: Sheet) -> Drawing:
    """Panels of bars, a bar a stage, as `bars` chooses them."""
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
    shown = bars(parts, sheet)
    heights = [0.6 + 0.42 * len(panel.stages) for panel in shown]
    figure, column = pyplot.subplots(
        len(shown),
        1,
        figsize=sheet.size(12.6, 1.9 + sum(heights) + 0.3 * len(shown)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    words = layout.headline(
        figure,
        sheet,
        title(parts),
        subtitle(parts, panels.named(cell, kernels)),
        left_out=reasons.left_out(tables["epochs"], cell),
    )
    for axes, panel in zip(column.flat, shown, strict=True):
        draw_bars(axes, panel)
    seen = pd.concat([panel.lines for panel in shown]).drop_duplicates()
    drawn = {*seen["part"]} | ({"between"} if (left_over(seen) > 0).any() else set())
    present = [name for name in COLOURS if name in drawn]
    figure.legend(
        [Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in present],
        [BETWEEN if name == "between" else name for name in present],
        loc="outside lower center",
        ncols=-(-len(present) // 2) if sheet.compact else len(present),
        frameon=False,
        fontsize=9.5,
    )
    return Drawing(figure, words)


def bars(parts: pd.DataFrame, sheet: Sheet) -> list[Bars]:
    """The panels: a GPU's stages at the usual and the largest batch size, the last one enlarged at
    the usual one; then those on a CPU, and emulated ones. With little room those of one kind alone.
    """
    sizes = sorted(set(parts["batch_size"]))
    usual = usual_size(sizes)
    found: list[Bars] = []
    kinds = (("cuda", ""), ("cpu", "on the CPU: "), ("emulated", f"{wording.EMULATED}: "))
    for kind, what in kinds:
        own = parts[parts["device_kind"] == kind]
        if sheet.compact and found:
            break
        # profiles on a CPU hardly depend on the batch
        wanted = [usual] if kind == "cpu" or sheet.compact else sorted({usual, sizes[-1]})
        for size in wanted:
            lines = own[own["batch_size"] == size]
            if not len(lines):
                continue
            how = "shares of a profiled step" if kind == "cpu" else "microseconds of a step"
            found.append(Bars(f"{what}batch {size}, {how}", lines, kind == "cpu"))
            stages = ladder.ordered(lines["stage"])
            if kind == "cuda" and size == usual and len(stages) > 1:
                last = lines[lines["stage"] == stages[-1]]
                name = wording.said(stages[-1])
                found.append(Bars(f"{name} alone, batch {size}, enlarged", last, False))
    return found


def left_over(parts: pd.DataFrame) -> pd.Series:
    """Seconds of a step in which no kernel runs, of each stage and batch size on a GPU."""
    gpu = parts[parts["device_kind"] != "cpu"]
    lines = gpu.groupby(CELL, sort=False)
    return lines["step_seconds"].first() - lines["seconds"].sum()


def of_parts(kernels: pd.DataFrame) -> pd.DataFrame:
    """Seconds a step for each part of the layers: launches x seconds summed, median of repeats."""
    kernels = kernels.assign(seconds=kernels["launches"] * kernels["kernel_seconds"])
    keys = [*CELL, "layers", "part"]
    sums = kernels.groupby([*keys, "repeat"], sort=False)["seconds"].sum()
    return sums.groupby(keys, sort=False).median().reset_index()


def step_seconds(epochs: pd.DataFrame) -> pd.Series:
    """Median time of a step by CELL; for scaled runs that of the blocks that were timed."""
    good = epochs[epochs["status"] == "ok"]
    images = timings.epoch_images(good)
    times = timings.repeats(good, ["dataset", *CELL])
    found = {}
    for (dataset, *cell), own in times.items():
        count = images(dataset, cell[-1])
        # where no epoch was timed in full, the images that were timed are an epoch's
        count = count if count == count else good["images"].max()
        if own:
            found[tuple(cell)] = float(np.median(np.concatenate(own))) * cell[-1] / count
    index = pd.MultiIndex.from_tuples(list(found), names=CELL) if found else None
    empty = pd.MultiIndex.from_arrays([[], [], [], []], names=CELL)
    return pd.Series(found.values(), index if found else empty, float, "step_seconds")


def draw_bars(axes: Axes, panel: Bars) -> None:
    """One bar a stage; parts in the order of the step, the large ones named."""
    stages = panel.stages
    scale = 1.0 if panel.shares else 1e6
    totals = panel.lines.groupby("stage")["seconds"].sum()
    steps = panel.lines.groupby("stage")["step_seconds"].first()
    ends = pd.concat([totals, steps], axis=1).max(axis=1)
    longest = 1.0 if panel.shares else scale * float(ends.max())
    axes.set_xlim(0, longest * MARGIN)
    axes.set_ylim(len(stages) - 0.45, -0.55)
    axes.grid(False)
    axes.set_yticks(range(len(stages)), [wording.title(stage) for stage in stages], fontsize=10.5)
    axes.tick_params(axis="y", labelcolor=style.INK)
    axes.set_title(panel.title, fontsize=11, loc="left", color=style.INK)
    if panel.shares:
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %" if value <= 1 else "")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g} µs")
    for row, stage in enumerate(stages):
        group = panel.lines[panel.lines["stage"] == stage]
        group = group.sort_values("part", key=place_in_step, kind="stable")
        step = float(steps[stage])
        # Stage 1 is profiled on fewer images than a batch has: there the shares are of the parts.
        unit = 1 / float(totals[stage]) if panel.shares else scale
        at = 0.0
        for _, part in group.iterrows():
            width = part["seconds"] * unit
            colour = COLOURS.get(part["part"], "#a6761d")
            draw_part(axes, row, at, width, name_of(part), colour, longest)
            at += width
        end = at
        if not panel.shares and step == step:
            end = max(at, step * unit)
            if step * unit > at:
                draw_part(axes, row, at, step * unit - at, BETWEEN, COLOURS["between"], longest)
            for side in (-1, 1):  # not across the bar, where names are
                edges = [row + 0.36 * side, row + 0.5 * side]
                axes.plot([step * unit] * 2, edges, color=style.INK, linewidth=2.6)
        if step == step:
            axes.annotate(
                f"{wording.duration(step)} a step",
                (end, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
                annotation_clip=False,
            )


def place_in_step(parts: pd.Series) -> pd.Series:
    """Numbers in the order of a step; what is not known comes last."""
    return parts.map({name: i for i, name in enumerate(ORDER)}).fillna(len(ORDER))


def draw_part(
    axes: Axes, row: int, at: float, width: float, name: str, colour: str, longest: float
) -> None:
    """One piece of a bar, named if there is room in a panel whose longest bar has this length."""
    # An edge would cover the whole of a very small piece.
    edge = 0.8 if width > THIN * longest else 0
    axes.barh(row, width, left=at, height=0.72, color=colour, edgecolor="white", linewidth=edge)
    inches = axes.figure.bbox.width / axes.figure.dpi * BAR / longest
    if width * inches > LETTER_INCHES * (len(name) + 1):
        axes.annotate(
            name, (at + width / 2, row), ha="center", va="center", fontsize=8.5, color=style.INK
        )


def name_of(part: pd.Series) -> str:
    """conv1: the first of the layers that a kernel serves; or the part, if there is no layer."""
    first = str(part["layers"]).partition("+")[0]
    return str(part["part"]) if first == "batch" else first


def title(parts: pd.DataFrame) -> str:
    """A step of the last stage against the stage before, and the part of it that takes longest.

    At the usual batch size, on a GPU, or else on a CPU, or else emulated. Where parts go on at the
    same time, none is said to take longest: what each takes alone is not what it adds to a step.
    """
    large = parts[parts["batch_size"] == usual_size(parts["batch_size"])]
    kind = next((k for k in ("cuda", "cpu", "emulated") if k in set(large["device_kind"])), None)
    large = large[large["device_kind"] == kind]
    stages = ladder.ordered(large["stage"])
    group = large[large["stage"] == stages[-1]]
    longest = f"{whole_name(group.nlargest(1, 'seconds').iloc[0])} takes longest"
    built = f" ({wording.EMULATED})" if kind == "emulated" else ""
    place = f"a step of {wording.said(stages[-1])} at batch {large['batch_size'].iloc[0]}{built}"
    step = group["step_seconds"].iloc[0]
    if kind != "cuda" or step != step:
        return f"In {place} {longest}"
    text = f"{place[0].upper()}{place[1:]} takes {wording.duration(step)}"
    if len(stages) > 1:
        before = large.loc[large["stage"] == stages[-2], "step_seconds"].iloc[0]
        if before == before:
            text += f", of {wording.said(stages[-2])} {wording.duration(before)}"
    return text if group["seconds"].sum() > OVERLAP * step else f"{text}; {longest}"


def whole_name(part: pd.Series) -> str:
    """`conv1 backward`; of what belongs to no layer the part alone."""
    name = name_of(part)
    return name if name == part["part"] else f"{name} {part['part']}"


def subtitle(parts: pd.DataFrame, what: str) -> str:
    """Network, devices; what is counted, and how."""
    return (
        f"{what}; {panels.devices(parts)}\n"
        "kernels timed one by one, medians over the repeats; marks: a step as timed in whole epochs"
        ", in which parts may overlap"
    )
