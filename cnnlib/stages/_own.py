"""Stages from outside the repository: of a Python file, or of an installed package's entry points.

A file is imported under a name that no import statement can mean, so that it may be called like any
other module. Its folder goes to the end of Python's search path: the file can import what lies
beside it, and nothing that lies there takes the place of a library.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from cnnlib.engine import Stage
from cnnlib.errors import BrokenStage, ConfigError
from cnnlib.stages._own_files import digest_of, own_files, siblings
from cnnlib.stages._own_problems import (
    library_missing,
    name_in,
    problem_of_import,
    problem_of_record,
)
from cnnlib.stages._unusable import Unusable, unusable
from cnnlib.system import traces

GROUP = "cnnlib.stages"
"""The group of entry points by which an installed package brings stages."""


@dataclass(frozen=True)
class Own:
    """A stage from outside the repository, and where it comes from."""

    stage: Stage
    source: str
    """What messages call it: the path as it was given, or the entry point."""
    file: Path
    files: tuple[Path, ...]
    """What the stage is made of; see cnnlib/stages/_own_files.py."""
    digest: str
    """Hexadecimal SHA-256 of these files, as they were when the stage was imported."""

    @classmethod
    def of(cls, stage: Stage, source: str, file: Path, files: tuple[Path, ...]) -> "Own":
        """The stage of a file that is made of `files`.

        One that lacks a library has another digest than once that is installed.
        """
        digest = digest_of(files, file.parent)
        if issubclass(stage.engine, Unusable):
            digest = hashlib.sha256(f"{digest} {stage.change}".encode()).hexdigest()
        return cls(stage, source, file, files, digest)


_loaded: dict[str, Own] = {}
"""By file, or by entry point."""
_loading: set[str] = set()
_declared: dict[str, None] = {}
_known: dict[str, str] = {}


def is_path(entry: str) -> bool:
    """Whether an entry of sweep.stages or --stage is the path of a file, not a stage's name."""
    return "/" in entry or os.sep in entry or entry.endswith(".py")


def declare(entries: Iterable[str]) -> None:
    """Note the paths among these entries of a config: stages may be asked for by their names."""
    _declared.update(dict.fromkeys(entry for entry in entries if is_path(entry)))


def know(name: str, entry: str) -> None:
    """Note that the file at the path `entry` has the stage called `name`, if `entry` is a path."""
    if is_path(entry):
        _known[name] = entry


def file_of(entry: str, where: str) -> Path:
    """The Python file that a path means, absolute: itself, or the __init__.py of a package.

    A relative path starts at the working directory, as all others in a config do. Raises
    ConfigError naming `where` if there is no such file.
    """
    path = Path(os.path.abspath(Path(entry).expanduser()))
    if path.is_dir():
        if not (path / "__init__.py").is_file():
            raise ConfigError(f"{entry} in {where} is a folder without an __init__.py")
        return path / "__init__.py"
    if not path.is_file():
        raise ConfigError(f"{entry} in {where}: there is no file {path}")
    if path.suffix != ".py":
        raise ConfigError(f"{entry} in {where} is no Python file: its name does not end in .py")
    return path


def load_path(entry: str, where: str) -> Own:
    """The stage STAGE of the file at a path, which is imported once in a process.

    Raises ConfigError if there is no such file; BrokenStage, with the line, if it is broken.
    """
    file = file_of(entry, where)

    def load() -> Own:
        module, stage = _import(entry, file, where)
        if stage is None:
            stage = getattr(module, "STAGE", None)
            if why := problem_of_record(stage, file):
                raise _broken(entry, where, why)
            assert isinstance(stage, Stage)
        return Own.of(stage, entry, file, own_files(file))

    return _once(str(file), entry, where, load)


def load_installed(point: EntryPoint, where: str) -> Own:
    """The stage that an installed package brings by an entry point of the stage's name.

    The entry point's value is `module:RECORD`, or `module` for its STAGE.
    """
    source = f"entry point {point.name} = {point.value!r}"

    def load() -> Own:
        spec, file = None, Path(point.module)
        try:
            with _sheltered(source):
                spec = importlib.util.find_spec(point.module)
                found = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if spec and spec.origin:
                file = Path(spec.origin)
            if why := library_missing(error, file):
                return Own.of(
                    unusable(point.name, why), source, file, _installed_files(file, point)
                )
            raise _broken(source, where, problem_of_import(error, file)) from None
        file = Path(spec.origin) if spec and spec.origin else file
        stage = getattr(found, "STAGE", None) if isinstance(found, ModuleType) else found
        if why := problem_of_record(stage, file):
            raise _broken(source, where, why)
        assert isinstance(stage, Stage)
        if stage.name != point.name:
            raise _broken(source, where, f"the name of its stage is another, {stage.name!r}")
        return Own.of(stage, source, file, _installed_files(file, point))

    return _once(source, source, where, load)


def _installed_files(file: Path, point: EntryPoint) -> tuple[Path, ...]:
    """The whole package that an entry point's module belongs to, or the module alone."""
    above = point.module.count(".") - (file.name != "__init__.py")
    if above < 0:
        return own_files(file, alone=True) if file.is_file() else ()
    return own_files(file.parents[above] / "__init__.py")


def find_own(name: str, where: str) -> Own | None:
    """The stage of this name from outside, if there is one: loaded, installed or declared."""
    for own in _loaded.values():
        if own.stage.name == name:
            return own
    if name in _known:
        return load_path(_known[name], where)
    points = [point for point in installed() if point.name == name]
    if len({point.value for point in points}) > 1:
        values = " and ".join(sorted({repr(point.value) for point in points}))
        raise BrokenStage(
            f"stage {name!r} in {where} is ambiguous: entry points {values} of group {GROUP} both "
            "have it; rename one"
        )
    if points:
        return load_installed(points[0], where)
    for entry in list(_declared):
        with contextlib.suppress(ConfigError):  # reported where it is asked for by its path
            if (own := load_path(entry, where)).stage.name == name:
                return own
    return None


@functools.cache
def installed() -> tuple[EntryPoint, ...]:
    """The entry points by which installed packages bring stages."""
    return tuple(entry_points(group=GROUP))


def own_of(stage: Stage) -> Own | None:
    """Where a stage comes from, if it comes from outside the repository."""
    return next((own for own in _loaded.values() if own.stage is stage), None)


def loaded() -> tuple[Own, ...]:
    """The stages from outside that this process has loaded."""
    return tuple(_loaded.values())


def forget() -> None:
    """Forget the stages that this process has loaded, so that their files are imported again."""
    _loaded.clear()


def _once(key: str, source: str, where: str, load: Callable[[], Own]) -> Own:
    """What `load` returns, at the first call for this key; later ones return the same."""
    if key in _loaded:
        return _loaded[key]
    if key in _loading:
        raise _broken(source, where, "it asks for itself while it is imported")
    _loading.add(key)
    try:
        own = load()
    finally:
        _loading.discard(key)
    for other in _loaded.values():
        if other.stage.name == own.stage.name:
            why = f"its name, {own.stage.name!r}, is also that of {other.source}; rename one"
            raise _broken(source, where, why)
    _loaded[key] = own
    return own


def _import(entry: str, file: Path, where: str) -> tuple[ModuleType | None, Stage | None]:
    """The module of a file; or a stage that says which library the file lacks."""
    tag = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    package = file.name == "__init__.py"
    name = f"cnnlib_own_{tag}_{file.parent.name if package else file.stem}"
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(file.parent)] if package else None
    )
    if spec is None or spec.loader is None:
        raise _broken(entry, where, "Python cannot import it")
    module = importlib.util.module_from_spec(spec)
    if not package and str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    traces.watch(file.parent)
    try:
        with _sheltered(str(file)):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() too: it ends the file, not the program
        del sys.modules[name]
        if why := library_missing(error, file):
            return None, unusable(name_in(file), why)
        raise _broken(entry, where, problem_of_import(error, file)) from None
    if why := _shadowed(file):
        raise _broken(entry, where, why)
    return module, None


@contextlib.contextmanager
def _sheltered(argument: str) -> Iterator[None]:
    """Import a module: what it prints goes to stderr, and it sees no command's arguments."""
    arguments, sys.argv = sys.argv, [argument]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv = arguments


def _shadowed(file: Path) -> str:
    """Which module that lies beside a file its import statements do not get; "" if there is none.

    A library has the same name, or a file beside another stage.
    """
    for name in sorted(siblings(file)):
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            if spec and not (spec.origin and Path(spec.origin).is_relative_to(file.parent)):
                return (
                    f"import {name} means {spec.origin or name}, not the file beside it; rename it"
                )
    return ""


def _broken(source: str, where: str, why: str) -> BrokenStage:
    return BrokenStage(f"stage {source} in {where} cannot be used: {why}")
