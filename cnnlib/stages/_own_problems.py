"""What is wrong with a stage's file from outside the repository, in one line with its line number.

The file may not be importable, so what is said about it is found in its text.
"""

import ast
import os
import re
import traceback
from pathlib import Path

from cnnlib import patterns
from cnnlib.engine import OwnLoop, Stage
from cnnlib.stages._loading import fault


def problem_of_import(error: BaseException, file: Path) -> str:
    """What went wrong while a file was imported, with the innermost line of the author's."""
    if isinstance(error, SyntaxError):
        name = shown(Path(error.filename)) if error.filename else shown(file)
        return _one_line(f"{error.msg} ({name}, line {error.lineno})")
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frame = _innermost(error, file)
    return _one_line(
        f"{text} ({shown(Path(frame.filename))}, line {frame.lineno})" if frame else text
    )


def library_missing(error: BaseException, file: Path) -> str:
    """Which library a file needs and does not find; "" for any other error.

    A library that is installed may itself lack another one, such as that of a GPU's driver.
    """
    if not isinstance(error, ImportError):
        return ""
    frame = _innermost(error, file)
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").split(".")[0]
        if not library or library == "cnnlib":
            return ""
        why = f"needs {library}, which is not installed"
    elif frame is not None and frame.filename == _last(error):
        return ""  # the file asks a library for something that it does not have
    else:
        why = f"needs a library that cannot be imported here: {error}"
    return _one_line(f"{why} ({shown(file)}, line {frame.lineno})" if frame else why)


def problem_of_record(stage: object, file: Path) -> str:
    """What is wrong with the object that should be a file's record; "" if nothing is."""
    if stage is None:
        return f"{shown(file)} has no STAGE"
    why = fault(stage)
    if not why:
        name = str(getattr(stage, "name", ""))
        if not re.fullmatch(patterns.NAME, name) or len(name) > patterns.LONGEST_NAME:
            why = f".name is {name!r}, not a name of {patterns.WORDS[patterns.NAME]}"
    if not why and isinstance(stage, Stage):
        loop = issubclass(stage.engine, OwnLoop)
        if loop and stage.runs_on == "cuda":
            why = (
                ".runs_on is 'cuda', which is for engines of cnnlib's kernels; a loop that takes a "
                "GPU where there is one says 'any'"
            )
    if not why:
        return ""
    line = _line_of_record(file)
    return _one_line(f"{shown(file)}{f', line {line}' if line else ''}: STAGE{why}")


def name_in(file: Path) -> str:
    """The stage's name as the text of its file has it, or else made of the file's name."""
    call = getattr(_record(file), "value", None)
    for keyword in getattr(call, "keywords", ()):
        name = getattr(keyword.value, "value", "") if keyword.arg == "name" else ""
        if isinstance(name, str) and re.fullmatch(patterns.NAME, name):
            return name
    stem = file.parent.name if file.name == "__init__.py" else file.stem
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem).lstrip("_-") or "stage"


def shown(file: Path) -> str:
    """A file as a user would write it: relative to the working directory if it lies below that."""
    folder = os.getcwd()
    return f"./{file.relative_to(folder)}" if file.is_relative_to(folder) else str(file)


def _record(file: Path) -> ast.Assign | ast.AnnAssign | None:
    """The statement of a file that assigns STAGE."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    for node in reversed(body):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "STAGE":
            return node
        if isinstance(node, ast.Assign) and "STAGE" in map(ast.unparse, node.targets):
            return node
    return None


def _line_of_record(file: Path) -> int | None:
    found = _record(file)
    return found.lineno if found else None


def _innermost(error: BaseException, file: Path) -> traceback.FrameSummary | None:
    """The innermost frame that lies in the file's folder."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(file.parent):
            return frame
    return None


def _last(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
