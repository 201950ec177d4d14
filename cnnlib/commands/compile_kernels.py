"""The command that compiles kernels where there is no GPU, for one that is elsewhere."""

from typing import Annotated

import typer

from cnnlib.commands.options import (
    CONFIG,
    OF_YOUR_OWN,
    ConfigFiles,
    architecture_named,
    at_least_one,
    dataset_for,
    stage_of,
)


def compile_kernels(
    gpu: Annotated[str, typer.Option(help="The GPU that they are for, as h100 or t4.")],
    config: ConfigFiles = CONFIG,
    network: Annotated[
        list[str] | None, typer.Option(help="Can be repeated; default: the sweep's networks.")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"{OF_YOUR_OWN} Can be repeated; default: those of the sweep."),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Can be repeated; default: the sweep's batch sizes.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="How many are compiled at a time; default: one a core.")
    ] = None,
) -> None:
    """Compile the kernels of a sweep's runs, without a GPU.

    They are kept in the cache folder, where a run finds them if its nvcc has the same version and
    its GPU the same compute capability: on a cluster, call it on the login node. Where several ways
    to train are compared, all of them are compiled. What PyTorch and JAX compile is not among them;
    these need the GPU for it.

    The exit code is 1 if something did not compile.
    """
    from cnnlib.config import load_config
    from cnnlib.device.cache_folder import cache_folder
    from cnnlib.device.toolkit import toolkit_problem
    from cnnlib.errors import DeviceError
    from cnnlib.measuring.kernels_ahead import compile_all, programs
    from cnnlib.system.machine import usable_cores

    settings, record = load_config(config), architecture_named(gpu)
    sizes = batch_size or settings.sweep.batch_sizes
    for size in sizes:
        at_least_one(batch_size=size)
    at_least_one(processes=1 if processes is None else processes)
    networks = [
        settings.network(name, dataset_for(settings, dataset, name), "--network")
        for dataset, name in _pairs(settings.pairs(), network)
    ]
    stages = [stage_of(settings, name) for name in stage or settings.sweep.stages]
    due, reasons = programs(settings, stages, networks, sizes, record)
    for what, why in reasons.items():
        typer.echo(f"{what}: {why}", err=True)
    if problem := due and toolkit_problem():
        raise DeviceError(f"nothing can be compiled: {problem}")
    failed = 0
    done = compile_all(due, record, processes or usable_cores())
    for number, (program, problem) in enumerate(done, 1):
        failed += bool(problem)
        if problem:
            typer.echo(f"error: {problem}", err=True)
        else:
            typer.echo(f"{number} of {len(due)}: {program.name}")
    typer.echo(f"{len(due) - failed} programs for {record.sm} are in {cache_folder()}")
    if failed:
        raise typer.Exit(1)


def _pairs(
    swept: list[tuple[str, str]], networks: list[str] | None
) -> list[tuple[str | None, str]]:
    """(data set, network) of the sweep, or the networks that were asked for, on any data set."""
    if networks is None:
        return [*swept]
    return [(None, name) for name in networks]
