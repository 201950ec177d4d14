"""Parts that figures share: which lines go into one panel, and the sentences around them."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes

from cnnlib.measuring.runs import usual_size
from workflow.plotting import frames, layout, style, wording
from workflow.plotting.ladder import NAMES_OF_PEERS, exact_peers

FEW = 2
"""Stages, at most, that are named in a list of devices where one runs all others."""


@dataclass(frozen=True)
class Panel:
    """Lines that may be compared: one data set and network, either measured or emulated."""

    dataset: str
    network: str
    emulated: bool
    lines: pd.DataFrame

    @property
    def title(self) -> str:
        name = wording.what(self.dataset, self.network)
        return f"{name}\n({wording.EMULATED})" if self.emulated else name


def two_libraries(lines: pd.DataFrame, value: str) -> pd.DataFrame:
    """The lines without those of most libraries, so that the stages can be seen.

    Of those in float32 the ones with the least and the most of `value` are left, at the batch size
    that is usual, and those that have failed.
    """
    exact = lines[lines["stage"].isin(exact_peers()) & lines[value].notna()]
    if not len(exact):
        return lines
    at = exact[exact["batch_size"] == usual_size(exact["batch_size"])]
    order = at.groupby("stage")[value].median().sort_values(kind="stable").index
    failed: list[str] = list(lines.loc[lines["status"] != "ok", "stage"])
    gone = NAMES_OF_PEERS - {order[0], order[-1], *failed}
    return lines[~lines["stage"].isin(gone)]


def split(summary: pd.DataFrame) -> list[Panel]:
    """One panel a data set and network; emulated kernels never share one with measurements."""
    panels = []
    for (dataset, network), lines in frames.groups(summary, ["dataset", "network"]):
        emulated = lines["device_kind"] == "emulated"
        panels += [
            Panel(dataset, network, built, part)
            for built, part in ((False, lines[~emulated]), (True, lines[emulated]))
            if len(part)
        ]
    return panels


def on_a_page(parts: list[Panel], sheet: layout.Sheet) -> list[Panel]:
    """All panels, or those of the first network where there is little room."""
    if not sheet.compact:
        return parts
    first = parts[0]
    return [p for p in parts if (p.dataset, p.network) == (first.dataset, first.network)]


def by_stage(lines: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(stage, label, its lines by batch size), as on the ladder.

    The label is the stage's title, with its device where one stage ran on several. Long names are
    shortened: a label must leave room for the lines.
    """
    for stage, of_stage in frames.groups(lines, "stage"):
        devices = of_stage["device"].unique()
        for name, group in frames.groups(of_stage, "device"):
            label = wording.brief(wording.title(stage))
            if len(devices) > 1:
                label += f", {wording.brief(wording.device(name))}"
            yield stage, label, group.sort_values("batch_size")


def names(rows: pd.DataFrame) -> list[str]:
    """The labels beside the lines of all panels, without numbers."""
    return [label for panel in split(rows) for _, label, _ in by_stage(panel.lines)]


def draw_line(
    axes: Axes, group: pd.DataFrame, stage: str, value: str, low: str, high: str, emulated: bool
) -> None:
    """Medians joined by a line, bars from `low` to `high`; hollow marks where scaled.

    Peers have hollow marks too, on lines with dashes.
    """
    mark, peer = style.mark(stage), stage in NAMES_OF_PEERS
    good = group[group[value].notna()]
    axes.plot(
        good["batch_size"],
        good[value],
        color=mark.color,
        linewidth=1.6 if peer else 2,
        linestyle=style.dashes(stage, emulated),
        zorder=2.5 if peer else 3,
    )
    spread = good[good[low].notna()]
    axes.errorbar(
        spread["batch_size"],
        spread[value],
        [(spread[value] - spread[low]).clip(lower=0), (spread[high] - spread[value]).clip(lower=0)],
        fmt="none",
        ecolor=mark.color,
        elinewidth=1.3,
        capsize=3.5,
        capthick=1.3,
        zorder=2,
    )
    for scaled, part in frames.groups(good, "extrapolated", sort=True):
        axes.plot(
            part["batch_size"],
            part[value],
            linestyle="none",
            marker=mark.marker,
            markersize=8,
            markeredgecolor=mark.color,
            markeredgewidth=1.6,
            markerfacecolor="white" if scaled or peer else mark.color,
            zorder=4,
        )


def draw_failures(axes: Axes, lines: pd.DataFrame) -> list[style.Label]:
    """A strip below the panel with a cross for every line that has no result; labels that say why,
    for the panel's right edge.

    Call it when the axes' limits are set: the strip is added below them.
    """
    failed = lines[lines["status"] != "ok"]
    groups = [group for _, group in failed.groupby(["stage", "status"], sort=False)]
    if not groups:
        return []
    share = 0.03 + 0.06 * len(groups)
    low, high = axes.get_ylim()
    axes.set_ylim(low / (high / low) ** (share / (1 - share)), high)
    place = axes.get_xaxis_transform()
    axes.axhspan(axes.get_ylim()[0], low, color="white", zorder=1, linewidth=0)
    axes.axhline(low, color=style.GRID, linewidth=0.8, zorder=1)
    bottom, labels = axes.get_ylim()[0], []
    for row, group in enumerate(groups):
        stage, status = group[["stage", "status"]].iloc[0]
        color, height = style.mark(stage).color, 0.045 + 0.06 * row
        axes.plot(
            group["batch_size"],
            [height] * len(group),
            marker="x",
            markersize=7,
            markeredgewidth=2.2,
            linestyle="none",
            color=color,
            transform=place,
            zorder=5,
        )
        text = f"{wording.title(stage)} {wording.STATUS.get(status, status)}"
        at = bottom * (high / bottom) ** height
        labels.append(style.Label(lines["batch_size"].max(), at, text, color, "x", "none"))
    return labels


def first_cell(*tables: pd.DataFrame) -> tuple[str, str] | None:
    """The data set and network that come first, for figures that show one only."""
    for table in tables:
        if len(table):
            dataset, network = table[["dataset", "network"]].iloc[0]
            return dataset, network
    return None


def named(cell: tuple[str, str], table: pd.DataFrame) -> str:
    """The data set and network in words, and of how many in the table they are the first."""
    count = len(table[["dataset", "network"]].drop_duplicates())
    others = f" (the first of {count} networks and data sets measured)" if count > 1 else ""
    return wording.what(*cell) + others


def of_cell(table: pd.DataFrame, cell: tuple[str, str]) -> pd.DataFrame:
    """Rows of one data set and network."""
    return table[(table["dataset"] == cell[0]) & (table["network"] == cell[1])]


def spread_line(
    axes: Axes, group: pd.DataFrame, x: str, value: str, mark: style.Mark, emulated: bool
) -> pd.Series:
    """Medians of `value` at each `x`, joined by a line, with quartiles as bars; the medians.

    Peers are hollow, on lines with dashes.
    """
    by_x = group.groupby(x)[value]
    middle = by_x.median()
    peer = group["stage"].iloc[0] in NAMES_OF_PEERS
    axes.errorbar(
        middle.index,
        middle,
        [middle - by_x.quantile(0.25), by_x.quantile(0.75) - middle],
        color=mark.color,
        marker=mark.marker,
        markersize=8,
        linewidth=2,
        markerfacecolor="white" if peer else mark.color,
        linestyle=style.dashes(group["stage"].iloc[0], emulated),
        elinewidth=1.3,
        capsize=3.5,
    )
    return middle


def end_label(name: str, values: pd.Series, write: Callable[[float], str], size: int) -> str:
    """The label at the end of a line: its name and its value at a batch size.

    `values` by batch size; a line that has none at `size` has its last one before it, or else its
    last of all, and the label says where.
    """
    before = values[values.index <= size]
    shown = before if len(before) else values
    at = shown.index[-1]
    return f"{name}  {write(shown.iloc[-1])}" + (f" at {at}" if at != size else "")


def devices(summary: pd.DataFrame) -> str:
    """Every device, with the stages that ran on it unless these are all the others.

    `naive on AMD EPYC 7R13, 1 thread; all others on NVIDIA H100`: each device is said once.
    """
    if "status" in summary and (ran := summary["status"] != "unavailable").any():
        summary = summary[ran]
    found: dict[str, list[str]] = {}
    for (name, kind), lines in frames.groups(summary, ["device", "device_kind"]):
        built = f" ({wording.EMULATED})" if kind == "emulated" else ""
        found[f"{wording.device(name)}{built}"] = list(dict.fromkeys(lines["stage"]))
    if len(found) == 1:
        return next(iter(found))
    most = max(found, key=lambda name: len(found[name]))
    alone = sum(map(len, found.values())) == len(set(itertools.chain(*found.values())))
    if len(found[most]) > FEW and alone:
        found[most] = []
    return "; ".join(
        f"{', '.join(map(wording.said, stages)) or 'all others'} on {name}"
        for name, stages in sorted(found.items(), key=lambda entry: not entry[1])
    )


def notes(summary: pd.DataFrame) -> str:
    """A note on hollow marks and dotted lines, if there are any."""
    parts = []
    if summary["extrapolated"].any():
        scaled = dict.fromkeys(summary.loc[summary["extrapolated"], "stage"])
        stages = ", ".join(map(wording.said, scaled))
        parts.append(
            f"Hollow marks ({stages}): timed on part of an epoch and scaled to a whole one."
        )
    if summary["stage"].isin(NAMES_OF_PEERS).any():
        parts.append("Grey, with dashes: the same training by other libraries, each at its best.")
    return " ".join(parts)


def with_interval(line: pd.Series) -> str:
    """`103 min (95 %: 94.6 min to 108 min)`: the time of a line's epoch."""
    text = wording.duration(line["epoch_seconds"])
    low, high = line["epoch_seconds_low"], line["epoch_seconds_high"]
    if low != low:
        return text
    return f"{text} (95 %: {wording.duration(low)} to {wording.duration(high)})"


def count(summary: pd.DataFrame) -> str:
    """`9 epochs in 3 repeats`, as a range where lines differ."""
    whole = summary[(summary["n"] > 0) & ~summary["extrapolated"]]
    whole = whole if len(whole) else summary[summary["n"] > 0]
    if not len(whole):
        return "no epochs"
    return f"{counted(whole['n'], 'epoch')} in {counted(whole['repeats'], 'repeat')}"


def repeats(table: pd.DataFrame) -> str:
    """`5 repeats`, as a range where stages or batch sizes differ."""
    return counted(table.groupby(["stage", "batch_size"])["repeat"].nunique(), "repeat")


def counted(values: pd.Series, noun: str) -> str:
    """`1 repeat`, `2 to 5 repeats`: the least and the most of some counts."""
    low, high = values.min(), values.max()
    number = f"{low}" if low == high else f"{low} to {high}"
    return f"{number} {noun}{'' if high == 1 else 's'}"
