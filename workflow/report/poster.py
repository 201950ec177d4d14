"""The poster: one A1 page with the question, the ladder and the figures that carry the message.

python -m workflow.report.poster --figures NAME... --tables FILE.csv...
    --ladder ladder.md --out FILE

The figures are drawn for it, with larger type. It is laid out as a web page and printed by
Chromium, which keeps them as vectors.
"""

import argparse
import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd
from matplotlib import pyplot

from cnnlib.errors import DataError
from cnnlib.files import write_whole
from cnnlib.peers import PEERS
from workflow.glue import modules
from workflow.glue.program import exit_on_user_error
from workflow.plotting import draw, layout, wording
from workflow.plotting.ladder import own_rows, take_in
from workflow.report import browser, page

TEMPLATE = modules.FOLDER / "report" / "templates" / "poster.html.j2"
TALL = {"discern"}
PLACE_MM = (278.0, 122.0)
"""A figure's place on the page, in millimetres; a tall one has two, with what is between them."""
BETWEEN_MM = 32.0
LARGER = 1.5
"""How much larger the figures' type is on the page than on a screen, where it has 10 points."""
INTERVAL = re.compile(r" \([^)]*× to [^)]*\)")
A1_POINTS = (1684, 2384)
"""Width and height of the page as a PDF file gives them: 594 by 841 mm."""
METHOD = (
    "Every stage starts from the same weights, sees the same batches in the same order and is "
    "checked against a float64 reference; what was timed is replayed. Times are medians of whole "
    "epochs, shuffling, gathering and transfers included. Hollow marks and *: timed on a part and "
    "scaled."
)


def main() -> None:
    """Read the arguments, print the poster."""
    parser = argparse.ArgumentParser(prog="python -m workflow.report.poster", description=__doc__)
    parser.add_argument("--figures", nargs="+", required=True, choices=modules.names("figures"))
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--ladder", type=Path, required=True, help="ladder.md")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    take_in(given.tables)
    html = render(given.figures, modules.read_tables(given.tables), given.ladder)
    with write_whole(given.out) as temporary:
        print_page(html, temporary)


def render(figures: Sequence[str], tables: dict[str, pd.DataFrame], ladder: Path) -> str:
    """The poster as a web page of exactly one A1 sheet; `tables`: the figures' and the summary."""
    cells = sum(2 if name in TALL else 1 for name in figures)
    # Lines of the ladder's stages alone: with more their names would be too small.
    own = {name: own_rows(table) if "stage" in table else table for name, table in tables.items()}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(page.text(TEMPLATE)).render(
        question=page.TITLE,
        result=result(tables["summary"]),
        ladder=short(page.blocks(page.text(ladder))),
        figures=[drawn(name, own) for name in figures],
        rows=max(1, -(-cells // 2)),
        method=METHOD,
    )


def drawn(name: str, tables: dict[str, pd.DataFrame]) -> dict[str, str]:
    """A figure for its place on the page, its words apart."""
    width, height = PLACE_MM
    if name in TALL:
        height = 2 * height + BETWEEN_MM
    sheet = layout.Sheet((width / 25.4 / LARGER, height / 25.4 / LARGER))
    own = {table: tables[table] for table in modules.tables_read("figures", name)}
    drawing = draw.draw(name, own, sheet)
    picture = io.StringIO()
    drawing.figure.savefig(picture, format="svg", metadata=draw.METADATA[".svg"])
    pyplot.close(drawing.figure)
    words = drawing.headline
    return {
        "name": name,
        "shape": "tall" if name in TALL else "",
        "title": words.title,
        "subtitle": "; ".join(words.subtitle.split("\n")),
        "image": base64.b64encode(picture.getvalue().encode()).decode(),
    }


def short(blocks: list[page.Block]) -> list[page.Block]:
    """The first table's stage, change, last time and last speedup, without its interval, of the
    ladder's stages: the rest is in the report.
    """
    peers = {peer.title for peer in PEERS}
    for kind, rows in blocks:
        if kind == "table":
            heads = rows[0]
            wanted = [
                *(i for i, head in enumerate(heads) if head in ("stage", "what changes")),
                *[i for i, head in enumerate(heads) if head.startswith("epoch")][-1:],
                *[i for i, head in enumerate(heads) if head.startswith("speedup")][-1:],
            ]
            own = [row for row in rows if row[0] not in peers]
            return [("table", [[INTERVAL.sub("", row[i]) for i in wanted] for row in own])]
    return []


def result(summary: pd.DataFrame) -> str:
    """The largest speedup that was measured, in one sentence; emulated kernels do not count."""
    measured = summary[(summary["device_kind"] != "emulated") & summary["speedup"].notna()]
    if not len(measured):
        return "No speedup was measured."
    best = measured.nlargest(1, "speedup").iloc[0]
    scaled = " (extrapolated)" if best["baseline_extrapolated"] else ""
    return (
        f"On {wording.device(str(best['device']))}, {best['stage']} trains "
        f"{wording.NETWORKS.get(best['network'], best['network'])} "
        f"{wording.times(best['speedup'])} faster than {best['baseline']}{scaled}: "
        f"an epoch in {wording.duration(best['epoch_seconds'])} at batch {best['batch_size']}."
        + beside_peers(measured, best)
    )


def beside_peers(summary: pd.DataFrame, best: pd.Series) -> str:
    """A sentence on the best peers of the same precision, or "" where there are none."""
    exact = [peer.name for peer in PEERS if not peer.rounding]
    place = ["dataset", "network", "device"]
    lines = summary[(summary[place] == best[place]).all(axis=1)]
    times = lines[lines["stage"].isin(exact)].groupby("batch_size")["epoch_seconds"].min()
    own = lines[lines["stage"] == best["stage"]].set_index("batch_size")["epoch_seconds"]
    ratios = (times / own).dropna()
    if best["stage"] in exact or not len(ratios):
        return ""
    return (
        f" PyTorch and JAX take {wording.times(ratios.min())} to {wording.times(ratios.max())} as "
        "long."
    )


def print_page(html: str, out: Path) -> None:
    """Print the poster to a PDF file; the date that Chromium writes is made to be nothing."""
    program = browser.find_browser()
    pdf = browser.print_page(program, html)
    pages = re.findall(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    sizes = [side for page in pages for side in map(float, page)]
    if len(pages) != 1 or any(abs(a - b) > 2 for a, b in zip(sizes, A1_POINTS, strict=True)):
        # where it cannot read a file, Chromium prints an error page
        raise DataError(
            f"{program} has printed something else than one A1 page: can it read files?"
        )
    date = re.compile(rb"(?<=Date \(D:)\d{14}")
    out.write_bytes(date.sub(b"20000101000000", pdf))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
