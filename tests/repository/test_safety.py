"""No source file calls anything that could execute what it has read."""

import ast
from pathlib import Path

import pytest

from cnnlib.paths import ROOT
from tests.repository.test_layering import PACKAGE, python_files

FILES = [*python_files("cnnlib", "workflow", "requirements"), PACKAGE / "__init__.py"]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "extractall",
    "read_pickle",
}
# What this module unpickles was pickled by a process forked from its own, in memory that only the
# two of them share: nothing is read.
FORKED = {"cnnlib/system/shared_page.py": {"pickle"}}


def forbidden(source: str) -> list[str]:
    """Return `line: name` for every call in a source that could execute its input."""
    found = []
    tree = ast.parse(source)
    safe = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, node.bases)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)] if node.module in MODULES else []
        elif isinstance(node, ast.Call):
            names = called(node, safe)
        found += [f"{node.lineno}: {name}" for name in names]
    return found


def called(node: ast.Call, safe: set[str]) -> list[str]:
    """Return the forbidden name that a call uses, in a list that is empty for an innocent call."""
    name = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    last = name.split(".")[-1]
    loader = ast.unparse(node.args[-1]).split(".")[-1] if node.args else ""
    wrong = (
        (name in CALLS or last in {"extractall", "read_pickle"})
        or (name == "np.load" and given.get("allow_pickle") != "False")
        or (name == "torch.load" and given.get("weights_only") != "True")
        or (name == "yaml.load" and loader not in {*safe, "SafeLoader"})
        or given.get("shell") == "True"
    )
    return [name] if wrong else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_executed(path: Path) -> None:
    allowed = FORKED.get(path.relative_to(ROOT).as_posix(), set())
    found = [line for line in forbidden(path.read_text()) if line.split(": ")[1] not in allowed]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "exec(open(name).read())",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(place)",
        "os.system(command)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pd.read_pickle(path)",
    ],
)
def test_it_would_be_found(line: str) -> None:
    assert len(forbidden(line)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "np.load(path, allow_pickle=False)",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "device.compile(source)",
        "class Own(yaml.SafeLoader):\n    pass\nyaml.load(text, Own)",
        "subprocess.run([command])",
    ],
)
def test_what_is_safe_is_not(text: str) -> None:
    assert forbidden(text) == []
