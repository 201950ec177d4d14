"""Imports the modules of stages one by one, so that a broken one leaves the others usable.

Records are checked field by field here, where the module can be named. A wrong type would otherwise
show up in the middle of a run, in code that the author of the stage has never seen.
"""

import importlib
import inspect
import pkgutil
import re
import traceback
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TypeGuard, cast, get_args

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.engine import Engine, Stage
from cnnlib.engine.plans import EngineOfPlans
from cnnlib.layers import Layer
from cnnlib.stages._ladder import in_order

FOLDER = Path(__file__).parent

BROKEN: dict[str, str] = {}
"""Stages that cannot be used and why, by name; by the module's if the stage's is unknown."""

_MODULES: list[tuple[Stage, str]] = []
"""Every sound record, with its file."""


def modules() -> list[str]:
    """The modules and packages of this folder, but for those whose name begins with _."""
    found = [module.name for module in pkgutil.iter_modules([str(FOLDER)])]
    return sorted(name for name in found if not name.startswith("_"))


def records(names: Iterable[str]) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """(the ladder, variants of its stages): STAGE and VARIANTS of these modules of the folder.

    What is broken is left out and noted in BROKEN.
    """
    rungs: list[Stage] = []
    variants: dict[str, list[Stage]] = {}
    for name in names:
        module, problem = _imported(name)
        if module is None:
            BROKEN[name] = problem
            continue
        stage = getattr(module, "STAGE", None)
        if _accept(stage, name, "STAGE"):
            rungs.append(stage)
        more = getattr(module, "VARIANTS", ())
        if isinstance(more, tuple):
            variants[name] = [each for each in more if _accept(each, name, "a variant")]
        else:
            BROKEN[name] = (
                f"{_file(name)}: VARIANTS is a {type(more).__name__}, not a tuple of Stages (is "
                "there a comma after the last one?)"
            )
    ladder, wrong = in_order(rungs, BROKEN)
    for stage, problem in wrong:
        BROKEN[stage.name] = f"{module_of(stage)}: {problem}"
    places = {module_of(stage): place for place, stage in enumerate(ladder)}
    in_turn = sorted(variants, key=lambda name: places.get(_file(name), len(places)))
    return tuple(ladder), tuple(each for name in in_turn for each in variants[name])


def _imported(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and in one line why it cannot be imported."""
    try:
        return importlib.import_module(f"cnnlib.stages.{name}"), ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() too: it ends the module, not the program
        return None, " ".join(f"{_file(name)}: {_reason(error)}".split())


def _accept(stage: object, module: str, what: str) -> TypeGuard[Stage]:
    """Whether a module's object is a sound Stage; what is wrong with it is noted in BROKEN."""
    if stage is None:
        problem = f"{_file(module)} has no {what}"
    elif why := fault(stage):
        problem = f"{_file(module)}: {what}{why}"
    else:
        _MODULES.append((cast(Stage, stage), _file(module)))
        return True
    name = getattr(stage, "name", None)
    BROKEN[name if isinstance(name, str) else module] = " ".join(problem.split())
    return False


def _file(module: str) -> str:
    """The path of a module or package of this folder, for messages."""
    package = (FOLDER / module / "__init__.py").exists()
    return f"cnnlib/stages/{module}" + ("/__init__.py" if package else ".py")


def _reason(error: BaseException) -> str:
    """What went wrong while a module was imported, with file and line."""
    if isinstance(error, SyntaxError):
        where = _shown(error.filename or "?")
        return f"{error.msg} ({where}, line {error.lineno})"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).parent == FOLDER and frame.filename != __file__:
            return f"{text} ({_shown(frame.filename)}, line {frame.lineno})"
    return text


def _shown(file: str) -> str:
    path = Path(file)
    return f"cnnlib/stages/{path.name}" if path.parent == FOLDER else str(path)


def fault(stage: object) -> str:
    """What is wrong with an object that should be a Stage; "" if nothing is."""
    if not isinstance(stage, Stage):
        hint = " (is there a comma after its last bracket?)" if isinstance(stage, tuple) else ""
        if isinstance(stage, type) and issubclass(stage, Stage):
            hint = " (Stage itself; a record is Stage(name=..., ...))"
        return f" is a {type(stage).__name__}, not a Stage{hint}"
    for field, wanted, right in _expectations(stage):
        if not right:
            return f".{field} is {_brief(getattr(stage, field))}, not {wanted}"
    missing = sorted(getattr(stage.engine, "__abstractmethods__", ()))
    if missing:
        return f".engine is {stage.engine.__name__}, which lacks {', '.join(missing)}"
    options = stage.engine.options_class
    if stage.options is not None and not isinstance(stage.options, options):
        return f".options is {_brief(stage.options)}, not {options.__name__}(...) or None"
    if stage.operators and issubclass(stage.engine, EngineOfPlans):
        return (
            ".operators would not be used: its plans have operators of their own; begin with the "
            "record of a plan, such as tuned.PERSISTENT"
        )
    return ""


def _expectations(stage: Stage) -> list[tuple[str, str, bool]]:
    """For each field: its name, what it should be, and whether it is."""
    where = get_args(Stage.__annotations__["runs_on"])
    return [
        (
            "name",
            "a name of letters, digits, - and _",
            isinstance(stage.name, str) and re.fullmatch(r"[\w-]+", stage.name) is not None,
        ),
        ("title", "a text", isinstance(stage.title, str)),
        ("change", "a text", isinstance(stage.change, str)),
        ("after", "the name of a stage", isinstance(stage.after, str)),
        ("color", "a colour such as '#0072b2'", _is_color(stage.color)),
        ("marker", "a character", isinstance(stage.marker, str) and len(stage.marker) <= 1),
        ("runs_on", " or ".join(map(repr, where)), stage.runs_on in where),
        (
            "engine",
            "a class derived from Engine",
            inspect.isclass(stage.engine) and issubclass(stage.engine, Engine),
        ),
        (
            "operators",
            "a mapping from tuples of kinds of layers, as in {(Conv, Activation): ...}",
            isinstance(stage.operators, Mapping) and all(map(_is_run, stage.operators)),
        ),
        ("dtype", "a kind of floating point number", _is_floating(stage.dtype)),
        (
            "rounding",
            "a positive number or None",
            stage.rounding is None or _is_positive(stage.rounding),
        ),
        ("slack", "a positive number", _is_positive(stage.slack)),
        (
            "conv_weight_slack",
            "a positive number or None",
            stage.conv_weight_slack is None or _is_positive(stage.conv_weight_slack),
        ),
        (
            "threads",
            "a whole number from 1 on or None",
            stage.threads is None or (type(stage.threads) is int and stage.threads >= 1),
        ),
    ]


def _is_color(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch("(#[0-9a-fA-F]{6})?", text) is not None


def _is_run(key: object) -> bool:
    return (
        isinstance(key, tuple)
        and len(key) > 0
        and all(inspect.isclass(kind) and issubclass(kind, Layer) for kind in key)
    )


def _is_floating(dtype: object) -> bool:
    try:
        return dtype is not None and np.issubdtype(np.dtype(cast(DTypeLike, dtype)), np.floating)
    except TypeError:
        return False


def _is_positive(value: object) -> bool:
    return type(value) is not bool and isinstance(value, Real) and float(value) > 0


def _brief(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def module_of(stage: Stage) -> str:
    """The path of a record's file, for messages."""
    for known, module in _MODULES:
        if known is stage:
            return module
    return "cnnlib/peers/__init__.py"
