"""Commands that time runs, and the one that checks stages against the reference."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.options import (
    CONFIG,
    OF_YOUR_OWN,
    ConfigFiles,
    at_least_one,
    report_death,
    report_interrupt,
    run_of,
    stage_name,
)


def measure(
    dataset: Annotated[str, typer.Option(help="A data set of the config.")],
    network: Annotated[str, typer.Option(help="A network of the config.")],
    stage: Annotated[str, typer.Option(help=OF_YOUR_OWN)],
    batch_size: Annotated[int, typer.Option(help="Images per step.")],
    data: Annotated[Path, typer.Option(help="The data set's .npz file.")],
    out: Annotated[Path, typer.Option(help="Folder for the run's tables and run.json.")],
    repeat: Annotated[int, typer.Option(help="Which repeat, counted from 1.")] = 1,
    mark: Annotated[
        bool, typer.Option(help="Record a failure of the stage as the run's result.")
    ] = False,
    config: ConfigFiles = CONFIG,
) -> None:
    """Time one run: epochs and single steps.

    The stage is checked before and after it is timed. A batch that does not fit the device, a loss
    that is not finite and a network that no check can judge are results and get rows. With --mark,
    so is a stage that raises an exception, trains wrongly, hangs or ends its process; without it,
    that is an error.

    With measuring.full a long run is saved under results/checkpoints every half minute, and when
    SIGTERM or SIGUSR1 ends it; the same command resumes it.
    """
    from cnnlib import datasets
    from cnnlib.config import load_config
    from cnnlib.measuring.isolated import measure_isolated
    from cnnlib.measuring.record import summary
    from cnnlib.measuring.runs import Run

    at_least_one(batch_size=batch_size, repeat=repeat)
    settings = load_config(config)
    spec = settings.dataset(dataset, "--dataset")
    settings.network(network, dataset, "--network")
    name = stage_name(settings, stage)
    loaded = datasets.load(dataset, data, spec)
    run = Run(dataset, network, name, batch_size, repeat)
    checkpoints = Path(settings.results) / "checkpoints" if settings.measuring.full else None
    with report_interrupt(checkpoints), report_death():
        measure_isolated(settings, run, loaded, out, checkpoints=checkpoints, mark=mark)
    typer.echo(summary(out))


def sweep(
    config: ConfigFiles = CONFIG,
    preparing: Annotated[
        int, typer.Option(help="How many runs are prepared and checked side by side.")
    ] = 1,
    keep_processes: Annotated[
        bool,
        typer.Option(
            "--keep-processes",
            help="With --preparing: a process goes on with other networks and batch sizes, which "
            "saves seconds for each. Its memory then holds what earlier runs have left.",
        ),
    ] = False,
) -> None:
    """Time all runs of the sweep that are due.

    A run is due if it has no result, has failed, was disturbed by other processes on its GPU, was
    measured with other settings or data, or if its files were altered. A change to the code goes
    unnoticed here (the workflow notices it).

    The runs and their order are those of the workflow's rule `measure`. Each run has a process of
    its own, forked from one that has already loaded Python's libraries and the data, which saves
    time on a machine that is paid by the minute. Needs results/data/NAME.npz. The exit code is 1 if
    a run failed or was disturbed.

    With --preparing 6, six runs at a time are compiled and checked, and each of them is timed while
    the others wait. Repeats of a run then follow each other in one process and share what was
    compiled; all runs of a network and batch size come before the next but one.
    """
    from contextlib import closing

    from cnnlib.measuring.freshness import few_lines
    from cnnlib.measuring.runs import load_experiment
    from cnnlib.measuring.sweep import Sweep

    at_least_one(preparing=preparing)
    planned = Sweep(load_experiment(config), preparing, keep_processes=keep_processes)
    for line in few_lines("measured again", planned.changed.values()):
        typer.echo(line, err=True)
    total, failed = len(planned.due), 0
    with closing(planned.measure()) as measured:
        for number, done in enumerate(measured, 1):
            if done.error:
                typer.echo(f"error: {done.run.folder}: {done.text}", err=True)
            else:
                typer.echo(f"{number} of {total}, repeat {done.run.repeat}: {done.text}")
            failed += not done.sound
    if failed:
        typer.echo(f"error: {failed} of {total} runs failed or were disturbed", err=True)
        raise typer.Exit(1)


def transfers(
    dataset: Annotated[str, typer.Option(help="A data set of the config.")],
    network: Annotated[str, typer.Option(help="A network of the config.")],
    stage: Annotated[str, typer.Option(help="A stage that runs on a GPU.")],
    batch_size: Annotated[int, typer.Option(help="Images per step.")],
    data: Annotated[Path, typer.Option(help="The data set's .npz file.")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Time epochs with few to all images on the GPU.

    The table shows where the time goes for each number of images per load. A stage that fails gets
    a row with the reason.
    """
    from cnnlib import datasets
    from cnnlib.config import load_config
    from cnnlib.files import check_writable
    from cnnlib.measuring.isolated import examine_isolated
    from cnnlib.measuring.transfers import measure_transfers

    at_least_one(batch_size=batch_size)
    settings = load_config(config)
    check_writable(out)
    loaded = datasets.load(dataset, data, settings.dataset(dataset, "--dataset"))
    run = run_of(settings, dataset, network, stage, batch_size)
    why = examine_isolated(
        settings, run, "transfers", out, lambda: measure_transfers(settings, run, loaded, out)
    )
    if why:
        typer.echo(f"error: {out}: {why}", err=True)


def race(
    stage: Annotated[str, typer.Option(help=OF_YOUR_OWN)],
    data: Annotated[Path, typer.Option(help="The .npz file of the race's data set.")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Train the recipe of section `race` from all its seeds.

    The table holds the accuracy and the time after each epoch.
    """
    from statistics import fmean

    from cnnlib import datasets
    from cnnlib.files import check_writable
    from cnnlib.measuring.isolated import race_isolated
    from cnnlib.measuring.race import require_race
    from cnnlib.measuring.runs import load_experiment

    settings = load_experiment(config)
    wanted, stage = require_race(settings), stage_name(settings, stage)
    check_writable(out)
    spec = settings.dataset(wanted.dataset, "race.dataset")
    rows = race_isolated(settings, stage, datasets.load(wanted.dataset, data, spec), out)
    last = [row for row in rows if row["epoch"] == wanted.training.epochs and row["status"] == "ok"]
    text = f"{stage}: {len(last)} of {wanted.seeds} trainings"
    if last:
        text += (
            f", {100 * fmean(float(row['test_accuracy']) for row in last):.2f} % on average after "
            f"{1e3 * fmean(float(row['train_seconds']) for row in last):.4g} ms"
        )
    else:
        text += f" ({rows[-1]['status']})"
    typer.echo(f"{text}, on {rows[-1]['device']}")


def check(
    config: ConfigFiles = CONFIG,
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"{OF_YOUR_OWN} Can be repeated; default: those of the sweep."),
    ] = None,
) -> None:
    """Check the config and the stages of its sweep.

    The stages are compared with the reference on this machine. Each stage and batch size is checked
    in a process of its own, for at most measuring.limit_seconds; further batch sizes of a stage
    that has hung are skipped. The exit code is 1 if a stage computes something else, fails in any
    other way, cannot run here, or has a network that no check can judge (the verdict is then
    `unjudged`).
    """
    from cnnlib.config import load_config
    from cnnlib.measuring.runs import check_experiment
    from cnnlib.measuring.stage_check import cases, verdicts

    settings = load_config(config)
    if stage:
        names = [stage_name(settings, entry) for entry in stage]
        sweep = settings.sweep.model_copy(update={"stages": names})
        settings = settings.model_copy(update={"sweep": sweep})
    head = ("stage", "data set", "network", "batch", "error/allowed")
    cells = [[str(cell) for cell in vars(case).values()] for case in cases(settings)]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=False)]
    widths.append(len("error/allowed"))

    def line(*cells: object) -> None:
        texts = [str(cell).ljust(width) for cell, width in zip(cells, widths, strict=False)]
        typer.echo("  ".join([*texts, str(cells[-1])]))

    line(*head, "verdict")
    problems: dict[str, None] = {}
    for verdict in verdicts(settings):  # each is printed at once: the next may take long
        share = "" if verdict.share is None else f"{verdict.share:.3f}"
        line(*vars(verdict.case).values(), share, verdict.word)
        if verdict.problem:
            problems[verdict.problem] = None
    if not problems:
        check_experiment(settings)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
