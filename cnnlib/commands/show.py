"""Commands that only show something."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.options import (
    CONFIG,
    USUAL_DATASET,
    ConfigFiles,
    architecture_named,
    at_least_one,
    columns,
    dataset_for,
    first,
    stage_of,
)


def stages() -> None:
    """List all stages and what each one changes.

    They are the stages of the ladder, their variants, the peers, and those that installed packages
    bring. A file with a stage of your own is given by its path wherever a stage is asked for.
    """
    from cnnlib.errors import BrokenStage
    from cnnlib.measuring.cards import card_of
    from cnnlib.stages import ALL, installed, problems

    rows, broken = [[stage.name, stage.runs_on, stage.change] for stage in ALL], problems()
    for name in dict.fromkeys(point.name for point in installed()):
        try:
            card = card_of(name, "an installed package")
            rows.append([card.name, card.runs_on, card.change])
        except BrokenStage as error:
            broken.append(str(error))
    typer.echo(columns([["stage", "runs on", "what changes"], *rows]))
    for problem in broken:
        typer.echo(f"warning: {problem}", err=True)


def show_source(
    config: ConfigFiles = CONFIG,
    stage: Annotated[str, typer.Option(help="A stage that runs on a GPU.")] = "tuned",
    network: Annotated[str | None, typer.Option(help="Default: the sweep's first.")] = None,
    dataset: Annotated[str | None, typer.Option(help=USUAL_DATASET)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: the sweep's first.")] = None,
    gpu: Annotated[str, typer.Option(help="The GPU whose limits decide on the sizes.")] = "h100",
) -> None:
    """Print the CUDA source that a stage generates.

    It is what an engine compiles unless it chooses among several plans by measuring: structs of
    sizes, and the kernels of kernels/ that are made with them. No GPU is needed.
    """
    from cnnlib.config import load_config
    from cnnlib.engine import Setup

    settings = load_config(config)
    built = settings.network(
        first(network, settings.sweep.networks),
        dataset_for(settings, dataset, network),
        "--network",
    )
    size = first(batch_size, settings.sweep.batch_sizes)
    at_least_one(batch_size=size)
    limits = architecture_named(gpu).limits
    setup = Setup(built, size, settings.training.learning_rate)
    chosen = stage_of(settings, stage)
    typer.echo(chosen.engine.source_on(chosen, setup, limits).rstrip("\n"))


def ladder(
    results: Annotated[Path, typer.Option(help="The results folder.")] = Path("results"),
) -> None:
    """Print the last table of stages, times and speedups."""
    from cnnlib.errors import DataError

    path = results / "tables" / "ladder.md"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no {path} yet: `make run` makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    typer.echo(text.rstrip("\n"))
