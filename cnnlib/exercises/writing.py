"""Writes the folder of an exercise: the stage with its holes, and a page that says what to do."""

import re
import textwrap
from pathlib import Path
from string import Template

from cnnlib.errors import ConfigError
from cnnlib.exercises.catalogue import TEXTS, Exercise, Part
from cnnlib.files import check_writable

README = "README.md"
WIDTH = 92
"""Columns of a task's text in the code."""


def not_written(exercise: Exercise, part: Part) -> str:
    """What a part says as long as it is not written."""
    return f"exercise {exercise.name}, part {part.name}: not written yet"


def hole(exercise: Exercise, part: Part, returns: bool) -> str:
    """The lines in the place of a part: its task, and a statement that fails and says which."""
    python = part.file.endswith(".py")
    comment = "# " if python else "// "
    text = f"Part {part.name} ({points(part.points)}). {part.task}"
    task = textwrap.indent(textwrap.fill(text, WIDTH), comment)
    why = not_written(exercise, part)
    if python:
        return f'{task}\nraise NotImplementedError("{why}")\n'
    return f'{task}\nNOT_WRITTEN("{why}");\n' + ("return {};\n" if returns else "")


def points(count: float) -> str:
    """A number of points, in words."""
    return f"{count:g} point" + "s" * (count != 1)


def with_holes(exercise: Exercise) -> dict[str, str]:
    """Name -> text of each file of the exercise, with all parts left open."""
    files = exercise.solution()
    for part in exercise.parts:
        text = files[part.file]
        body = part.find(text)
        files[part.file] = part.put(hole(exercise, part, body.returns), text)
    return files


def is_open(exercise: Exercise, part: Part, lines: str) -> bool:
    """Whether the lines of a part are still the hole."""
    return not_written(exercise, part) in lines


def as_markdown(text: str) -> str:
    """A task as Markdown, in which its stars, brackets and underscores are themselves."""
    return re.sub(r"([*<>_\[\]])", r"\\\1", text)


def page(exercise: Exercise, folder: str) -> str:
    """The text of README.md in the folder."""
    text = (TEXTS / README).read_text(encoding="utf-8")
    return Template(text).substitute(
        name=exercise.name,
        title=exercise.title,
        text=textwrap.fill(exercise.text, 118),
        count=len(exercise.parts),
        folder=folder,
        main=exercise.main,
        table="\n".join(
            f"| {part.name} | {part.points:g} | `{part.function}` in `{part.file}` |"
            for part in exercise.parts
        ),
        tasks="\n\n".join(
            f"## {part.name}\n\n{textwrap.fill(as_markdown(part.task), 118)}"
            for part in exercise.parts
        ),
    )


def start(exercise: Exercise, folder: Path) -> None:
    """Write the exercise into a folder that does not exist yet, or is empty."""
    write_files({**with_holes(exercise), README: page(exercise, folder.as_posix())}, folder)


def write_files(files: dict[str, str], folder: Path) -> None:
    """Write files into a folder that does not exist yet, or is empty; ConfigError for others."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already; choose another folder with --out")
    check_writable(*(folder / name for name in files))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


_MARK = re.compile(r"^(?:#|//) cnnlib exercise (\w+), file (\S+)\s*$")


def marked(path: Path) -> tuple[str, str] | None:
    """(exercise, file) by the first line of a file that is handed in; None without such a line."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = _MARK.match(file.readline(200))
    except OSError:
        return None
    return (found[1], found[2]) if found else None
