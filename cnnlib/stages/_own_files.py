"""The files that a stage outside the repository is made of, and their digest.

A package counts with everything in its folder. A single file counts with what lies beside it: the
modules that it imports, the sources that its strings name, and what those include.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

SOURCES = (".py", ".cuh", ".cu", ".h", ".hpp", ".c", ".cc", ".cpp", ".cl")
"""Endings of the files that count where a string names them."""
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


def own_files(path: Path, alone: bool = False) -> tuple[Path, ...]:
    """`path`, a Python file or the __init__.py of a package, and the files that it uses, sorted.

    A file that lies among those of others is taken `alone`, without the modules beside it.
    """
    if path.name == "__init__.py":
        everything = (each for each in path.parent.rglob("*") if each.is_file())
        return tuple(sorted(each for each in everything if not _is_hidden(each, path.parent)))
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _used_by(file, alone)
    return tuple(sorted(found))


def digest_of(files: Iterable[Path], folder: Path) -> str:
    """Hexadecimal SHA-256 of the files' names, as seen from `folder`, and their contents."""
    total = hashlib.sha256()
    for file in files:
        name = file.relative_to(folder) if file.is_relative_to(folder) else file
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{content}  {name.as_posix()}\n".encode())
    return total.hexdigest()


def siblings(path: Path) -> set[str]:
    """Top-level names that a single file, or one that it imports, imports from its own folder."""
    return {
        name.split(".")[0]
        for file in own_files(path)
        if file.suffix == ".py" and path.name != "__init__.py"
        for name in _imports(file)
        if list(_modules(name.split(".")[0], path.parent))
    }


def _used_by(file: Path, alone: bool) -> Iterator[Path]:
    """What a file names of the files beside it."""
    if file.suffix != ".py":
        text = file.read_text(encoding="utf-8", errors="replace")
        yield from _beside(file, _INCLUDE.findall(text))
        return
    for name in () if alone else _imports(file):
        yield from _modules(name, file.parent)
    nodes = _nodes(file)
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from _beside(file, [node.value] if node.value.endswith(SOURCES) else [])


def _nodes(file: Path) -> list[ast.AST]:
    """The syntax tree of a Python file; nothing where it has none, which importing it reports."""
    try:
        return list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return []


def _imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere."""
    for node in _nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _modules(name: str, folder: Path) -> Iterator[Path]:
    """The files in `folder` that importing `name` would run, packages on the way included."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        base = folder.joinpath(*parts[:count])
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                yield file
                break


def _beside(file: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        path = file.parent / name
        try:
            if path.is_file():
                yield path.resolve()
        except OSError:  # a text that is too long for a name
            continue


def _is_hidden(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    return any(part.startswith(".") or part == "__pycache__" for part in parts)
