"""Make one table.

python -m workflow.glue.tabulate NAME --tables FILE... --csv FILE --markdown FILE
"""

import argparse
from pathlib import Path

import pandas as pd

from cnnlib.files import write_whole
from workflow.glue import modules
from workflow.glue.program import exit_on_user_error, keep_what_is_imported
from workflow.plotting import ladder


def main() -> None:
    """Read the arguments, make the table, save it."""
    parser = argparse.ArgumentParser(prog="python -m workflow.glue.tabulate", description=__doc__)
    parser.add_argument("name", choices=modules.names("tables"))
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--markdown", type=Path, required=True)
    given = parser.parse_args()
    ladder.take_in(given.tables)
    module = modules.load("tables", given.name)
    tables = modules.read_tables(given.tables)
    frame = module.make(tables)
    text = module.markdown(frame) if hasattr(module, "markdown") else markdown(frame)
    if hasattr(module, "footnotes"):
        text += module.footnotes(tables)
    # Both files replace older ones together, once both have been written.
    with write_whole(given.csv) as csv, write_whole(given.markdown) as page:
        frame.to_csv(csv, index=False, na_rep="nan", float_format="%.9g", lineterminator="\n")
        page.write_text(text, encoding="utf-8")


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table: numbers to four digits, right-aligned."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in frame.values]
    rule = ["---:" if pd.api.types.is_numeric_dtype(frame[c]) else "---" for c in frame.columns]
    lines = [list(frame.columns), rule, *cells]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    keep_what_is_imported()
    with exit_on_user_error():
        main()
