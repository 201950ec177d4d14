"""Imports in cnnlib go downward only, and PyCUDA stays behind one file."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cnnlib"
# A module imports from those above it. A new module or folder of cnnlib gets its place here.
ORDER = [
    "errors",
    "patterns",
    "files",
    "cgroups",
    "machine",
    "records",
    "layers",
    "network",
    "schedule",
    "shuffle",
    "weights",
    "datasets",
    "config",
    "device",
    "engine",
    "peers",
    "stages",
    "experiment",
    "freshness",
    "stopping",
    "supervise",
    "training",
    "decisions",
    "validate",
    "descent",
    "replay",
    "trajectory",
    "neighbours",
    "sampling",
    "learning",
    "measure",
    "race",
    "transfers",
    "functions",
    "features",
    "apart",
    "probes",
    "ink",
    "imaging",
    "commands",
    "__main__",
]


def python_files(*folders: str) -> list[Path]:
    """Python files of the project, cnnlib/__init__.py (which imports nothing) left out."""
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in found if path != PACKAGE / "__init__.py"]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in the file and also by import_module("...")."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_one_file_imports_pycuda() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in python_files("cnnlib", "workflow", "tests")
        if any(name.split(".")[0] == "pycuda" for name in imports(path))
    }
    assert users == {"cnnlib/device/cuda.py"}
