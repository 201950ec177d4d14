"""Docstrings of this project are plain text with `code` in backticks: autodoc gets them as that.

Sphinx reads docstrings as reStructuredText, in which `*`, `|` and a trailing `_` are markup. Here
they are what they look like: an indented paragraph is a block of code, and the rest is prose.
"""

import re
from collections.abc import Iterator

from sphinx.application import Sphinx


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines that are not empty."""
    found: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            found.append(line)
        elif found:
            yield found
            found = []


def escape(text: str) -> str:
    """Prose with nothing in it that reStructuredText would take for markup, `code` kept as code."""
    parts = re.split(r"`([^`]+)`", text)
    prose = [re.sub(r"([\\*|_])", r"\\\1", part).replace("`", r"\`") for part in parts[::2]]
    code = [f"``{part.strip()}``" for part in parts[1::2]]
    # An empty comment in the middle keeps markup and the letters beside it apart.
    text = prose[0]
    for each, after in zip(code, prose[1:], strict=True):
        text += (r"\ " if text and text[-1].isalnum() else "") + each
        text += (r"\ " if after and after[0].isalnum() else "") + after
    return text


def rewrite(lines: list[str]) -> list[str]:
    """The docstring as reStructuredText."""
    written: list[str] = []
    for paragraph in paragraphs(lines):
        if all(line.startswith(" ") for line in paragraph):
            written += ["::", "", *(f"    {line}" for line in paragraph), ""]
        else:
            text = escape("\n".join(line.strip() for line in paragraph))
            # a line that begins like a list or a heading is part of the sentence before it
            text = re.sub(r"(?m)^([-+#.=~:]|\d+[.)])", r"\\\1", text)
            written += [*text.split("\n"), ""]
    return written


def process(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """The hook that autodoc calls for each docstring; changes `lines` in place."""
    lines[:] = rewrite(list(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hook."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
