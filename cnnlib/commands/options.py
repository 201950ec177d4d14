"""Options that several commands share, how they end, and how text is laid out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from cnnlib.config import Config
    from cnnlib.device.architecture import Architecture
    from cnnlib.engine import Stage
    from cnnlib.measuring.runs import Run

USUAL = Path("config.yaml")
"""The config file where none is given, if there is one in the working folder."""


def given_or_usual(files: list[Path]) -> list[Path]:
    """The files given, or config.yaml of the working folder, or the one that cnnlib ships.

    The last choice is reported, because a user may have meant another folder.
    """
    if files:
        return files
    if USUAL.exists():
        return [USUAL]
    from cnnlib.paths import CONFIG as SHIPPED

    typer.echo(f"config: {SHIPPED}, as there is no {USUAL} in {Path.cwd()}", err=True)
    return [SHIPPED]


ConfigFiles = Annotated[
    list[Path],
    typer.Option(
        "--config",
        callback=given_or_usual,
        show_default=f"{USUAL}, or the shipped one where there is none",
        help="A config file; can be repeated, later files override earlier.",
    ),
]
# For commands that look at the config only if another option asks for it.
PerhapsConfigFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--config", help="Config files with the networks and data sets that options name."
    ),
]
# Typer wants a list as the default of an option that can be repeated. It is never modified.
CONFIG: list[Path] = []

OF_YOUR_OWN = "A stage's name, or the path of a Python file with one of your own."
"""Help of the option --stage."""

USUAL_DATASET = "Default: the first with the images that the network is made for, or the sweep's."
"""Help of the option --dataset."""

T = TypeVar("T")


def first(given: T | None, otherwise: Sequence[T]) -> T:
    """The value given, or else the first of the sweep's."""
    return otherwise[0] if given is None else given


def dataset_for(settings: "Config", dataset: str | None, network: str | None) -> str:
    """The data set given, or else the sweep's first.

    A network that says which images it is made for gets the first data set of such images instead:
    the sweep's, or any of the config.
    """
    sweep = settings.sweep
    name = first(dataset, sweep.datasets)
    spec = settings.networks.get(first(network, sweep.networks))
    if dataset is not None or spec is None or spec.input_shape is None:
        return name
    suitable = (
        each
        for each in (*sweep.datasets, *settings.datasets)
        if each in settings.datasets and list(settings.datasets[each].shape) == spec.input_shape
    )
    return next(suitable, name)


def at_least_one(**options: int) -> None:
    """Raise ConfigError naming the first option below 1; `batch_size` stands for --batch-size."""
    from cnnlib.errors import ConfigError

    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def architecture_named(name: str) -> "Architecture":
    """The record that --gpu asks for, however its name is spelt; ConfigError with the choices."""
    from cnnlib.config import lookup
    from cnnlib.device.architecture import ARCHITECTURES

    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    return lookup(ARCHITECTURES, plain if plain in ARCHITECTURES else name, "GPU", "--gpu")


def stage_of(settings: "Config", entry: str) -> "Stage":
    """The stage of option --stage, imported here; files that the config lists are known by name."""
    from cnnlib.stages import declare, find_stage

    declare([*settings.sweep.stages, *(settings.race.stages if settings.race else [])])
    return find_stage(entry, "--stage")


def stage_name(settings: "Config", entry: str) -> str:
    """The name of the stage of option --stage, whose code is not imported here."""
    from cnnlib.measuring.cards import card_of
    from cnnlib.stages import declare

    declare([*settings.sweep.stages, *(settings.race.stages if settings.race else [])])
    return card_of(entry, "--stage").name


def run_of(settings: "Config", dataset: str, network: str, stage: str, batch_size: int) -> "Run":
    """The first repeat of the run that a command's options ask for."""
    from cnnlib.measuring.runs import Run

    return Run(dataset, network, stage_name(settings, stage), batch_size, 1)


@contextmanager
def report_interrupt(checkpoint: Path | None) -> Iterator[None]:
    """When a training was asked to stop, say how to resume it and exit with the signal's code."""
    from cnnlib.system.interrupts import Stopped

    try:
        yield
    except Stopped as stopped:
        what = (
            f"the training is saved in {checkpoint}; the same command resumes it"
            if stopped.saved
            else "nothing is saved: there was no --checkpoint"
        )
        typer.echo(f"{stopped}: {what}", err=True)
        raise typer.Exit(128 + stopped.number) from None


@contextmanager
def report_death() -> Iterator[None]:
    """Report in one line how a supervised call died, and exit with code 1."""
    from cnnlib.system.supervisor import Died

    try:
        yield
    except Died as died:
        typer.echo(f"error: {died}", err=True)
        raise typer.Exit(1) from None


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, every column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
