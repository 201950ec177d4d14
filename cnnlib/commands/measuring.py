"""Commands that time a run and that check stages against the reference."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnlib.commands.options import (
    CONFIG,
    ConfigFiles,
    at_least_one,
    one_line,
    telling_of_a_death,
    telling_of_a_stop,
)

if TYPE_CHECKING:
    from cnnlib.config import Config

CHECKED_STEPS, LEAST_STEPS = 20, 3
"""Steps of an epoch in which `check` trains."""
CHECKED_IMAGES = 2048
"""Images of an epoch in which `check` trains, unless that would be too few steps."""


def measure(
    dataset: Annotated[str, typer.Option(help="A data set of the config.")],
    network: Annotated[str, typer.Option(help="A network of the config.")],
    stage: Annotated[str, typer.Option(help="A stage of the ladder.")],
    batch_size: Annotated[int, typer.Option(help="Images a step.")],
    data: Annotated[Path, typer.Option(help="The data set's .npz file.")],
    out: Annotated[Path, typer.Option(help="Folder for epochs.csv, steps.csv and run.json.")],
    repeat: Annotated[int, typer.Option(help="Which repeat; counted from 1.")] = 1,
    mark: Annotated[
        bool, typer.Option(help="A run that fails is a result too, marked so.")
    ] = False,
    config: ConfigFiles = CONFIG,
) -> None:
    """Time one run, epochs and single steps, into rows; checked before and after.

    A batch that does not fit the device, a loss that is not finite and a network that no check can
    judge are results, with their rows.
    So is, with --mark, a stage that raises, trains wrongly, hangs or ends its process;
    otherwise that is an error.
    With measuring.full a long run is saved under results/checkpoints every half minute, and when
    SIGTERM or SIGUSR1 ends it; the same command goes on from there.
    """
    from cnnlib import datasets
    from cnnlib.config import load_config
    from cnnlib.measuring.isolated import measure_apart
    from cnnlib.measuring.runs import Run
    from cnnlib.stages import find_stage

    at_least_one(batch_size=batch_size, repeat=repeat)
    settings = load_config(config)
    spec = settings.dataset(dataset, "--dataset")
    settings.network(network, dataset, "--network")
    find_stage(stage, "--stage")
    loaded = datasets.load(dataset, data, spec)
    run = Run(dataset, network, stage, batch_size, repeat)
    checkpoints = Path(settings.results) / "checkpoints" if settings.measuring.full else None
    with telling_of_a_stop(checkpoints), telling_of_a_death():
        measure_apart(settings, run, loaded, out, checkpoints=checkpoints, mark=mark)
    typer.echo(summary(out))


def sweep(config: ConfigFiles = CONFIG) -> None:
    """Time every run of the sweep that has no result, failed or was disturbed by others on its GPU.

    A run whose files were removed or altered, or that was measured with other settings or data, has
    no result either; a change to the code goes unnoticed here (the workflow sees it).
    In the order of the workflow and the same as its rule `measure`, each run in a process of its
    own, but forked from one that has loaded Python's libraries and the data already: for a machine
    that is paid by the minute. Needs results/data/NAME.npz; exit code 1 if a run failed or was
    disturbed.
    """
    from cnnlib import datasets
    from cnnlib.errors import UserError
    from cnnlib.files import check_writable
    from cnnlib.measuring.freshness import changed_runs, few_lines, run_files
    from cnnlib.measuring.isolated import measure_apart
    from cnnlib.measuring.runs import load_experiment, runs

    settings = load_experiment(config)
    results = Path(settings.results)
    loaded = {
        name: datasets.load(
            name, results / "data" / f"{name}.npz", settings.dataset(name, "sweep.datasets")
        )
        for name in settings.sweep.datasets
    }
    changed = dict(changed_runs(settings))
    for line in few_lines("measured again", changed.values()):
        typer.echo(line, err=True)
    asked = [r for r in runs(settings) if r in changed or not is_sound(results / r.folder)]
    check_writable(*(file for run in asked for file in run_files(results / run.folder)))
    failed = 0
    for number, run in enumerate(asked, 1):
        folder = results / run.folder
        try:
            measure_apart(settings, run, loaded[run.dataset], folder, mark=True)
            typer.echo(f"{number} of {len(asked)}, repeat {run.repeat}: {summary(folder)}")
            failed += not is_sound(folder)
        except (UserError, OSError, MemoryError) as error:
            typer.echo(f"error: {run.folder}: {one_line(error)}", err=True)
            failed += 1
    if failed:
        typer.echo(f"error: {failed} of {len(asked)} runs failed or were disturbed", err=True)
        raise typer.Exit(1)


def transfers(
    dataset: Annotated[str, typer.Option(help="A data set of the config.")],
    network: Annotated[str, typer.Option(help="A network of the config.")],
    stage: Annotated[str, typer.Option(help="A stage that runs on a GPU.")],
    batch_size: Annotated[int, typer.Option(help="Images a step.")],
    data: Annotated[Path, typer.Option(help="The data set's .npz file.")],
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Time epochs with few to all images on the GPU per load: where the time goes.

    A stage that fails gets a row with the reason.
    """
    from cnnlib import datasets
    from cnnlib.config import load_config
    from cnnlib.files import check_writable
    from cnnlib.measuring.isolated import examine_apart
    from cnnlib.measuring.runs import Run
    from cnnlib.measuring.transfers import measure_transfers

    at_least_one(batch_size=batch_size)
    settings = load_config(config)
    check_writable(out)
    loaded = datasets.load(dataset, data, settings.dataset(dataset, "--dataset"))
    run = Run(dataset, network, stage, batch_size, 1)
    why = examine_apart(
        settings, run, "transfers", out, lambda: measure_transfers(settings, run, loaded, out)
    )
    if why:
        typer.echo(f"error: {out}: {why}", err=True)


def race(
    stage: Annotated[str, typer.Option(help="A stage of the ladder, or a peer.")],
    data: Annotated[Path, typer.Option(help="The .npz file of the race's data set.")],
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Train the recipe of the config's section race from all its seeds: accuracy against time."""
    from statistics import fmean

    from cnnlib import datasets
    from cnnlib.files import check_writable
    from cnnlib.measuring.isolated import race_apart
    from cnnlib.measuring.race import the_race
    from cnnlib.measuring.runs import load_experiment

    settings = load_experiment(config)
    wanted = the_race(settings)
    check_writable(out)
    spec = settings.dataset(wanted.dataset, "race.dataset")
    rows = race_apart(settings, stage, datasets.load(wanted.dataset, data, spec), out)
    last = [row for row in rows if row["epoch"] == wanted.training.epochs and row["status"] == "ok"]
    text = f"{stage}: {len(last)} of {wanted.seeds} trainings"
    if last:
        text += (
            f", {100 * fmean(row['test_accuracy'] for row in last):.2f} % on average after "
            f"{1e3 * fmean(row['train_seconds'] for row in last):.4g} ms"
        )
    else:
        text += f" ({rows[-1]['status']})"
    typer.echo(f"{text}, on {rows[-1]['device']}")


def summary(folder: Path) -> str:
    """One line on the run whose files lie in `folder`."""
    from statistics import median

    from cnnlib.measuring import schema

    epochs = schema.read_columns(folder / "epochs.csv", "epochs")
    last = {column: values[-1] for column, values in epochs.items()}
    text = f"{last['stage']}, batch {last['batch_size']}: {last['status']}"
    good = [i for i, status in enumerate(epochs["status"]) if status == "ok"]
    if good:
        text += f", {median(epochs['epoch_seconds'][i] for i in good):.4g} s an epoch"
        if last["extrapolated"]:
            text += f" (scaled from {sum(epochs['images'][i] for i in good)} images)"
        if last["test_accuracy"] >= 0:
            text += f", test accuracy {100 * last['test_accuracy']:.2f} %"
    if last["reason"]:
        text += f": {last['reason']}"
    if others := facts_of(folder).get("disturbed"):
        names = ", ".join(f"{p['process']} ({p['name'] or 'no name known'})" for p in others)
        text += f", others on the GPU meanwhile: process {names}"
    return f"{text}, on {last['device']}"


def is_sound(folder: Path) -> bool:
    """Whether a run has a result that is whole and that measuring it again would not improve."""
    from cnnlib.measuring import freshness

    return freshness.is_sound(folder)


def facts_of(folder: Path) -> dict[str, Any]:
    """run.json of a run; {} if it has not been measured. DataError if it is damaged."""
    from cnnlib.measuring.freshness import FACTS, read_facts

    return read_facts(folder) if (folder / FACTS).exists() else {}


def check(config: ConfigFiles = CONFIG) -> None:
    """Check the config, and every stage of its sweep against the reference on this machine.

    Each stage and batch size in a process of its own, for at most measuring.limit_seconds; further
    batch sizes of a stage that has hung are skipped. Exit code 1 if a stage computes something
    else, fails in any other way, cannot run here, or has a network that no check can judge: its
    verdict is `unjudged`.
    """
    from cnnlib.config import load_config
    from cnnlib.errors import BrokenStage
    from cnnlib.measuring.runs import check_experiment
    from cnnlib.stages import find_stage

    settings = load_config(config)
    sweep = settings.sweep
    for name in sweep.stages:
        with suppress(BrokenStage):  # has its lines in the table
            find_stage(name, "sweep.stages")
    for dataset in sweep.datasets:
        for network in sweep.networks:
            settings.network(network, dataset, "sweep.networks")
    cases = [
        (stage, dataset, network, batch_size)
        for dataset in sweep.datasets
        for network in sweep.networks
        for stage in sweep.stages
        for batch_size in sweep.batch_sizes
    ]
    head = ("stage", "data set", "network", "batch", "error/allowed", "verdict")
    widths = [max(len(str(cell)) for cell in column) for column in zip(head, *cases, strict=False)]
    widths.append(len("error/allowed"))

    def line(*cells: object) -> None:
        # as soon as it is known: the next case may take long
        texts = [str(cell).ljust(width) for cell, width in zip(cells, widths, strict=False)]
        typer.echo("  ".join([*texts, str(cells[-1])]))

    line(*head)
    problems, hung = [], set()
    for stage, dataset, network, batch_size in cases:
        worst, verdict, problem = "", "skipped", ""
        if (stage, dataset, network) not in hung:  # it would only take the time limit again
            worst, verdict, problem = judge(settings, dataset, network, stage, batch_size)
        if verdict == "hung":
            hung.add((stage, dataset, network))
        line(stage, dataset, network, batch_size, worst, verdict)
        if problem and problem not in problems:
            problems.append(problem)
    if not problems:
        check_experiment(settings)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)


def judge(
    settings: "Config", dataset: str, network: str, stage: str, batch_size: int
) -> tuple[str, str, str]:
    """(largest error over what is allowed, verdict, what is wrong) of one case of `check`."""
    from cnnlib.device import KernelError
    from cnnlib.errors import BrokenStage, DeviceError, DoesNotFit, Unsupported, WorkerDied
    from cnnlib.system.supervisor import Died, supervise
    from cnnlib.validation.parity import Unjudged

    verdicts = {
        BrokenStage: "broken",
        Unjudged: "unjudged",
        DoesNotFit: "does not fit",
        WorkerDied: "died",
        KernelError: "FAILED",
        DeviceError: "unavailable",
        Unsupported: "unavailable",
    }
    limit = settings.measuring.limit_seconds
    try:
        worst = supervise(
            lambda: compare(settings, dataset, network, stage, batch_size), limit=limit
        )
    except Died as died:
        at = f"stage '{stage}', network '{network}', batch size {batch_size}"
        if died.kind == "hung":
            return "", "hung", f"{at}: {died} (measuring.limit_seconds is {limit:g} s)"
        return "", "died" if died.kind == "died" else "FAILED", f"{at}: {died}"
    except Exception as error:
        kinds = (verdict for kind, verdict in verdicts.items() if isinstance(error, kind))
        return "", next(kinds, "FAILED"), one_line(error)
    return f"{worst:.3f}", "ok", ""


def compare(settings: "Config", dataset: str, network: str, stage: str, batch_size: int) -> float:
    """Largest error over what is allowed of a stage, trained on noise for images.

    The checks are those of a measurement. Raises whatever is wrong with the stage.
    """
    from cnnlib.datasets import noise
    from cnnlib.engine import ImageByImage
    from cnnlib.stages import find_stage
    from cnnlib.training.target import open_target, setup_of
    from cnnlib.validation.trajectory import check_training

    built = settings.network(network, dataset, "sweep.networks")
    chosen = find_stage(stage, "sweep.stages")
    most = CHECKED_IMAGES
    if issubclass(chosen.engine, ImageByImage):  # a batch takes it seconds; measured on a part too
        batch_size, most = min(batch_size, settings.measuring.budget_images), 0
    steps = min(CHECKED_STEPS, max(LEAST_STEPS, most // batch_size))
    # one image more, that is left over
    images = noise(dataset, built.input_shape, built.classes, steps * batch_size + 1)
    seed = settings.training.seed
    setup = setup_of(settings, built, images, batch_size)
    with open_target(chosen, settings.sweep.device) as target:
        return check_training(chosen, setup, target, images, seed)
