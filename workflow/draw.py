"""Draw one figure: python -m workflow.draw NAME --tables FILE... --out FILE.png FILE.svg.

The same tables give the same bytes: no date, no version and no random identifier is written.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from cnnlib.errors import UserError
from cnnlib.files import write_whole
from workflow import modules, style

METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}


def main() -> None:
    """Read the arguments, draw, save."""
    parser = argparse.ArgumentParser(prog="python -m workflow.draw", description=__doc__)
    parser.add_argument("name", choices=modules.names("figures"))
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="files .png or .svg")
    given = parser.parse_args()
    style.apply()
    figure = modules.load("figures", given.name).draw(modules.read_tables(given.tables))
    for path in given.out:
        if path.suffix not in METADATA:
            raise UserError(f"cannot draw {path}: known formats: {', '.join(METADATA)}")
        with write_whole(path) as temporary:
            figure.savefig(temporary, metadata=METADATA[path.suffix])
            if path.suffix == ".svg":
                temporary.write_text(name_clips(temporary.read_text("utf-8")), "utf-8")
    pyplot.close(figure)


CLIP = re.compile(r' *<clipPath id="(\w+)">\s*(.*?)\s*</clipPath>\n', re.DOTALL)


def name_clips(svg: str) -> str:
    """The same picture with each clip path named by what is in it.

    Matplotlib names them by numbers to the last bit, in which two solutions of one layout differ.
    """
    names = {
        old: "p" + hashlib.sha256(content.encode()).hexdigest()[:12]
        for old, content in CLIP.findall(svg)
    }
    found: set[str] = set()

    def once(match: re.Match[str]) -> str:
        new = names[match[1]]
        if new in found:
            return ""
        found.add(new)
        return match[0].replace(match[1], new)

    svg = re.sub(r"(?<=url\(#)\w+(?=\))", lambda use: names.get(use[0], use[0]), svg)
    return CLIP.sub(once, svg)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
