"""The command that makes a machine's results ready to be published."""

from pathlib import Path
from typing import Annotated

import typer


def submit(
    machine: Annotated[str, typer.Option(help="The machine's name, such as nvidia-a100.")],
    results: Annotated[Path, typer.Argument(help="The folder of the results.")] = Path("results"),
    out: Annotated[
        Path | None, typer.Option(help="The archive to write; default: MACHINE.tar.gz.")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Write a folder MACHINE there instead, such as results/reference."),
    ] = None,
    note: Annotated[
        str, typer.Option(help="What else one should know: cooling, power limit, who to ask.")
    ] = "",
) -> None:
    """Pack a machine's results: tables, provenance, settings and a description of the machine.

    The rows have to be complete, undamaged and validated: every run of the settings, none failed
    or disturbed. Runs that have no times, such as unavailable ones, are named. Names of the user
    and the host, paths and ids of cards are taken out. Only samples that figures need are kept.
    """
    from cnnlib.errors import ConfigError
    from cnnlib.publishing.pack import submit as write_submission
    from cnnlib.wording import digits

    if out is not None and into is not None:
        raise ConfigError("--out and --into exclude each other: an archive, or a folder")
    done = write_submission(results, machine, note, out=out, into=into)
    typer.echo(f"written: {done.path}, {digits(done.size / 1e6)} MB, {done.rows:,} rows")
    if done.rows_left_out:
        typer.echo(f"left out: {done.rows_left_out:,} samples and predictions that no figure needs")
    for run, why in done.untimed.items():
        typer.echo(f"{why}: {run}")
    for what, count in sorted(done.removed.items()):
        typer.echo(f"removed: {what}, {count} {'time' if count == 1 else 'times'}")
    if not done.removed:
        typer.echo("removed: nothing; no name of user or host, path or id of a card was found")
