"""Commands that time a run and that check stages against the reference."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnlib.commands.options import (
    CONFIG,
    ConfigFiles,
    at_least_one,
    columns,
    telling_of_a_stop,
)

if TYPE_CHECKING:
    from cnnlib.config import Config

BATCH_SIZES = (1, 7)
"""At which `check` compares: one image, and a number that divides nothing."""


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
    """Time one run: validated first, then epochs and single steps, into rows.

    A batch that does not fit the device, a loss that is not finite and a network that no check can
    judge are results, with their rows.
    So is, with --mark, a stage that raises, computes wrong gradients or hangs; otherwise that is an
    error.
    With measuring.full a long run is saved under results/checkpoints every half minute, and when
    SIGTERM or SIGUSR1 ends it; the same command goes on from there.
    """
    from cnnlib import datasets
    from cnnlib.config import load_config
    from cnnlib.experiment import Run
    from cnnlib.measure import measure as measure_run
    from cnnlib.stages import find_stage
    from cnnlib.stopping import asked_to_stop

    at_least_one(batch_size=batch_size, repeat=repeat)
    settings = load_config(config)
    spec = settings.dataset(dataset, "--dataset")
    settings.network(network, dataset, "--network")
    find_stage(stage, "--stage")
    loaded = datasets.load(dataset, data, spec)
    run = Run(dataset, network, stage, batch_size, repeat)
    checkpoints = Path(settings.results) / "checkpoints" if settings.measuring.full else None
    if checkpoints is None:
        typer.echo(summary(measure_run(settings, run, loaded, out, mark=mark)))
        return
    with telling_of_a_stop(checkpoints), asked_to_stop() as stop:
        done = measure_run(
            settings, run, loaded, out, checkpoints=checkpoints, stop=stop, mark=mark
        )
    typer.echo(summary(done))


def sweep(config: ConfigFiles = CONFIG) -> None:
    """Time every run of the sweep that has no result, failed or was disturbed by others on its GPU.

    A run whose files were removed or altered, or that was measured with other settings or data, has
    no result either; a change to the code goes unnoticed here (the workflow sees it).
    In the order of the workflow and the same as its rule `measure`, each run in a process of its
    own, but forked from one that has loaded Python's libraries and the data already: for a machine
    that is paid by the minute. Needs results/data/NAME.npz; exit code 1 if a run failed or was
    disturbed.
    """
    import os
    import signal
    import traceback

    from cnnlib import datasets
    from cnnlib.errors import UserError
    from cnnlib.experiment import load_experiment, runs
    from cnnlib.files import check_writable
    from cnnlib.freshness import changed_runs, run_files
    from cnnlib.measure import measure as measure_run

    settings = load_experiment(config)
    results = Path(settings.results)
    loaded = {
        name: datasets.load(
            name, results / "data" / f"{name}.npz", settings.dataset(name, "sweep.datasets")
        )
        for name in settings.sweep.datasets
    }
    changed = dict(changed_runs(settings))
    for why in changed.values():
        typer.echo(f"measured again: {why}", err=True)
    asked = [r for r in runs(settings) if r in changed or not is_sound(results / r.folder)]
    check_writable(*(file for run in asked for file in run_files(results / run.folder)))
    failed = 0
    for number, run in enumerate(asked, 1):
        child = os.fork()
        if not child:
            code = 1
            try:
                folder = results / run.folder
                line = summary(measure_run(settings, run, loaded[run.dataset], folder, mark=True))
                typer.echo(f"{number} of {len(asked)}, repeat {run.repeat}: {line}")
                code = 0
            except UserError as error:
                typer.echo(f"error: {run.folder}: {error}", err=True)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)  # the child must end here whatever happens
        try:
            ended = os.waitpid(child, 0)[1]
            failed += ended != 0 or not is_sound(results / run.folder)
        except BaseException:  # a signal that only this process has seen
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
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
    """Time epochs with few to all images on the GPU per load: where the time goes."""
    from cnnlib import datasets
    from cnnlib.config import load_config
    from cnnlib.experiment import Run
    from cnnlib.files import check_writable
    from cnnlib.transfers import measure_transfers

    at_least_one(batch_size=batch_size)
    settings = load_config(config)
    check_writable(out)
    loaded = datasets.load(dataset, data, settings.dataset(dataset, "--dataset"))
    measure_transfers(settings, Run(dataset, network, stage, batch_size, 1), loaded, out)


def race(
    stage: Annotated[str, typer.Option(help="A stage of the ladder, or a peer.")],
    data: Annotated[Path, typer.Option(help="The .npz file of the race's data set.")],
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Train the recipe of the config's section race from all its seeds: accuracy against time."""
    from statistics import fmean

    from cnnlib import datasets
    from cnnlib.experiment import load_experiment
    from cnnlib.files import check_writable
    from cnnlib.race import run_race, the_race

    settings = load_experiment(config)
    wanted = the_race(settings)
    check_writable(out)
    spec = settings.dataset(wanted.dataset, "race.dataset")
    rows = run_race(settings, stage, datasets.load(wanted.dataset, data, spec), out)
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

    from cnnlib import records

    epochs = records.read_columns(folder / "epochs.csv", "epochs")
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
    from cnnlib import freshness

    return freshness.is_sound(folder)


def facts_of(folder: Path) -> dict[str, Any]:
    """run.json of a run; {} if it has not been measured. DataError if it is damaged."""
    from cnnlib.freshness import FACTS, read_facts

    return read_facts(folder) if (folder / FACTS).exists() else {}


def check(config: ConfigFiles = CONFIG) -> None:
    """Check the config, and every stage of its sweep against the reference on this machine.

    Exit code 1 if a stage computes something else, cannot run here, or has a network that no check
    can judge: its verdict is `unjudged`.
    """
    from cnnlib.experiment import load_experiment

    settings = load_experiment(config)
    rows = [["stage", "data set", "network", "batch", "error/allowed", "verdict"]]
    failures = []
    for dataset in settings.sweep.datasets:
        for network in settings.sweep.networks:
            for stage in settings.sweep.stages:
                for batch_size in BATCH_SIZES:
                    verdict, worst, problem = compare(settings, dataset, network, stage, batch_size)
                    rows.append([stage, dataset, network, str(batch_size), worst, verdict])
                    if problem and problem not in failures:
                        failures.append(problem)
    typer.echo(columns(rows))
    for problem in failures:
        typer.echo(problem, err=True)
    if failures:
        raise typer.Exit(1)


def compare(
    settings: "Config", dataset: str, network: str, stage: str, batch_size: int
) -> tuple[str, str, str]:
    """(verdict, largest error over what is allowed, problem) of a stage, on noise for images."""
    import numpy as np

    from cnnlib.engine import Setup
    from cnnlib.errors import UserError
    from cnnlib.stages import find_stage
    from cnnlib.training import open_place, start
    from cnnlib.validate import Unjudged, five_steps, validate

    built = settings.network(network, dataset, "sweep.networks")
    chosen = find_stage(stage, "sweep.stages")
    random = np.random.default_rng(batch_size)
    images = random.integers(0, 256, (batch_size, *built.input_shape), dtype=np.uint8)
    labels = random.integers(0, min(built.classes, 256), batch_size, dtype=np.uint8)
    training = settings.training
    # Steps of a size at which float32 and float64 stay together, whatever the config trains with.
    rate = min(training.learning_rate, 0.05)
    setup = Setup(built, batch_size, rate, training.momentum, mean=127.5, deviation=73.9)
    try:
        with open_place(chosen, settings) as place, chosen.engine(chosen, setup, place.device) as e:
            start(e, training.seed)
            worst = validate(e, images, labels)
            five_steps(e, images, labels)
    except Unjudged as error:
        return "unjudged", "", str(error)
    except UserError as error:
        return "FAILED", "", str(error)
    return "ok", f"{worst:.3f}", ""
