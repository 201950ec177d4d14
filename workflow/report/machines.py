"""The machines whose results are published, one a line, computed from their raw tables."""

from pathlib import Path

from cnnlib.publishing.published import Machine, machines
from workflow.plotting import ladder, wording

DATASET, NETWORK = "mnist", "lenet5"
BATCH_SIZES = (64, 256)
"""Two that learn, as in the README: larger ones are faster and learn too little in two epochs."""
DIGITS = 7
"""Digits of a commit that are shown."""


def table(reference: Path) -> str:
    """GPU, processor, stages, the best epoch at two batch sizes, days and commits, as Markdown.

    `reference` is a folder of machines, such as results/reference; folders that belong to another
    have no line. Raises DataError naming a table or a run.json that is damaged.
    """
    head = ["machine", "GPU", "processor", "stages measured"]
    head += [f"best epoch, batch {size}" for size in BATCH_SIZES] + ["measured", "commit"]
    rows = [head, ["---"] * 4 + ["---:"] * len(BATCH_SIZES) + ["---"] * 2]
    found = machines(reference)
    listed = [each for each in found if not any(belongs(each, other) for other in found)]
    return wording.markdown_table([*rows, *map(line, listed)])


def belongs(machine: Machine, other: Machine) -> bool:
    """Whether a folder holds more of another's machine, as nvidia-h100-networks of nvidia-h100."""
    more = machine.name.startswith(f"{other.name}-")
    own = {name for names in machine.devices.values() for name in names}
    return more and own <= {name for names in other.devices.values() for name in names}


def line(machine: Machine) -> list[str]:
    """The cells of one machine."""
    names = {kind: list(map(wording.device, each)) for kind, each in machine.devices.items()}
    processors = dict.fromkeys(name.partition(", ")[0] for name in names.get("cpu", []))
    return [
        machine.name,
        ", ".join(names.get("cuda", [])) or "–",
        ", ".join(processors) or "–",
        ", ".join(map(wording.said, ladder.ordered(machine.stages))),
        *(best(machine, size) for size in BATCH_SIZES),
        " to ".join(machine.dates) or "–",
        ", ".join(dict.fromkeys(commit[:DIGITS] for commit in machine.commits)) or "–",
    ]


def best(machine: Machine, batch_size: int) -> str:
    """`18.0 ms (tuned)`, or a dash where this network was not measured."""
    found = machine.best(DATASET, NETWORK, batch_size)
    return f"{wording.duration(found[1])} ({wording.said(found[0])})" if found else "–"
