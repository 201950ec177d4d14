"""How names, times and numbers are written, the same in every figure and table."""

import re

from cnnlib.wording import digits as digits
from cnnlib.wording import duration as duration
from cnnlib.wording import times as times
from workflow.plotting import ladder

EMULATED = "emulated kernels, not a GPU measurement"

STATUS = {
    "does_not_fit": "does not fit",
    "disturbed": "disturbed",
    "diverged": "diverged",
    "failed": "failed",
    "unavailable": "unavailable",
    "unjudged": "not judged",
}

LONGEST_REASON = 400
"""Letters of a reason that a table or a figure shows; run.json has the whole reason."""

DATASETS = {"mnist": "MNIST"}
NETWORKS = {"lenet5": "LeNet-5"}


def title(stage: str) -> str:
    """The stage's own title, or its name if it is unknown."""
    return next((s.title for s in ladder.known() if s.name == stage), stage)


def said(stage: str) -> str:
    """The stage's name within a sentence: `tuned`, `PyTorch (compiled, TF32)`."""
    name = re.sub(r"^\d+ ", "", title(stage))
    if stage not in ladder.NAMES_OF_PEERS:
        return name
    library, _, how = name.partition(", ")
    return f"{library} ({how})" if how else library


def what(dataset: str, network: str) -> str:
    """`LeNet-5 on MNIST`."""
    return f"{NETWORKS.get(network, network)} on {DATASETS.get(dataset, dataset)}"


def status(name: str) -> str:
    """The words for a status; a status without words is written as it is."""
    return STATUS.get(name, name)


def size(count: float) -> str:
    """Bytes with a unit that suits, in steps of 1024: 64 B, 16 kB, 1.5 MB, 80 GB."""
    for unit, name in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
        if count >= 0.9995 * unit:
            return f"{float(digits(min(count / unit, 999.0))):g} {name}"
    return f"{count:.0f} B"


def device(name: str) -> str:
    """A device's name without trade marks, counts of cores and what else does not help."""
    name = re.sub(r"\((R|TM|tm)\)", "", name)
    name = re.sub(r"\s+(\d+-Core )?Processor\b|\s+CPU\b|\s*@\s*[\d.]+GHz", "", name)
    return " ".join(name.split())


def why_not(stage: str, status: str, reason: str) -> str:
    """`5 tuned, unavailable: stage 'tuned' cannot take ...`."""
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[:LONGEST_REASON]} ..."
    return f"{title(stage)}, {STATUS.get(status, status)}: {reason}"


def brief(text: str, most: int = 28) -> str:
    """`text`, or its beginning and its end where it would be longer than `most` characters."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1].rstrip()}…{text[-end:].lstrip()}"


def markdown_table(rows: list[list[str]]) -> str:
    """Rows (heads, alignment, body) as a Markdown table."""
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows
    )
