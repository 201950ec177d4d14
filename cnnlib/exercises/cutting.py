"""Finds functions by their names in the text of a Python or CUDA file, to cut them out."""

import ast
import re
import textwrap
from dataclasses import dataclass

from cnnlib.errors import DataError


class NotFound(DataError):
    """A file has no function of this name, or none whose end can be found."""


class Unreadable(NotFound):
    """A file is no Python, so that none of its functions can be found."""


@dataclass(frozen=True)
class Body:
    """Where the lines of a function's body are in a text: `text[start:end]`, whole lines."""

    start: int
    end: int
    indent: int
    """Spaces in front of its statements."""
    returns: bool
    """Whether a C++ function returns a value."""


def find_body(text: str, file: str, function: str, after: str = "") -> Body:
    """The body of a function, or what follows in its block after the line with the text `after`.

    A method of Python is `Class.method`; its docstring is no part of the body. A C++ function is
    the first one defined under the name. Raises NotFound, naming `file`.
    """
    find = _python_body if file.endswith(".py") else _cuda_body
    body = find(text, file, function)
    if not after:
        return body
    at = text.find(after, body.start, body.end)
    if at < 0:
        raise NotFound(f"{file}: {function} has no line with '{after}'")
    line = text.rfind("\n", 0, at) + 1
    indent = len(text[line:at]) - len(text[line:at].lstrip())
    start = text.index("\n", at) + 1
    return Body(start, _end_of_block(text, start, body.end), indent, False)


def source_of(text: str, file: str, function: str) -> str:
    """A function of a Python file with its decorators and docstring, moved to the margin."""
    node = _node(text, file, function)
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines)) + "\n"


def filled(text: str, body: Body, lines: str) -> str:
    """The text with other lines for a body; `lines` have no indent in common."""
    return text[: body.start] + textwrap.indent(lines, " " * body.indent) + text[body.end :]


def lines_of(text: str, body: Body) -> str:
    """The lines of a body, moved to the margin."""
    return textwrap.dedent(text[body.start : body.end])


def _node(text: str, file: str, function: str) -> ast.FunctionDef:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise Unreadable(f"{file}, line {error.lineno}: {error.msg}") from None
    *classes, name = function.split(".")
    found: list[ast.stmt] = tree.body
    for each in classes:
        inside = [node for node in found if isinstance(node, ast.ClassDef) and node.name == each]
        found = inside[0].body if inside else []
    for node in found:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise NotFound(f"{file} has no function {function}")


def _python_body(text: str, file: str, function: str) -> Body:
    node = _node(text, file, function)
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not statements:
        raise NotFound(f"{file}: {function} has nothing but a docstring")
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    first = statements[0].lineno
    if ast.get_docstring(node) is not None:  # comments in front of the first statement are its own
        first = (node.body[0].end_lineno or first) + 1
    return Body(starts[first - 1], starts[node.end_lineno or first], node.col_offset + 4, False)


_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|[(){}]', re.DOTALL)


def _cuda_body(text: str, file: str, function: str) -> Body:
    for match in re.finditer(
        rf"^[^\n/#]*?([\w>&*]+)\s+{re.escape(function)}\(", text, re.MULTILINE
    ):
        if match[1] in ("return", "else"):
            continue
        parameters = _matching(text, match.end() - 1)
        after = re.compile(r"\)\s*(?:const\s*)?\{[^\n]*\n").match(text, parameters)
        if after is None:
            continue  # it is called or declared here
        end = _matching(text, text.index("{", parameters))
        start, stop = after.end(), text.rfind("\n", 0, end) + 1
        line = text[start : text.index("\n", start)]
        return Body(
            start, stop, len(line) - len(line.lstrip()), not re.search(r"\bvoid\b", match[0])
        )
    raise NotFound(f"{file} has no function {function}")


def _matching(text: str, opening: int) -> int:
    """Where the bracket that opens here is closed; those of the other kind are not looked at."""
    depth = 0
    closing = {"(": ")", "{": "}"}[text[opening]]
    for token in _TOKEN.finditer(text, opening):
        if token[0] == text[opening]:
            depth += 1
        elif token[0] == closing:
            depth -= 1
            if not depth:
                return token.start()
    raise NotFound(
        f"the bracket that opens in line {text.count(chr(10), 0, opening) + 1} stays open"
    )


def _end_of_block(text: str, start: int, end: int) -> int:
    """Where the line begins that closes the block in which `start` lies, or `end`."""
    depth = 0
    for token in _TOKEN.finditer(text, start, end):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth < 0:
            return text.rfind("\n", 0, token.start()) + 1
    return end
