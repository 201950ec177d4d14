"""The poster: one A1 page with the question, the ladder and the figures that carry the message.

python -m workflow.report.poster --figures NAME... --tables FILE.csv... --address URL --out FILE

The figures are drawn for it, with larger type. It is laid out as a web page and printed by
Chromium, which keeps them as vectors. What holds for the whole page is said once: the devices, and
how it was measured.
"""

import argparse
import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd
import segno
from matplotlib import pyplot

from cnnlib.errors import DataError
from cnnlib.files import write_whole
from workflow.glue import modules
from workflow.glue.program import exit_on_user_error, keep_what_is_imported
from workflow.plotting import accuracies, draw, frames, layout, panels, shading, wording
from workflow.plotting.ladder import NAMES_OF_PEERS, exact_peers, own_rows, take_in
from workflow.report import browser, page

TEMPLATE = modules.FOLDER / "report" / "templates" / "poster.html.j2"
TALL, WIDE = {"discern"}, {"speedup"}
PLACE_MM = (278.0, 112.0)
"""A place on the page in millimetres; a tall or wide figure has two and what is between."""
BETWEEN_MM = (10.0, 22.0)
LARGER = 1.5
"""How much larger the figures' type is on the page than on a screen, where it has 10 points."""
TITLES = {
    "speedup": "Left: what each stage gains. Right: against the best library; shaded batches "
    "learn too little, numbers are of the largest that does not"
}
"""Titles of figures whose own title is the result of the whole page."""
WITH_LIBRARIES = {"speedup", "discern", "race", "memory"}
"""Figures that have room for the libraries' names."""
A1_POINTS = (1684, 2384)
"""Width and height of the page as a PDF file gives them: 594 by 841 mm."""
METHOD = (
    "Every stage starts from the same weights, sees the same batches in the same order and is "
    "checked against a float64 reference; what was timed is replayed. Times are medians of whole "
    "epochs, shuffling, gathering and transfers included. Hollow marks and *: timed on a part and "
    "scaled."
)
WHY = {
    "naive": "Python and numpy cost more than the arithmetic",
    "gemm": "a matrix product keeps the arithmetic of all cores busy",
    "gemm_cuda": "thousands of threads at once; left: launches, and maps through memory",
    "fused": "fewer launches, and no full-size map in device memory",
    "ring": "each row is fetched once and less memory is held, so larger maps fit",
    "tuned": "no launches and no host within an epoch; weights beside the arithmetic",
}
"""Why each change helps, for the table."""


def main() -> None:
    """Read the arguments, print the poster."""
    parser = argparse.ArgumentParser(prog="python -m workflow.report.poster", description=__doc__)
    parser.add_argument("--figures", nargs="+", required=True, choices=modules.names("figures"))
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--address", default="", help="where the experiment is found")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    take_in(given.tables)
    html = render(given.figures, modules.read_tables(given.tables), given.address)
    with write_whole(given.out) as temporary:
        print_page(html, temporary)


def render(figures: Sequence[str], tables: dict[str, pd.DataFrame], address: str = "") -> str:
    """The poster as a web page of exactly one A1 sheet; `tables`: the figures' and the ladder."""
    cells = sum(2 if name in TALL | WIDE else 1 for name in figures)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(page.text(TEMPLATE)).render(
        question=page.TITLE,
        result=result(tables["ladder"]),
        devices=panels.devices(tables["ladder"]),
        ladder=rows(tables["ladder"]),
        figures=[drawn(name, tables) for name in figures],
        rows=max(1, -(-cells // 2)),
        method=METHOD,
        address=address,
        code=qr_code(address),
    )


def drawn(name: str, tables: dict[str, pd.DataFrame]) -> dict[str, str]:
    """A figure for its place on the page, its words apart."""
    width, height = PLACE_MM
    if name in TALL:
        height = 2 * height + BETWEEN_MM[1]
    if name in WIDE:
        width = 2 * width + BETWEEN_MM[0]
    sheet = layout.Sheet((width / 25.4 / LARGER, height / 25.4 / LARGER))
    own = {table: tables[table] for table in modules.tables_read("figures", name)}
    if name not in WITH_LIBRARIES:
        own = {each: own_rows(table) if "stage" in table else table for each, table in own.items()}
    drawing = draw.draw(name, own, sheet)
    picture = io.StringIO()
    drawing.figure.savefig(picture, format="svg", metadata=draw.METADATA[".svg"])
    pyplot.close(drawing.figure)
    shape = "tall" if name in TALL else "wide" if name in WIDE else ""
    return {
        "name": name,
        "shape": shape,
        "title": TITLES.get(name, drawing.headline.title),
        "image": base64.b64encode(picture.getvalue().encode()).decode(),
    }


def shown(ladder: pd.DataFrame) -> pd.DataFrame:
    """The lines of the first data set and network at the usual batch size, measured ones."""
    cell = panels.first_cell(ladder)
    if cell is None:
        return ladder
    lines = panels.of_cell(ladder, cell)
    at = lines[lines["batch_size"] == shading.usual(lines)]
    measured: pd.DataFrame = at[(at["device_kind"] != "emulated") & at["epoch_seconds"].notna()]
    return measured


def rows(ladder: pd.DataFrame) -> list[list[str]]:
    """The table of the page, with its heads: the stages, then the best library in each precision.

    Of each its change and why that helps, its epoch, its gain over the stage before, how many times
    as fast as the best library it is, and its share of the machine's arithmetic.
    """
    lines = shown(ladder)
    if not len(lines):
        return []
    size = lines["batch_size"].iloc[0]
    heads = ["", "what changes", "why it helps", f"epoch, batch {size}"]
    table = [[*heads, "gain", "against the best library", "share of peak"]]
    for line in frames.rows(pd.concat([own_stages(lines), best_libraries(lines)])):
        peer = line.stage in NAMES_OF_PEERS
        library = "" if pd.isna(line.library_ratio) else wording.times(line.library_ratio)
        library = "the best" if line.stage == line.library else library
        table.append(
            [
                wording.title(line.stage),
                line.change,
                "" if peer else WHY.get(line.stage, ""),
                wording.duration(line.epoch_seconds) + (" *" if line.extrapolated else ""),
                "" if pd.isna(line.gain) else wording.times(line.gain),
                library if peer or line.library_ratio >= 0.01 else "",
                "" if peer or pd.isna(line.share) else f"{wording.digits(100 * line.share, 2)} %",
            ]
        )
    return table


def own_stages(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines without libraries."""
    return lines[~lines["stage"].isin(NAMES_OF_PEERS)]


def best_libraries(lines: pd.DataFrame) -> pd.DataFrame:
    """The quickest library in float32, and the quickest that rounds more coarsely."""
    peers = lines[lines["stage"].isin(NAMES_OF_PEERS)]
    exact = peers["stage"].isin(exact_peers())
    return pd.concat([part.nsmallest(1, "epoch_seconds") for part in (peers[exact], peers[~exact])])


def result(ladder: pd.DataFrame) -> str:
    """The quickest stage in one sentence, with what is learned; emulated kernels do not count."""
    own = own_stages(shown(ladder))
    if not len(own):
        return "No stage was measured."
    best = own.nsmallest(1, "epoch_seconds").iloc[0]
    text = (
        f"{wording.said(best['stage'])} trains an epoch of "
        f"{wording.NETWORKS.get(best['network'], best['network'])} in "
        f"{wording.duration(best['epoch_seconds'])} at batch {best['batch_size']}"
    )
    more = []
    if best["gain"] == best["gain"]:
        more.append(f"{wording.times(best['gain'])} as fast as {wording.said(best['before'])}")
    if best["library_ratio"] == best["library_ratio"]:
        library = wording.said(best["library"])
        more.append(
            f"{wording.times(best['library_ratio'])} as fast as {library}, the best library"
        )
    if more:
        text += f", {' and '.join(more)}"
    if best["batch_accuracy"] == best["batch_accuracy"]:
        trained = accuracies.epochs(own)
        text += f"; {trained} recognise {100 * best['batch_accuracy']:.1f} % of the test images"
    return f"{text}."


def qr_code(address: str) -> str:
    """The address as a QR code, an SVG picture in base64; "" where there is none."""
    if not address:
        return ""
    picture = io.BytesIO()
    segno.make(address, error="m", micro=False).save(picture, kind="svg", border=2, svgns=True)
    return base64.b64encode(picture.getvalue()).decode()


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
    keep_what_is_imported()
    with exit_on_user_error():
        main()
