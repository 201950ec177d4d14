"""Imports in cnnlib go downward only and never in a circle; PyCUDA has one file that imports it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from cnnlib.paths import ROOT

pytestmark = pytest.mark.quick

PACKAGE = ROOT / "cnnlib"
# A module imports from those above it. A new module or folder of cnnlib gets its place here.
ORDER = [
    "errors",
    "arithmetic",
    "wording",
    "paths",
    "patterns",
    "config_errors",
    "config_files",
    "files",
    "pictures",
    "system",
    "levels",
    "layers",
    "named_tensors",
    "torch_modules",
    "network",
    "datasets",
    "config",
    "device",
    "engine",
    "peers",
    "stages",
    "exchange",
    "training",
    "trainer",
    "validation",
    "measuring",
    "probes",
    "comparing",
    "publishing",
    "judging",
    "exercises",
    "photos",
    "commands",
    "__main__",
]


def python_files(*folders: str) -> list[Path]:
    """Return all Python files of these folders except cnnlib/__init__.py, which imports lazily."""
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in found if path != PACKAGE / "__init__.py"]


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere, including by import_module("...")."""
    return names_in(ast.parse(path.read_text()), path)


def names_in(tree: ast.Module, path: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                assert not node.level, f"{path}:{node.lineno}: import by the full name"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            case ast.Call(
                func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]
            ):
                names.add(name)
    return names


def imports_at_the_top(path: Path) -> set[str]:
    """Dotted names that are imported when the file itself is: outside every function, and not only
    for the type checker.
    """
    statements = ast.parse(path.read_text()).body
    top = [n for n in statements if not is_definition(n) and not is_for_types(n)]
    return names_in(ast.Module(top, []), path)


def is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize(
    "path", python_files("cnnlib"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_go_downward(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in ORDER, f"cnnlib/{own} has no place yet: add it to ORDER in tests/test_layering.py"
    allowed = ORDER[: ORDER.index(own) + 1]
    upward = [
        name
        for name in imports(path)
        if name.startswith("cnnlib.") and name.split(".")[1] not in allowed
    ]
    assert not upward, f"{own} may import only what stands above it in ORDER, not {upward}"


@pytest.mark.parametrize("room", [name for name in ORDER if (PACKAGE / name).is_dir()])
def test_no_imports_in_a_circle(room: str) -> None:
    """Modules of one folder may import each other as long as no circle arises."""
    package = f"cnnlib.{room}"
    arrows = {}
    for path in python_files(f"cnnlib/{room}"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        arrows[own] = {name for name in imports_at_the_top(path) if name.startswith(package)}
    known = arrows.keys()
    graph = {
        own: {
            # `from package.module import name` names what lies in the module
            target
            for name in names
            for target in (name, name.rpartition(".")[0])
            if target in known and target not in {own, package}
        }
        for own, names in arrows.items()
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize(
    ("library", "file"),
    [("pycuda", "cnnlib/device/cuda.py"), ("cuda", "cnnlib/device/cuda_graphs.py")],
)
def test_one_file_imports_a_library_of_the_gpu(library: str, file: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in python_files("cnnlib", "workflow", "tests")
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users == {file}
