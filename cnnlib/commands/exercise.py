"""The commands of the course: exercises, their hints, their grading and their solutions."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Exercises on the stages: copies with parts left open, hints, and a check without a GPU.",
)

STAGE = Annotated[str, typer.Argument(help="A stage that has an exercise; see `exercise list`.")]


@app.command("list")
def list_exercises() -> None:
    """Print the exercises, with their parts and points."""
    from cnnlib.exercises.catalogue import NAMES, find_exercise
    from cnnlib.exercises.writing import points

    for name in NAMES:
        exercise = find_exercise(name)
        typer.echo(f"{name}: {exercise.title}")
        for part in exercise.parts:
            typer.echo(f"  {part.name} ({points(part.points)})")


@app.command()
def start(
    stage: STAGE,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; default: exercise_STAGE, here.")
    ] = None,
) -> None:
    """Write a copy of a stage in which parts are left open, and a page that says what to do."""
    from cnnlib.exercises.catalogue import find_exercise
    from cnnlib.exercises.writing import README
    from cnnlib.exercises.writing import start as write

    exercise = find_exercise(stage)
    folder = Path(f"exercise_{stage}") if out is None else out
    write(exercise, folder)
    typer.echo(f"{folder}: {len(exercise.parts)} parts are open; begin with {folder / README}")
    typer.echo(f"check it: cnnlib exercise check {folder}")


@app.command()
def hint(
    stage: STAGE,
    part: Annotated[str, typer.Argument(help="A part of the exercise.")],
    step: Annotated[int, typer.Option(help="Which of its hints, from 1 on.")] = 1,
) -> None:
    """Print one hint on a part; later ones say more."""
    from cnnlib.errors import ConfigError
    from cnnlib.exercises.catalogue import find_exercise

    found = find_exercise(stage).part(part)
    count = len(found.hints)
    if not 1 <= step <= count:
        raise ConfigError(f"--step {step}: part {part} has hints 1 to {count}")
    typer.echo(f"hint {step} of {count}: {found.hints[step - 1]}")


@app.command()
def solution(
    stage: STAGE,
    part: Annotated[
        str | None, typer.Argument(help="A part of the exercise; default: all files.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the files; default: they are printed.")
    ] = None,
) -> None:
    """Print a part as the shipped stage has it, or all files of the exercise."""
    from cnnlib.errors import ConfigError
    from cnnlib.exercises.catalogue import find_exercise
    from cnnlib.exercises.writing import write_files

    exercise = find_exercise(stage)
    files = exercise.solution()
    if part is not None:
        if out is not None:
            raise ConfigError("--out is for all files: leave out the part")
        found = exercise.part(part)
        typer.echo(found.lines(files[found.file]), nl=False)
    elif out is not None:
        write_files(files, out)
        typer.echo(f"{out}: the solution")
    else:
        for name, text in files.items():
            typer.echo(f"==> {name} <==\n{text}")


@app.command()
def check(
    path: Annotated[
        Path,
        typer.Argument(help="A folder of `start`, one file of it, or a folder of many of these."),
    ],
    json: Annotated[Path | None, typer.Option(help="A file for the grades as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="A file for a table of submissions.")] = None,
) -> None:
    """Try what is written and say of each part what is wrong, and how many points it has.

    Kernels are emulated: no GPU is needed, but a C++ compiler. Each part is tried with the solution
    in the place of the others. The code runs in a process of its own, with limits of memory and
    time. The exit code is 1 if a single submission is not all right; of many it is 0.
    """
    from cnnlib.exercises import report
    from cnnlib.exercises.grading import entries
    from cnnlib.files import check_writable, write_whole

    found = entries(path)
    outputs = {json: report.as_json, csv: report.as_csv}
    wanted = {file: write for file, write in outputs.items() if file is not None}
    check_writable(*wanted)
    reports = []
    for entry in found:
        reports.append(report.graded(entry, alone=len(found) == 1))
        typer.echo(report.as_text(reports[-1]))
    for file, write in wanted.items():
        with write_whole(file) as target:
            target.write_text(write(reports), encoding="utf-8")
        typer.echo(f"written: {file}", err=True)
    if len(reports) == 1 and not reports[0].is_right:
        raise typer.Exit(1)
