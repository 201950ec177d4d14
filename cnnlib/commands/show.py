"""Commands that only tell something."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.options import CONFIG, ConfigFiles, columns, first


def stages() -> None:
    """List the stages of the ladder, variants of them, peers, and what each one changes."""
    from cnnlib.stages import ALL

    rows = [[stage.name, stage.runs_on, stage.change] for stage in ALL]
    typer.echo(columns([["stage", "runs on", "what changes"], *rows]))


def plan(
    config: ConfigFiles = CONFIG,
    dataset: Annotated[str | None, typer.Option(help="Default: the sweep's first.")] = None,
    network: Annotated[str | None, typer.Option(help="Default: the sweep's first.")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Can be given again; default: all of the ladder.")
    ] = None,
) -> None:
    """Show a network's layers, and which operator of each stage serves which of them."""
    from cnnlib.config import load_config
    from cnnlib.engine import plan as plan_of
    from cnnlib.errors import Unsupported
    from cnnlib.stages import LADDER, find_stage

    settings = load_config(config)
    built = settings.network(
        first(network, settings.sweep.networks),
        first(dataset, settings.sweep.datasets),
        "--network",
    )
    chosen = [find_stage(name, "--stage") for name in stage] if stage else LADDER
    rows = [["layer", "target", "parameters", "operations an image, forward"]]
    for i, name in enumerate(built.layer_names):
        size = sum(p.size for p in built.parameters if p.layer == i)
        shape = "x".join(map(str, built.shapes[i + 1]))
        rows.append([name, shape, f"{size:,}", f"{built.forward_flops[i]:,}"])
    rows.append(["all", "", f"{built.parameter_count:,}", f"{sum(built.forward_flops):,}"])
    typer.echo(f"network {built.name}, source {'x'.join(map(str, built.input_shape))}\n")
    typer.echo(columns(rows))
    for each in chosen:
        typer.echo(f"\nstage {each.name}")
        try:
            typer.echo(
                columns([[f"  {p.operator.__name__}", p.name] for p in plan_of(each, built)])
            )
        except Unsupported as error:
            typer.echo(f"  cannot: {error}")


def ladder(
    results: Annotated[Path, typer.Option(help="The results folder.")] = Path("results"),
) -> None:
    """Print the table of stages, their times and speedups that the last `make run` made."""
    from cnnlib.errors import DataError

    path = results / "tables" / "ladder.md"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no {path} yet: `make run` makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    typer.echo(text.rstrip("\n"))
