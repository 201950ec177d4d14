"""Commands that look at one thing closely: where CPU stages spend their time, what was learned."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.options import (
    CONFIG,
    OF_YOUR_OWN,
    USUAL_DATASET,
    ConfigFiles,
    at_least_one,
    columns,
    dataset_for,
    first,
    report_death,
    run_of,
    stage_name,
)


def cpu_profile(
    dataset: Annotated[str, typer.Option(help="A data set of the config.")],
    network: Annotated[str, typer.Option(help="A network of the config.")],
    stage: Annotated[str, typer.Option(help="A stage that runs on the CPU.")],
    batch_size: Annotated[int, typer.Option(help="Images per step.")],
    data: Annotated[Path, typer.Option(help="The data set's .npz file.")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Profile the functions of a CPU stage.

    The table holds the calls and seconds of every function in training steps. A stage that fails
    gets a row with the reason.
    """
    from cnnlib import datasets
    from cnnlib.config import load_config
    from cnnlib.files import check_writable
    from cnnlib.measuring.cpu_profile import measure_cpu_profile
    from cnnlib.measuring.isolated import examine_isolated

    at_least_one(batch_size=batch_size)
    settings = load_config(config)
    check_writable(out)
    loaded = datasets.load(dataset, data, settings.dataset(dataset, "--dataset"))
    run = run_of(settings, dataset, network, stage, batch_size)
    why = examine_isolated(
        settings, run, "cpu_profile", out, lambda: measure_cpu_profile(settings, run, loaded, out)
    )
    if why:
        typer.echo(f"error: {out}: {why}", err=True)


def profile(
    stage: Annotated[str, typer.Option(help=OF_YOUR_OWN)],
    dataset: Annotated[str | None, typer.Option(help=USUAL_DATASET)] = None,
    network: Annotated[str | None, typer.Option(help="Default: the sweep's first.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: the sweep's first.")] = None,
    config: ConfigFiles = CONFIG,
) -> None:
    """Show where a training step of a stage spends its time.

    For a stage with kernels or operators these are timed one by one; of an author's own loop the
    functions are shown that take the most time of the host. Noise serves for images.
    """
    from cnnlib.config import load_config
    from cnnlib.measuring.step_profile import profile_step
    from cnnlib.system.supervisor import supervise

    settings = load_config(config)
    sweep = settings.sweep
    dataset = dataset_for(settings, dataset, network)
    network = first(network, sweep.networks)
    settings.network(network, dataset, "--network")
    size = first(batch_size, sweep.batch_sizes)
    at_least_one(batch_size=size)
    name, limit = stage_name(settings, stage), settings.measuring.limit_seconds
    with report_death():
        found = supervise(lambda: profile_step(settings, name, dataset, network, size), limit=limit)
    step = sum(line.seconds for line in found.lines if line.calls)
    rows = [[found.what, "part", "a step", "microseconds", "share"]]
    for line in found.lines:
        share = f"{100 * line.seconds / step:.1f} %" if line.calls else "not in a step"
        times = [str(line.calls or ""), f"{1e6 * line.seconds:,.1f}", share]
        rows.append([line.name, line.part, *times])
    typer.echo(f"stage {name}, network {network}, batch {size}, on {found.device}\n")
    typer.echo(columns(rows))


def pictures(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Write the test images that are watched in training.

    They are one image of each class, and the data set's hard_images.
    """
    from cnnlib.measuring import schema
    from cnnlib.measuring.learning_curve import pictures as pictures_of
    from cnnlib.measuring.runs import load_experiment, sweep_dataset

    settings = load_experiment(config)
    rows = []
    for name in settings.sweep.datasets:
        rows += pictures_of(settings, name, sweep_dataset(settings, name))
    schema.write(out, "pictures", rows)
    typer.echo(f"{out}: {len(rows)} images")


def features(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Write filters and feature maps of trained networks.

    Each network of the sweep is trained by stage gemm.
    """
    from cnnlib.files import check_writable
    from cnnlib.measuring import schema
    from cnnlib.measuring.feature_maps import feature_maps
    from cnnlib.measuring.runs import load_experiment, sweep_dataset

    settings = load_experiment(config)
    check_writable(out)
    rows = []
    loaded = {name: sweep_dataset(settings, name) for name in settings.sweep.datasets}
    for name, network in settings.pairs():
        built = settings.network(network, name, "sweep.networks")
        rows += feature_maps(settings, built, loaded[name])
    schema.write(out, "features", rows)
    typer.echo(f"{out}: {len(rows)} numbers")
