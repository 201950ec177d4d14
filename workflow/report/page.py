"""The report: one HTML file with everything in it, that opens without a network.

python -m workflow.report.page --figures FILE.svg... --tables FILE.md... --data FILE.csv...
    --provenance run.json --published FOLDER --out FILE

All of it can be read without JavaScript; with it, batch sizes can be changed, the timeline zoomed,
and digits drawn.
"""

import argparse
import base64
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cnnlib.errors import DataError
from cnnlib.files import write_whole
from workflow.glue import modules
from workflow.glue.program import exit_on_user_error, keep_what_is_imported
from workflow.plotting import wording
from workflow.plotting.ladder import take_in
from workflow.report import NETWORKS, explain, glossary, machines, timeline
from workflow.report.fair_play import TRIED
from workflow.report.lessons import Lesson

TITLE = "How much faster does training a CNN get, step by step, on the way to the GPU, and why?"
TEMPLATES = modules.FOLDER / "report" / "templates"
ASSETS = modules.FOLDER / "report" / "assets"
STYLES = ("page.css", "parts.css", "narrow.css", "print.css")
SCRIPTS = ("page.js", "timeline.js", "network.js", "draw.js", "recognition.js")
PARTS_OF_A_LESSON = ("before", "idea", "gain", "left")
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
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="files .csv")
    parser.add_argument("--provenance", type=Path, required=True, help="a run.json")
    parser.add_argument("--published", type=Path, help="results to show where no GPU was measured")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    take_in(given.data)
    page = render(given.figures, given.tables, given.provenance, given.data, given.published)
    with write_whole(given.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"Report:  {given.out.resolve()}")


def render(
    figures: Sequence[Path],
    tables: Sequence[Path],
    provenance: Path,
    data: Sequence[Path] = (),
    published: Path | None = None,
) -> str:
    """The page. Raises DataError naming a file that cannot be read.

    Without `data` it has figures and tables alone. `published` is a folder of published results,
    whose GPU is shown where `data` has none, and beside which other machines lie.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        term=glossary.term,
        code_of=explain.code_of,
        micro=timeline.micro,
        colours=timeline.COLOURS,
        share_names=timeline.PARTS,
    )
    drawn = [(path, text(path)) for path in sorted(figures, key=rank)]
    contents = {path.stem: blocks(text(path)) for path in tables}
    found = explain.explain(explain.read(list(data)), published, provenance)
    return environment.get_template("page.html.j2").render(
        title=TITLE,
        ladder=contents.pop(LADDER, []),
        explained=found,
        lesson_texts=[lesson_text(environment, each) for each in found.lessons] if found else [],
        tried=blocks(text(TRIED)) if TRIED.exists() else [],
        words=glossary.in_order(),
        styles=[asset(name) for name in STYLES],
        scripts=[asset(name) for name in SCRIPTS],
        figures=[
            {
                "name": path.stem,
                "label": path.stem.replace("_", " "),
                "caption": caption(path.stem),
                "image": base64.b64encode(svg.encode()).decode(),
            }
            for path, svg in drawn
            if not nothing(svg)
        ],
        missing=[line for _, svg in drawn if (line := nothing(svg))],
        provenance=facts(provenance),
        networks=blocks(networks(published.parent)) if published else [],
        machines=blocks(machines.table(published.parent)) if published else [],
        tables=sorted(contents.items()),
    )


def networks(reference: Path) -> str:
    """The ratios of all shipped networks as Markdown, from folders of published results, or ""."""
    path = reference / NETWORKS
    if not path.exists():
        return ""
    (table,) = modules.read_tables([path]).values()
    short: str = modules.load("tables", path.stem).short(table)
    return short


def lesson_text(environment: jinja2.Environment, lesson: Lesson) -> dict[str, Markup]:
    """The paragraphs of a lesson by the names of their parts."""
    template = environment.get_template(f"lessons/{lesson.stage}.html.j2")
    context = template.new_context({"f": lesson.facts})
    parts = {name: Markup("".join(template.blocks[name](context))) for name in PARTS_OF_A_LESSON}
    sketch = re.sub(r"^<\?xml.*?\?>", "", lesson.sketch)
    return parts | {"sketch": Markup(sketch)}


def asset(name: str) -> Markup:
    """A style sheet or script of the page, to stand within its element."""
    return Markup(text(ASSETS / name))


def text(path: Path) -> str:
    """The text of a file; DataError naming the file if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def nothing(svg: str) -> str:
    """What a figure without a panel says: that something was not measured, and why; else ""."""
    if 'id="axes_1"' in svg:
        return ""
    texts = re.findall(r'<g id="text_\d+">(.*?)(?=<g id="text_|\Z)', svg, re.DOTALL)
    lines = [re.findall(r"<!-- (.*?) -->", text, re.DOTALL) for text in texts]
    return html.unescape(": ".join(" ".join(each) for each in lines if each))


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
    """Text without the markup that our tables use; of a link its words."""
    markdown = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", markdown)
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
    rows = [(name, others_too(path, name, value)) for name, value in rows]
    libraries = ", ".join(f"{name} {v}" for name, v in run.get("libraries", {}).items())
    return [*rows, ("libraries", libraries)]


def others_too(path: Path, name: str, value: str) -> str:
    """A number of cores or a commit; those of other runs too, whose files lie beside `path`."""
    if name not in ("cores", "commit"):
        return value
    found: dict[str, list[str]] = {value: []}
    for other in sorted(path.parent.glob("*.json")):
        if other != path:
            try:
                run = json.loads(text(other))
            except ValueError:
                raise DataError(f"{other} is not JSON") from None
            if run.get(name) is not None:
                found.setdefault(str(run[name]), []).append(wording.said(other.stem))
    more = [f"{other} ({', '.join(runs)})" for other, runs in found.items() if other != value]
    return "; ".join([f"{value} (the others)" if more else value, *more])


if __name__ == "__main__":
    keep_what_is_imported()
    with exit_on_user_error():
        main()
