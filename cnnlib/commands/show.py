"""Commands that only show something."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnnlib.commands.options import (
    CONFIG,
    USUAL_DATASET,
    ConfigFiles,
    at_least_one,
    columns,
    dataset_for,
    first,
    stage_of,
)

if TYPE_CHECKING:
    from cnnlib.config import Config
    from cnnlib.engine import Stage
    from cnnlib.network import Network


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


def plan(
    config: ConfigFiles = CONFIG,
    dataset: Annotated[str | None, typer.Option(help=USUAL_DATASET)] = None,
    network: Annotated[str | None, typer.Option(help="Default: the sweep's first.")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Can be repeated; default: all stages of the ladder.")
    ] = None,
) -> None:
    """Show which operators serve a network's layers.

    The operators are those that run.json would name. For a stage that cannot take the network the
    reason is shown. Without a GPU its limits are unknown; then only what exceeds every GPU is
    refused.
    """
    from cnnlib.config import load_config
    from cnnlib.stages import LADDER

    settings = load_config(config)
    built = settings.network(
        first(network, settings.sweep.networks),
        dataset_for(settings, dataset, network),
        "--network",
    )
    chosen = [stage_of(settings, name) for name in stage] if stage else LADDER
    rows = [["layer", "target", "parameters", "operations per image, forward"]]
    for i, name in enumerate(built.layer_names):
        size = sum(p.size for p in built.parameters if p.layer == i)
        shape = "x".join(map(str, built.shapes[i + 1]))
        rows.append([name, shape, f"{size:,}", f"{built.forward_flops[i]:,}"])
    rows.append(["all", "", f"{built.parameter_count:,}", f"{sum(built.forward_flops):,}"])
    typer.echo(f"network {built.name}, source {'x'.join(map(str, built.input_shape))}\n")
    typer.echo(columns(rows))
    for each in chosen:
        remark, lines = operators(each, settings, built)
        typer.echo(f"\nstage {each.name}{remark}")
        typer.echo("\n".join(f"  {line}" for line in lines))


def operators(stage: "Stage", settings: "Config", network: "Network") -> tuple[str, list[str]]:
    """A remark on where `stage` would run, and which operator serves which layers of `network`.

    Where the stage cannot take the network there is one line with the reason instead.
    """
    from cnnlib.device import DeviceLimits, limits_of
    from cnnlib.engine import Setup, name_of
    from cnnlib.engine import plan as plan_of
    from cnnlib.errors import Unsupported
    from cnnlib.training.target import library_kind

    wanted, remark, device = settings.sweep.device, "", None
    if stage.runs_on == "cuda":
        device = limits_of(wanted)
        if device is None:
            remark = ", on a GPU that is not here: its sizes are not checked"
            device = DeviceLimits("cuda", 1, sys.maxsize)
    kind = library_kind(wanted) if stage.runs_on == "any" else "cpu"
    size, rate = settings.sweep.batch_sizes[0], settings.training.learning_rate
    try:
        setup = Setup(network, size, rate, device_kind=kind)
        served = stage.engine.operators_on(stage, setup, device)
        # An engine whose stage names no operators takes the network as a whole.
        parts = [planned.name for planned in plan_of(stage, network)] if stage.operators else [""]
        rows = [
            [name_of(operator), part or "all layers"]
            for part, operator in zip(parts, served, strict=True)
        ]
    except Unsupported as error:
        return remark, [f"unavailable: {error}"]
    return remark, columns(rows).splitlines()


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
    from cnnlib.device.architecture import ARCHITECTURES
    from cnnlib.engine import Setup
    from cnnlib.errors import ConfigError

    settings = load_config(config)
    built = settings.network(
        first(network, settings.sweep.networks),
        dataset_for(settings, dataset, network),
        "--network",
    )
    size = first(batch_size, settings.sweep.batch_sizes)
    at_least_one(batch_size=size)
    if gpu.lower() not in ARCHITECTURES:
        raise ConfigError(f"unknown GPU {gpu!r} in --gpu; known: {', '.join(ARCHITECTURES)}")
    limits = ARCHITECTURES[gpu.lower()].limits
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
