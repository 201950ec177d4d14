"""The command that compares two folders of results."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnnlib.commands.options import columns

if TYPE_CHECKING:
    from cnnlib.comparing.comparison import Comparison
    from cnnlib.comparing.results import Results


def compare(
    a: Annotated[Path, typer.Argument(help="A folder of results: the earlier, or the usual.")],
    b: Annotated[Path | None, typer.Argument(help="The folder to be compared with it.")] = None,
    threshold: Annotated[
        float, typer.Option(help="Percent that count at least; noisy runs need more anyway.")
    ] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Write a page (HTML) there.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all that is found there.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the verdicts there.")] = None,
    halves: Annotated[
        bool, typer.Option("--halves", help="Without B: how far verdicts on A's repeats are right.")
    ] = False,
) -> None:
    """Compare two folders of results, run by run: is B faster or slower than A?

    First come differences of machine, driver, clocks, commit, settings and versions; then, for
    every stage, network and batch size of both, the ratio of the medians with its interval, and
    faster, slower, same or unsure. A folder is that of an experiment (results), published results
    (results/reference/MACHINE) or a folder of raw tables.

    The exit code is 1 if B is slower than A beyond the threshold, or fails where A does not.
    """
    from cnnlib.comparing import page, written
    from cnnlib.comparing.comparison import compare as compare_folders
    from cnnlib.comparing.results import read
    from cnnlib.errors import ConfigError
    from cnnlib.files import check_writable

    if not 0 <= threshold < 100:
        raise ConfigError(f"--threshold must be from 0 to 100, in percent, not {threshold:g}")
    if halves != (b is None):
        raise ConfigError("compare takes two folders, or one folder with --halves")
    if b is None:
        if out or json or csv:
            raise ConfigError("--halves writes no files; leave out --out, --json and --csv")
        show_halves(read(a))
        return
    if out:
        page.check_libraries()
    check_writable(*filter(None, (out, json, csv)))
    found = compare_folders(a, b, threshold / 100)
    show(found)
    for path, write in ((json, written.write_json), (csv, written.write_csv), (out, page.write)):
        if path is not None:
            write(path, found)
            typer.echo(f"written: {path}")
    if found.regressions:
        raise typer.Exit(1)


def show(comparison: "Comparison") -> None:
    """Print the comparison: differences, stages, runs, what is left out, the verdict."""
    from cnnlib.comparing import written

    typer.echo(f"A: {comparison.a}\nB: {comparison.b}\n")
    typer.echo(
        written.nothing_differs(comparison)
        or columns([written.DIFFERENCE_HEADS, *written.difference_rows(comparison)])
    )
    if comparison.lines:
        lines = [written.line_cells(each) for each in comparison.lines]
        typer.echo(f"\n{columns([written.LINE_HEADS, *lines])}")
    if comparison.runs:
        runs = [written.run_cells(each) for each in comparison.runs]
        typer.echo(f"\n{columns([written.RUN_HEADS, *runs])}")
    if comparison.left_out:
        typer.echo("\nnot compared")
        for line in written.left_out_lines(comparison.left_out):
            typer.echo(f"  {line}")
    typer.echo("\n" + "\n".join(written.notes(comparison)))
    typer.echo(written.summary(comparison))
    for line in comparison.regressions:
        typer.echo(f"REGRESSION: {line}")


def show_halves(results: "Results") -> None:
    """Print how often halves of the repeats seem to differ, and which slowdowns are found."""
    from cnnlib.comparing import halves
    from cnnlib.errors import DataError

    pairs = list(halves.halves(results))
    if not pairs:
        raise DataError(
            f"no run in {results.folder} has {halves.LEAST_REPEATS} repeats, two for each half"
        )
    typer.echo("\n".join(halves.in_words(halves.compared(pairs))))
