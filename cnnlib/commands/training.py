"""The command that trains a network and writes its weights."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cnnlib.commands.loading import load_data
from cnnlib.commands.options import (
    CONFIG,
    USUAL_DATASET,
    ConfigFiles,
    at_least_one,
    dataset_for,
    first,
    report_interrupt,
    stage_of,
)
from cnnlib.commands.reading_weights import ENDINGS, Asked

if TYPE_CHECKING:
    from tqdm import tqdm

    from cnnlib.config import Config
    from cnnlib.training.checkpoint import State

LINE_SECONDS = 10.0
"""Seconds between two lines of progress where there is no terminal for a progress bar."""


def train(
    config: ConfigFiles = CONFIG,
    dataset: Annotated[str | None, typer.Option(help=USUAL_DATASET)] = None,
    network: Annotated[str | None, typer.Option(help="Default: the sweep's first.")] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Default: the sweep's last that this machine has the hardware for."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: the sweep's first.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Default: the config's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: the config's.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The data set's .npz file; default: from results/data, downloaded if missing."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The weights to write, .safetensors or .npz; default: results/weights.npz."
        ),
    ] = None,
    begin: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help=f"Weights to begin with, in a file {ENDINGS}; default: random ones. The "
            "network is the file's unless --network names one.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Saved every half minute and after each epoch; resumed if it exists."),
    ] = None,
) -> None:
    """Train a network and write its weights.

    The test accuracy is printed after every epoch. For a data set with validation images it is
    their accuracy, and the test accuracy is printed at the end. When the loss is no longer finite,
    the exit code is 1 and no weights are written. SIGTERM and SIGUSR1 end the training within about
    a second, with the checkpoint saved.
    """
    import numpy as np

    from cnnlib.config import load_config
    from cnnlib.exchange.formats import format_of, save_weights
    from cnnlib.exchange.weights import Weights
    from cnnlib.files import PROBE_BYTES, check_writable, exclusive
    from cnnlib.system.interrupts import asked_to_stop
    from cnnlib.training.loop import accuracy, start, train_epochs
    from cnnlib.training.target import open_engine, open_target, setup_of

    settings = load_config(config)
    changes = {"epochs": epochs, "seed": seed}
    settings = with_training(settings, {k: v for k, v in changes.items() if v is not None})
    sweep = settings.sweep
    dataset = dataset_for(settings, dataset, network)
    settings.dataset(dataset, "--dataset")
    batch_size = first(batch_size, sweep.batch_sizes)
    at_least_one(batch_size=batch_size)
    weights = None
    if begin is None:
        built = settings.network(first(network, sweep.networks), dataset, "--network")
    else:
        weights = Asked(config, network, dataset, data).read(begin)
        built = weights.network
    chosen = stage_of(settings, stage or home_stage(sweep.stages))
    out = out or Path(settings.results) / "weights.npz"
    format_of(out)
    written = [out] if checkpoint is None else [out, checkpoint]
    check_writable(*written)
    loaded = load_data(settings, dataset, data)
    setup = setup_of(settings, built, loaded, batch_size)
    if weights is not None:
        setup = dataclasses.replace(setup, mean=weights.mean, deviation=weights.deviation)
    total, seed = settings.training.epochs, settings.training.seed
    with (
        exclusive(checkpoint) if checkpoint is not None else contextlib.nullcontext(),
        open_target(chosen, settings.sweep.device) as target,
        open_engine(chosen, setup, target, loaded) as engine,
    ):
        typer.echo(
            f"training {built.name} ({built.parameter_count:,} parameters) on {dataset} by stage "
            f"{chosen.name}, batch {batch_size}, on {target.name}"
        )
        # Besides the parameters, a checkpoint holds the velocity and an unfinished gradient.
        vectors = 1 if checkpoint is None else 4
        check_writable(*written, size=4 * vectors * built.parameter_count + PROBE_BYTES)
        start(engine, seed)
        if checkpoint is not None and checkpoint.exists():
            typer.echo(f"resuming from {checkpoint}")
        elif weights is not None:
            engine.parameters, engine.steps = weights.parameters, weights.steps
            after = f", trained for {weights.steps:,} steps before" if weights.steps else ""
            typer.echo(f"from {begin}{after}")
        right = None
        with Progress(total) as progress, report_interrupt(checkpoint), asked_to_stop() as stop:
            for done in train_epochs(
                engine,
                len(loaded.train_labels),
                total,
                seed,
                checkpoint=checkpoint,
                report=progress,
                stop=stop,
            ):
                if done.diverged:
                    typer.echo(
                        f"diverged: the loss is {done.loss} in epoch {done.epoch}, after "
                        f"{done.images} images; try a smaller training.learning_rate",
                        err=True,
                    )
                    raise typer.Exit(1)
                if loaded.has_validation:
                    what, seen = "validation", (loaded.validation_images, loaded.validation_labels)
                else:
                    what, seen = "test", (loaded.test_images, loaded.test_labels)
                right = accuracy(engine, *seen)
                progress.say(
                    f"epoch {done.epoch}/{total}: loss {done.loss:.4f}, {what} accuracy "
                    f"{100 * right:.2f} %, {done.seconds:.4g} s"
                )
        if right is None or loaded.has_validation:
            already = "already trained; " if right is None else ""
            right = accuracy(engine, loaded.test_images, loaded.test_labels)
            typer.echo(f"{already}test accuracy {100 * right:.2f} %")
        origin = {
            "dataset": dataset,
            "stage": chosen.name,
            "device": target.name,
            "seed": seed,
            "batch_size": batch_size,
            "epochs": total,
            "test_accuracy": right,
        }
        if begin is not None:
            origin["from"] = str(begin)
        trained = Weights(
            built,
            engine.parameters.astype(np.float32),
            setup.mean,
            setup.deviation,
            origin,
            loaded.class_names or (weights.class_names if weights is not None else ()),
            engine.steps,
        )
        save_weights(out, trained)
    typer.echo(f"weights: {out}")


def with_training(settings: "Config", changes: Mapping[str, object]) -> "Config":
    """The config with other values in `training`, checked like those of a file."""
    from pydantic import ValidationError

    from cnnlib.config import Training
    from cnnlib.config_errors import first_problem
    from cnnlib.errors import ConfigError

    try:
        training = Training.model_validate({**settings.training.model_dump(), **changes})
    except ValidationError as error:
        raise ConfigError(first_problem(error, "training")) from None
    return settings.model_copy(update={"training": training})


def home_stage(names: list[str]) -> str:
    """The last of the stages whose hardware this machine has: GPU stages need a GPU."""
    from cnnlib.device.cuda import missing_parts
    from cnnlib.measuring.cards import card_of

    if not missing_parts():
        return names[-1]
    on_cpu = [name for name in names if card_of(name, "sweep.stages").runs_on == "cpu"]
    return (on_cpu or names)[-1]


class Progress:
    """A progress bar on a terminal, or else a plain line every few seconds; both on stderr."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.bar: tqdm[NoReturn] | None = None
        self.said = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(unit="step", leave=False)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, state: "State", steps: int) -> None:
        loss = state.loss_sum / max(state.step, 1)
        if self.bar is not None:
            self.bar.total = steps
            self.bar.n = state.step
            self.bar.set_description(f"epoch {state.epoch}/{self.epochs}", refresh=False)
            self.bar.set_postfix(loss=f"{loss:.4f}")
        elif time.monotonic() - self.said > LINE_SECONDS:
            self.say(
                f"epoch {state.epoch}/{self.epochs}: {100 * state.step // steps} % of "
                f"{steps} steps, loss {loss:.4f}",
                err=True,
            )

    def say(self, line: str, err: bool = False) -> None:
        """Print a line without breaking the progress bar."""
        self.said = time.monotonic()
        if self.bar is not None:
            self.bar.clear()
        typer.echo(line, err=err)
