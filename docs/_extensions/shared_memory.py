"""The directive `{shared-memory-map}`: what a block of stage tuned has in its shared memory.

    ```{shared-memory-map} 64
    ```

The regions for LeNet-5 at this batch size on an H100 come from the stage's own layout when the
page is built: a drawing to scale, and a table.
"""

import re
from html import escape
from typing import NamedTuple

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cnnlib.config import load_config
from cnnlib.device.architecture import H100
from cnnlib.engine import Setup
from cnnlib.network import FLOAT
from cnnlib.paths import ROOT
from cnnlib.stages import tuned
from cnnlib.stages.tuned.layout import SharedLayout

PHASES = {
    "images": "phase 1, images",
    "gradient": "phase 1, gradient",
    "update": "phase 2, update",
}
"""Phases of a step as layouts name them, and what they are called here."""
COLORS = {
    "weights": "#9ecae1",
    "maps": "#a1d99b",
    "errors": "#fdae6b",
    "gradient": "#bcbddc",
    "scratch": "#d9d9d9",
    "pipelines": "#fdd0a2",
    "others": "#f7b6d2",
}
WIDTH, BAR, GAP, LEFT = 760, 30, 26, 130
"""Of the drawing: its width, and of a bar its height, what separates it, and where it begins."""
NAMED = 0.05
"""A share of the memory that has room for a name in the drawing."""


class Part(NamedTuple):
    """Neighbouring regions of one kind."""

    name: str
    kind: str
    start: int
    bytes: int


def layout_for(batch_size: int) -> SharedLayout:
    """The layout of LeNet-5's blocks on an H100."""
    config = load_config([ROOT / "config.yaml"])
    network = config.network("lenet5", "mnist", "sweep.networks")
    setup = Setup(network, batch_size, learning_rate=0.1)
    return tuned.PersistentEngine.plan_on(tuned.PERSISTENT, setup, H100.limits).layout


def kind_of(name: str) -> str:
    """The key of COLORS for a region's name."""
    for word, kind in (
        ("weights", "weights"),
        ("gradient", "gradient"),
        ("errors", "errors"),
        ("map ", "maps"),
        ("winners", "maps"),
        ("scratch", "scratch"),
        ("pipelines", "pipelines"),
    ):
        if word in name:
            return kind
    return "others"


def parts(layout: SharedLayout, phase: str) -> list[Part]:
    """The regions of a phase in order; neighbouring maps are one part, and so are errors."""
    found: list[Part] = []
    regions = [r for r in layout.regions if r.phase == phase and r.floats]
    for region in sorted(regions, key=lambda region: region.offset):
        kind = kind_of(region.name)
        start, size = region.offset * FLOAT, region.floats * FLOAT
        name = kind if kind in ("maps", "errors") else region.name
        if found and found[-1].kind == kind and found[-1].name == name:
            last = found.pop()
            found.append(Part(name, kind, last.start, start + size - last.start))
        else:
            found.append(Part(name, kind, start, size))
    return found


def drawing(layout: SharedLayout) -> str:
    """An SVG with a bar for each phase, to scale."""
    scale = (WIDTH - LEFT - 30) / H100.shared_bytes
    height = len(PHASES) * (BAR + GAP) + 24
    lines = [
        f'<svg viewBox="0 0 {WIDTH} {height}" width="100%" role="img" '
        'aria-label="Shared memory of a block, to scale" font-family="sans-serif" font-size="11">'
    ]
    for row, (phase, title) in enumerate(PHASES.items()):
        top = row * (BAR + GAP) + 4
        lines.append(
            f'<text x="0" y="{top + BAR / 2 + 4}" fill="currentColor">{escape(title)}</text>'
            f'<rect x="{LEFT}" y="{top}" width="{H100.shared_bytes * scale:.1f}" height="{BAR}" '
            'fill="none" stroke="currentColor" stroke-width="0.6"/>'
        )
        for part in parts(layout, phase):
            left, width = LEFT + part.start * scale, part.bytes * scale
            lines.append(
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" '
                f'fill="{COLORS[part.kind]}" stroke="#555" stroke-width="0.4">'
                f"<title>{escape(part.name)}: {part.bytes:,} bytes</title></rect>"
            )
            if part.bytes > NAMED * H100.shared_bytes:
                short = re.sub(r" (weights|gradient|of the update)$", "", part.name)
                lines.append(
                    f'<text x="{left + 4:.1f}" y="{top + BAR / 2 + 4}" fill="#222">'
                    f"{escape(short)}</text>"
                )
    bottom = height - 6
    for kib in range(0, H100.shared_bytes // 1024 + 1, 32):
        left = LEFT + kib * 1024 * scale
        lines.append(
            f'<text x="{left:.1f}" y="{bottom}" fill="currentColor" text-anchor="middle">'
            f"{kib} KiB</text>"
        )
    return "\n".join([*lines, "</svg>"])


def table(layout: SharedLayout) -> list[str]:
    """A Markdown table of the parts of every phase."""
    lines = ["| when | what | from byte | bytes |", "|---|---|---:|---:|"]
    for phase, title in {**PHASES, "always": "always"}.items():
        for part in parts(layout, phase):
            lines.append(f"| {title} | {part.name} | {part.start:,} | {part.bytes:,} |")
    return lines


class SharedMemoryMap(SphinxDirective):
    """Puts the drawing and the table in the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of both."""
        for name in ("layout", "plan", "conv", "dense"):
            self.env.note_dependency(str(ROOT / f"cnnlib/stages/tuned/{name}.py"))
        layout = layout_for(int(self.arguments[0]))
        container = nodes.container()
        self.state.nested_parse(StringList(table(layout), "layout"), 0, container)
        return [nodes.raw("", drawing(layout), format="html"), *container.children]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("shared-memory-map", SharedMemoryMap)
    return {"parallel_read_safe": True}
