"""Which files a stage is made of, found by following imports and #include lines.

Nobody keeps a list: a new module or kernel file counts as soon as something uses it.
"""

import ast
import functools
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cnnlib import peers, stages
from cnnlib.paths import ROOT
from cnnlib.stages import find_stage, modules

# What reads, checks and writes, but cannot change what is computed or how it is timed.
PLUMBING = {
    "cnnlib.system.cgroups",
    "cnnlib.config",
    "cnnlib.datasets.download",
    "cnnlib.errors",
    "cnnlib.files",
    "cnnlib.paths",
    "cnnlib.measuring.freshness",
    "cnnlib.measuring.record",
    "cnnlib.system.machine",
    "cnnlib.patterns",
}
# Compares a stage with others, none of which it is made of: counted, but not followed.
JUDGES = {
    "cnnlib.validation.steps",
    "cnnlib.validation.replay",
    "cnnlib.validation.trajectory",
    "cnnlib.validation.parity",
}
KERNEL = re.compile(r"[\w.]+\.(?:cuh?|hpp|cpp)\b")


@functools.cache
def stage_sources(name: str) -> list[str]:
    """Files, relative to the repository, whose change can change a measurement of stage `name`."""
    stage = find_stage(name, "a rule")
    files = set(modules_of(name))
    if stage.runs_on == "cuda":
        files |= kernels_of(files)
    return sorted(str(path.relative_to(ROOT)) for path in files)


def modules_of(name: str) -> set[Path]:
    """The stage's own module, cnnlib.measuring.run, and whatever they import within cnnlib.

    Not followed: the list of all stages, through which each would depend on every other; and the
    devices, for a stage that runs on none.
    """
    skipped = set(PLUMBING)
    if find_stage(name, "a rule").runs_on != "cuda":
        skipped.add("cnnlib.device")
    waiting, seen = [stage_module(name), "cnnlib.measuring.run"], {"cnnlib.stages"}
    while waiting:
        module = waiting.pop()
        path = module_file(module)
        if path is None or module in seen or skipped & {module, *parents(module)}:
            continue
        seen.add(module)
        if module not in JUDGES:
            waiting += imported(path)
            waiting += parents(module)
        if module == "cnnlib.layers":  # which imports every module beside it
            waiting += (f"{module}.{each.name}" for each in pkgutil.iter_modules([path.parent]))
    seen.remove("cnnlib.stages")
    return {path for module in seen if (path := module_file(module))}


def stage_module(name: str) -> str:
    """The module of cnnlib/stages in which the stage's record stands."""
    wanted = find_stage(name, "a rule")
    if wanted in peers.PEERS:
        return "cnnlib.peers"
    for each in modules():
        module = getattr(stages, each, None)
        if module is not None and any(value is wanted for value in vars(module).values()):
            return f"cnnlib.stages.{each}"
    raise LookupError(f"stage {name!r} stands in no module of cnnlib/stages")


def parents(module: str) -> set[str]:
    """The packages that importing `module` runs too, but for cnnlib itself."""
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(2, len(parts))}


def module_file(module: str) -> Path | None:
    """The file of a module or package of this repository, if there is one."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


@functools.cache
def imported(path: Path, package: str = "cnnlib") -> tuple[str, ...]:
    """Modules of `package` that the file imports, anywhere in it, by absolute imports."""
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")), package))


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith(f"{package}."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            if node.module != package:
                yield str(node.module)
            # `from cnnlib.engine import gpu` may name a module too
            yield from (f"{node.module}.{a.name}" for a in node.names)


def code_of(*files: str) -> Callable[[Any], list[str]]:
    """An input function: `files`, whose names may hold wildcards, and what they import.

    Only modules of workflow/ are followed: how a figure looks depends on those, while a stage's
    module that names its title is no reason to draw everything again.
    """
    return lambda wildcards: _with_imports(*(file.format(**wildcards) for file in files))


@functools.cache
def _with_imports(*files: str) -> list[str]:
    waiting = [ROOT / file for file in files]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            named = imported(path, "workflow")
            modules = {*named, *(package for name in named for package in parents(name))}
            waiting += filter(None, map(module_file, modules))
    return sorted(str(path.relative_to(ROOT)) for path in seen)


def kernels_of(files: set[Path]) -> set[Path]:
    """Files of kernels/ that are named in `files`, and those that they #include."""
    known = {path.name: path for path in (ROOT / "kernels").rglob("*") if path.is_file()}
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        text = waiting.pop().read_text(encoding="utf-8")
        for name in set(KERNEL.findall(text)) & known.keys():
            if known[name] not in found:
                found.add(known[name])
                waiting.append(known[name])
    return found
