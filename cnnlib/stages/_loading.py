"""Imports the modules of stages one by one, so that a broken one leaves the others usable.

Records are checked field by field here, where the module can be named. A wrong type would otherwise
show up in the middle of a run, in code that the author of the stage has never seen.
"""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cnnlib.engine import Engine, Stage
from cnnlib.layers import Layer

FOLDER = Path(__file__).parent

BROKEN: dict[str, str] = {}
"""Why stages cannot be used, by name; by the module's name if the stage's own is not known."""

_MODULES: list[tuple[Stage, str]] = []
"""Each record with the file it was found in."""


def records(*entries: str | Stage) -> tuple[Stage, ...]:
    """The stages of these modules: "gemm" is STAGE of gemm.py, "fused.PULL" PULL of fused.py.

    An entry may also be a record itself. Broken ones are left out and noted in BROKEN.
    """
    return tuple(stage for entry in entries if (stage := _record(entry)) is not None)


def _record(entry: Any) -> Stage | None:
    if not isinstance(entry, str):
        return _given(entry)
    module, _, attribute = entry.partition(".")
    attribute = attribute or "STAGE"
    stage: Any = None
    problem = ""
    try:
        stage = getattr(importlib.import_module(f"cnnlib.stages.{module}"), attribute, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() too: it ends the module, not the program
        problem = f"cnnlib/stages/{module}.py: {_reason(error)}"
    else:
        if stage is None:
            problem = f"cnnlib/stages/{module}.py has no {attribute}"
        elif why := fault(stage):
            problem = f"cnnlib/stages/{module}.py: {attribute}{why}"
    if not problem:
        _MODULES.append((stage, f"cnnlib/stages/{module}.py"))
        return stage  # type: ignore[no-any-return]
    problem = " ".join(problem.split())
    name = getattr(stage, "name", None)
    if not isinstance(name, str):
        name = module if attribute == "STAGE" else entry
    BROKEN[name] = problem
    return None


def _given(entry: Any) -> Stage | None:
    """Check an entry that is not the name of a module: it has to be a record."""
    listing = "cnnlib/stages/__init__.py"
    if not (why := fault(entry)):
        _MODULES.append((entry, listing))
        return entry  # type: ignore[no-any-return]
    for each in entry if isinstance(entry, tuple) else (entry,):
        name = getattr(each, "name", None)
        BROKEN[name if isinstance(name, str) else _brief(each)] = f"{listing}: an entry{why}"
    return None


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


def fault(stage: Any) -> str:
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
    return ""


def _expectations(stage: Stage) -> list[tuple[str, str, bool]]:
    """(field, what it should be, whether it is)."""
    where = get_args(Stage.__annotations__["runs_on"])
    return [
        ("name", "a name of letters, digits, - and _",
         isinstance(stage.name, str) and re.fullmatch(r"[\w-]+", stage.name) is not None),
        ("title", "a text", isinstance(stage.title, str)),
        ("change", "a text", isinstance(stage.change, str)),
        ("runs_on", " or ".join(map(repr, where)), stage.runs_on in where),
        ("engine", "a class derived from Engine",
         inspect.isclass(stage.engine) and issubclass(stage.engine, Engine)),
        ("operators", "a mapping from tuples of kinds of layers, as in {(Conv, Activation): ...}",
         isinstance(stage.operators, Mapping) and all(map(_is_run, stage.operators))),
        ("dtype", "a kind of floating point number", _is_floating(stage.dtype)),
        ("rounding", "a positive number or None",
         stage.rounding is None or _is_positive(stage.rounding)),
        ("slack", "a positive number", _is_positive(stage.slack)),
        ("conv_weight_slack", "a positive number or None",
         stage.conv_weight_slack is None or _is_positive(stage.conv_weight_slack)),
        ("threads", "a whole number from 1 on or None",
         stage.threads is None or (type(stage.threads) is int and stage.threads >= 1)),
    ]  # fmt: skip


def _is_run(key: Any) -> bool:
    return (
        isinstance(key, tuple)
        and len(key) > 0
        and all(inspect.isclass(kind) and issubclass(kind, Layer) for kind in key)
    )


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(np.issubdtype(np.dtype(dtype), np.floating)) and dtype is not None
    except TypeError:
        return False


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and float(value) > 0


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def module_of(stage: Stage) -> str:
    """The file that holds a record."""
    for known, module in _MODULES:
        if known is stage:
            return module
    return "cnnlib/peers/__init__.py"


def unlisted(name: str) -> bool:
    """Whether there is a module of this name that is in no list of stages."""
    return (
        re.fullmatch(r"[A-Za-z]\w*", name) is not None
        and (FOLDER / f"{name}.py").exists()
        and f"cnnlib.stages.{name}" not in sys.modules
    )
