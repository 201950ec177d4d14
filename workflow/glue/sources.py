"""Which files a stage, a figure or a measurement is made of: imports and #include lines, followed.

There is no list to keep: a new module or kernel file counts as soon as something uses it.
"""

import ast
import functools
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from cnnlib import peers, stages
from cnnlib.measuring.cards import card_of
from cnnlib.paths import KERNELS, ROOT
from cnnlib.stages import find_stage
from cnnlib.stages._loading import modules

PLUMBING = {
    "cnnlib.config",
    "cnnlib.config_errors",
    "cnnlib.config_files",
    "cnnlib.datasets.download",
    "cnnlib.errors",
    "cnnlib.files",
    "cnnlib.measuring.freshness",
    "cnnlib.measuring.record",
    "cnnlib.paths",
    "cnnlib.patterns",
    "cnnlib.system",
}
"""Modules and packages that read, check, watch and write, but take no part in what is computed."""
JUDGES = {"cnnlib.validation"}
"""Packages that compare a stage with others, and so import these: counted, but not followed."""
STAGES = "cnnlib.stages"
"""The list of all stages, through which each of them would depend on every other."""
DEVICE = "cnnlib.device"
LAYERS = "cnnlib.layers"
"""A package that imports every module of its folder, whatever their names are."""

KERNEL = re.compile(r"[\w./]+\.(?:cuh?|hpp|cpp)\b")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@functools.cache
def stage_sources(name: str) -> list[str]:
    """Files, relative to the repository, whose change can change a measurement of stage `name`.

    They are the stage's own module (or the files of a stage from outside the repository),
    cnnlib.measuring.run, what both import, and the kernels that these files name. A stage that runs
    on no device does not depend on the devices.
    """
    card = card_of(name, "a rule")
    on_gpu = card.runs_on == "cuda"
    start: list[Path | None] = [Path(file) for file in card.files]
    start = start or [module_file(stage_module(name))]
    start.append(module_file("cnnlib.measuring.run"))
    files = follow(filter(None, start), PLUMBING if on_gpu else {*PLUMBING, DEVICE})
    return relative(files | kernels_of(files) if on_gpu else files)


def code_of(*files: str) -> Callable[[Any], list[str]]:
    """An input function: `files`, whose names may hold wildcards, and what they are made of.

    A file of workflow/ is followed within workflow/: a figure is drawn again for a new layout, but
    not for an edit of a stage whose title it writes. A file of cnnlib/ is followed up to the
    devices; for those, and for the stage, a rule has sources/{stage}.sha256.
    """
    return lambda wildcards: _code(*(file.format(**wildcards) for file in files))


@functools.cache
def _code(*files: str) -> list[str]:
    found: set[Path] = set()
    for path in (ROOT / file for file in files):
        if path.suffix == ".py":
            found |= follow([path], {*PLUMBING, DEVICE}, path.relative_to(ROOT).parts[0])
        else:
            found |= {path, *kernels_of({path})}
    return relative(found)


def relative(files: Iterable[Path]) -> list[str]:
    """Names of the files, sorted: within the repository, or else as the working directory has them.

    A job's working directory is the repository's.
    """
    folders = [ROOT, Path.cwd()]
    inside = {path: next(filter(path.is_relative_to, folders), Path("/")) for path in files}
    return sorted(
        str(path if folder == Path("/") else path.relative_to(folder))
        for path, folder in inside.items()
    )


def follow(start: Iterable[Path], skipped: Collection[str], package: str = "cnnlib") -> set[Path]:
    """The Python files `start`, those of `package` that they import, what these import, and so on.

    Modules and packages in `skipped` are left out, and so is the list of all stages.
    """
    waiting, found = list(start), set()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix != ".py":
            continue  # another file of a stage from outside the repository
        if JUDGES & packages(module_name(path)):
            continue
        named = {name for each in imported(path, package) for name in packages(each)}
        if module_name(path) == LAYERS:
            named |= {f"{LAYERS}.{each.name}" for each in pkgutil.iter_modules([path.parent])}
        for module in named:
            file = module_file(module)
            if file and module != STAGES and not packages(module) & set(skipped):
                waiting.append(file)
    return found


def stage_module(name: str) -> str:
    """The module or package of cnnlib/stages that has the stage's record."""
    wanted = find_stage(name, "a rule")
    if wanted in peers.PEERS:
        return "cnnlib.peers"
    for each in modules():
        # a module that cannot be imported is no attribute
        module = getattr(stages, each, None)
        if module is not None and any(value is wanted for value in vars(module).values()):
            return f"{STAGES}.{each}"
    raise LookupError(f"no module of cnnlib/stages has the record of stage {name!r}")


def packages(module: str) -> set[str]:
    """`module` and the packages that importing it runs too, but for the outermost."""
    parts = module.split(".")
    return {".".join(parts[: i + 1]) for i in range(1, len(parts))}


def module_name(path: Path) -> str:
    """The dotted name of a Python file of this repository; "" for any other file."""
    if not path.is_relative_to(ROOT):
        return ""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_file(module: str) -> Path | None:
    """The file of a module or package of this repository, if there is one."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


@functools.cache
def imported(path: Path, package: str) -> tuple[str, ...]:
    """Modules of `package` that the file imports, anywhere in it, by absolute imports."""
    return tuple(_imports(syntax_of(path), package))


def syntax_of(path: Path) -> ast.AST:
    """The syntax tree of a Python file; an empty one for a file that Python cannot read."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # whoever runs it will complain
        return ast.Module([], [])


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith(f"{package}."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            yield str(node.module)
            # `from cnnlib.engine import gpu` may name a module too
            yield from (f"{node.module}.{a.name}" for a in node.names)


def kernels_of(files: Iterable[Path]) -> set[Path]:
    """Files of kernels/ that are named in `files`, those that they #include, and so on."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        for name in kernel_names(path):
            new = kernel_files(name, path.parent) - found
            found |= new
            waiting += new
    return found


@functools.cache
def kernel_names(path: Path) -> frozenset[str]:
    """Names of kernel files in the strings of a Python file, or the #include lines of a kernel.

    Comments and docstrings, which may mention any file, do not count.
    """
    if path.suffix != ".py":
        return frozenset(INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace")))
    nodes = list(ast.walk(syntax_of(path)))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    return frozenset(name for each in texts for name in KERNEL.findall(each))


@functools.cache
def kernel_files(name: str, folder: Path) -> set[Path]:
    """The file of kernels/ that a file in `folder` means by `name`; if unclear, all that it may be.

    Names are relative to that folder, to kernels/ or to the repository, or end like the file's.
    """
    name = name.lstrip("/")  # of a text such as f"{folder}/conv.cuh"
    for base in (folder, KERNELS, ROOT):
        path = (base / name).resolve()
        if path.is_relative_to(KERNELS) and path.is_file():
            return {path}
    return {path for path in KERNELS.rglob(Path(name).name) if str(path).endswith(f"/{name}")}
