"""The machines of results/reference, one a line, computed from their raw tables.

The directive `{machines}` puts the table in a page. As a program it prints it:

    python docs/_extensions/machines.py
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cnnlib.publishing.published import Machine, machines
from workflow.plotting import ladder, wording

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results/reference"
DATASET, NETWORK = "mnist", "lenet5"
BATCH_SIZES = (64, 1024)
DIGITS = 7
"""Digits of a commit that are shown."""


def table() -> str:
    """GPU, processor, stages, the best epoch at two batch sizes, days and commits."""
    head = ["machine", "GPU", "processor", "stages measured"]
    head += [f"best epoch, batch {size}" for size in BATCH_SIZES] + ["measured", "commit"]
    rows = [head, ["---"] * 4 + ["---:"] * len(BATCH_SIZES) + ["---"] * 2]
    return wording.markdown_table([*rows, *map(line, machines(REFERENCE))])


def line(machine: Machine) -> list[str]:
    """The cells of one machine."""
    names = {kind: list(map(wording.device, each)) for kind, each in machine.devices.items()}
    processors = dict.fromkeys(name.partition(", ")[0] for name in names.get("cpu", []))
    return [
        machine.name,
        ", ".join(names.get("cuda", [])) or "–",
        ", ".join(processors) or "–",
        ", ".join(ladder.ordered(machine.stages)),
        *(best(machine, size) for size in BATCH_SIZES),
        " to ".join(machine.dates) or "–",
        ", ".join(dict.fromkeys(commit[:DIGITS] for commit in machine.commits)) or "–",
    ]


def best(machine: Machine, batch_size: int) -> str:
    """`18.0 ms (tuned)`, or a dash where this network was not measured."""
    found = machine.best(DATASET, NETWORK, batch_size)
    return f"{wording.duration(found[1])} ({found[0]})" if found else "–"


def setup(app: object) -> dict[str, bool]:
    """Register the directive."""
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.application import Sphinx
    from sphinx.util.docutils import SphinxDirective

    class Machines(SphinxDirective):
        """The table of machines."""

        def run(self) -> list[nodes.Node]:
            for path in REFERENCE.glob("*/tables/epochs.csv"):
                self.env.note_dependency(str(path))
            container = nodes.container()
            text = StringList(table().splitlines(), "results/reference")
            self.state.nested_parse(text, 0, container)
            return container.children

    assert isinstance(app, Sphinx)
    app.add_directive("machines", Machines)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    sys.stdout.write(table())
