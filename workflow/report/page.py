"""The report: one HTML file with everything in it, that opens without a network.

python -m workflow.report.page --figures FILE.svg... --tables FILE.md...
    --provenance run.json --out FILE
"""

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import jinja2

from cnnlib.errors import DataError
from cnnlib.files import write_whole
from workflow.glue import modules
from workflow.glue.program import exit_on_user_error

TITLE = "How much faster does training a CNN get, step by step, on the way to the GPU, and why?"
TEMPLATE = modules.FOLDER / "report" / "templates" / "page.html.j2"
# Figures that come first; all others follow by name.
FIRST = (
    "speedup",
    "learning",
    "discern",
    "latency",
    "profile",
    "roofline",
    "memory_latency",
    "memory",
    "energy",
    "transfers",
    "push_pull",
    "filters",
    "discern_images",
)
LADDER = "ladder"

Block = tuple[str, Any]


def main() -> None:
    """Read the arguments, write the page."""
    parser = argparse.ArgumentParser(prog="python -m workflow.report.page", description=__doc__)
    parser.add_argument("--figures", type=Path, nargs="+", required=True, help="files .svg")
    parser.add_argument("--tables", type=Path, nargs="+", required=True, help="files .md")
    parser.add_argument("--provenance", type=Path, required=True, help="a run.json")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    page = render(given.figures, given.tables, given.provenance)
    with write_whole(given.out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(figures: list[Path], tables: list[Path], provenance: Path) -> str:
    """The page. Raises DataError naming a file that cannot be read."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    contents = {path.stem: blocks(text(path)) for path in tables}
    return environment.from_string(text(TEMPLATE)).render(
        title=TITLE,
        ladder=contents.pop(LADDER, []),
        figures=[
            {
                "name": path.stem,
                "label": path.stem.replace("_", " "),
                "caption": caption(path.stem),
                "image": base64.b64encode(text(path).encode()).decode(),
            }
            for path in sorted(figures, key=rank)
        ],
        provenance=facts(provenance),
        tables=sorted(contents.items()),
    )


def text(path: Path) -> str:
    """The text of a file; DataError naming the file if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def rank(path: Path) -> tuple[int, str]:
    """Figures of FIRST in that order, then the others by name."""
    return (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem)


def caption(figure: str) -> list[str]:
    """The paragraphs of a figure's caption, which is the docstring of its file."""
    return [" ".join(p.split()) for p in modules.docstring("figures", figure).split("\n\n")]


def blocks(markdown: str) -> list[Block]:
    """The Markdown of our tables as ("table", rows of cells) and ("text", paragraph)."""
    found: list[Block] = []
    for line in markdown.splitlines():
        if not line.startswith("|"):
            if line.strip():
                found.append(("text", plain(line)))
            continue
        cells = [plain(cell.strip()) for cell in line.strip("|").split("|")]
        if not found or found[-1][0] != "table":
            found.append(("table", [cells]))
        elif set("".join(cells)) - set("-: "):
            found[-1][1].append(cells)
    return found


def plain(markdown: str) -> str:
    """Text without the markup that our tables use."""
    return markdown.replace("**", "").replace("\\*", "*").replace("`", "")


def facts(path: Path) -> list[tuple[str, str]]:
    """Facts of run.json about machine and software: (name, value)."""
    try:
        run = json.loads(text(path))
    except ValueError:
        raise DataError(f"{path} is not JSON") from None
    wanted = (
        "device",
        "cpu",
        "cores",
        "cpu_quota",
        "driver",
        "system",
        "python",
        "commit",
        "started",
        "config",
    )
    rows = [(name, str(run[name])) for name in wanted if run.get(name) is not None]
    libraries = ", ".join(f"{name} {v}" for name, v in run.get("libraries", {}).items())
    return [*rows, ("libraries", libraries)]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
