"""Options that several commands share, and how text is laid out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer

ConfigFiles = Annotated[
    list[Path], typer.Option("--config", help="Settings; given again, later over earlier.")
]
# A list, as Typer wants for an option that can be repeated; nobody changes it.
CONFIG = [Path("config.yaml")]

T = TypeVar("T")


def first(given: T | None, otherwise: Sequence[T]) -> T:
    """What was given, or else the first of the sweep's."""
    return otherwise[0] if given is None else given


def at_least_one(**options: int) -> None:
    """ConfigError naming the first of the options (batch_size is --batch-size) that is not."""
    from cnnlib.errors import ConfigError

    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


@contextmanager
def telling_of_a_stop(checkpoint: Path | None) -> Iterator[None]:
    """A training that was asked to stop says how to go on and ends with the signal's exit code."""
    from cnnlib.system.interrupts import Stopped

    try:
        yield
    except Stopped as stopped:
        what = (
            f"the training is saved in {checkpoint}; the same command goes on from there"
            if stopped.saved
            else "nothing is saved: there was no --checkpoint"
        )
        typer.echo(f"{stopped}: {what}", err=True)
        raise typer.Exit(128 + stopped.number) from None


@contextmanager
def telling_of_a_death() -> Iterator[None]:
    """Report how a supervised call died in one line, and end with exit code 1."""
    from cnnlib.system.supervisor import Died

    try:
        yield
    except Died as died:
        typer.echo(f"error: {died}", err=True)
        raise typer.Exit(1) from None


def one_line(error: BaseException) -> str:
    """What the command line prints for an exception that is no bug."""
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, every column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
