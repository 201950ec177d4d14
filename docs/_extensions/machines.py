"""The machines of results/reference, one a line: workflow/report/machines.py makes the table.

The directive `{machines}` puts the table in a page. As a program it prints it:

    python docs/_extensions/machines.py
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workflow.report.machines import table

REFERENCE = Path(__file__).resolve().parents[2] / "results/reference"


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
            text = StringList(table(REFERENCE).splitlines(), "results/reference")
            self.state.nested_parse(text, 0, container)
            return container.children

    assert isinstance(app, Sphinx)
    app.add_directive("machines", Machines)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    sys.stdout.write(table(REFERENCE))
