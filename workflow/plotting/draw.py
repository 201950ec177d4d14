"""Draw one figure: python -m workflow.plotting.draw NAME --tables FILE... --out FILE.png FILE.svg.

The same tables give the same bytes: no date, no version and no random identifier is written.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from matplotlib import pyplot

from cnnlib.errors import UserError
from cnnlib.files import write_whole
from workflow.glue import modules
from workflow.glue.program import exit_on_user_error, keep_what_is_imported
from workflow.plotting import ladder, layout, style

METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}


def main() -> None:
    """Read the arguments, draw, save."""
    parser = argparse.ArgumentParser(prog="python -m workflow.plotting.draw", description=__doc__)
    parser.add_argument("name", choices=modules.names("figures"))
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="files .png or .svg")
    given = parser.parse_args()
    for path in given.out:
        if path.suffix not in METADATA:
            raise UserError(f"cannot draw {path}: known formats: {', '.join(METADATA)}")
    ladder.take_in(given.tables)
    figure = draw(given.name, modules.read_tables(given.tables)).figure
    # The files replace older ones together, once all of them have been written.
    with ExitStack() as written:
        for path in given.out:
            temporary = written.enter_context(write_whole(path))
            figure.savefig(temporary, metadata=METADATA[path.suffix])
    pyplot.close(figure)


def draw(
    name: str, tables: dict[str, pd.DataFrame], sheet: layout.Sheet = layout.OWN_PAGE
) -> layout.Drawing:
    """The figure `name` of `tables`, every part of it in its place."""
    style.apply()
    drawing: layout.Drawing = modules.load("figures", name).draw(tables, sheet)
    layout.settle(drawing.figure)
    return drawing


if __name__ == "__main__":
    keep_what_is_imported()
    with exit_on_user_error():
        main()
