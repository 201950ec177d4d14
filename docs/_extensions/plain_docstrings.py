"""Docstrings of this project are plain text with `code` in backticks: autodoc gets them as that.

Sphinx reads docstrings as reStructuredText, in which `*`, `|` and a trailing `_` are markup. Here
they are what they look like: an indented paragraph is a block of code, one that begins with "Args:"
or "Raises:" is a list, and the rest is prose.

Signatures mention private names, type variables and classes of modules that have no page. Such a
name is shown without a link; one that does not exist at all remains an error.
"""

import builtins
import re
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


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


LISTS = {"Args:": "param", "Raises:": "raises"}
"""The first line of a paragraph that is a list -> the field that Sphinx has for its entries."""


def entries(lines: list[str], field: str) -> Iterator[str]:
    """The lines `name: text`, each with more indented lines of text, as Sphinx's fields."""
    margin = len(lines[0]) - len(lines[0].lstrip())
    for line in lines:
        if line[margin] != " ":
            name, _, text = line.strip().partition(": ")
            yield f":{field} {name}: {escape(text)}"
        else:
            yield f"    {escape(line.strip())}"


def rewrite(lines: list[str]) -> list[str]:
    """The docstring as reStructuredText."""
    written: list[str] = []
    for paragraph in paragraphs(lines):
        if paragraph[0].startswith(":meta "):  # an instruction to autodoc
            written += [*paragraph, ""]
        elif paragraph[0].strip() in LISTS and len(paragraph) > 1:
            written += [*entries(paragraph[1:], LISTS[paragraph[0].strip()]), ""]
        elif all(line.startswith(" ") for line in paragraph):
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


def by_alias(
    app: Sphinx,
    what: str,
    name: str,
    thing: object,
    options: object,
    arguments: str | None,
    result: str | None,
) -> tuple[str | None, str | None]:
    """The signature with the bare names of autodoc_type_aliases, wherever they are in it."""
    texts = [
        text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
        for text in (arguments, result)
    ]
    return texts[0], texts[1]


def exists(name: str) -> bool:
    """Whether `package.module.Name.attribute` can be imported, as far as it is one of cnnlib."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            attrgetter(".".join(parts[end:]))(import_module(".".join(parts[:end])))
        except (ImportError, AttributeError):
            continue
        return True
    return False


def without_link(
    app: Sphinx, environment: BuildEnvironment, reference: pending_xref, text: nodes.TextElement
) -> nodes.TextElement | None:
    """The text of a reference to something of cnnlib that exists and has no page."""
    name = str(reference.get("reftarget"))
    return text if name.startswith("cnnlib.") and exists(name) else None


def without_builtins(app: Sphinx, document: nodes.document) -> None:
    """Take links from Python's own names: `bytes` would lead to any attribute that is called so."""
    for reference in list(document.findall(pending_xref)):
        if hasattr(builtins, str(reference.get("reftarget"))):
            reference.replace_self(reference.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hooks."""
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", by_alias)
    app.connect("doctree-read", without_builtins)
    app.connect("missing-reference", without_link)
    return {"parallel_read_safe": True}
