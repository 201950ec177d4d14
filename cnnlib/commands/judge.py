"""The command that judges one stage: checks, races, times in turn, counters, one page."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.loading import load_data
from cnnlib.commands.options import (
    CONFIG,
    USUAL_DATASET,
    ConfigFiles,
    at_least_one,
    dataset_for,
    first,
)


def judge(
    stage: Annotated[str, typer.Argument(help="A stage's name, or a file such as ./my_stage.py.")],
    dataset: Annotated[str | None, typer.Option(help=USUAL_DATASET)] = None,
    network: Annotated[
        str | None, typer.Option(help="A network of the config; default: the sweep's first.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per step; default: 64 if the sweep has it.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="How many epochs of each stage are timed.")] = 7,
    images: Annotated[
        int | None,
        typer.Option(help="Images of a timed epoch; default: as many as take about a second."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="A further stage or file to be timed in turn; can be repeated."),
    ] = None,
    rivals: Annotated[
        bool, typer.Option(help="Look for the best shipped stage and the best peer to time beside.")
    ] = True,
    part: Annotated[
        list[str] | None,
        typer.Option(help="A part of the judgement; can be repeated; default: all of them."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The data set's .npz file; default: in results/data.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is found; default: results/judge/NAME.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Repeats a judgement; default: one never used before.")
    ] = None,
    config: ConfigFiles = CONFIG,
) -> None:
    """Judge one stage, in a file of your own or shipped, and write a page about it.

    The parts, in order: check (as the command of that name), known ways to look fast, addresses and
    races by emulation, compute-sanitizer, epochs timed in turn with the best shipped stage and the
    best installed peer, the counters of ncu, the roofline. What cannot be done here is said. The
    stage runs in processes of its own; the clock and the checks are elsewhere.

    The folder holds page.html, judge.json and tables; it is written after each part, and what was
    there before is removed first. The exit code is 1 if a check rejects the stage.
    """
    import secrets

    from cnnlib.config import load_config
    from cnnlib.errors import ConfigError
    from cnnlib.files import check_writable
    from cnnlib.judging import page, record
    from cnnlib.judging.judgement import PARTS, Judgement, Wanted
    from cnnlib.measuring.runs import usual_batch_size
    from cnnlib.stages import file_of, find_stage, is_path
    from cnnlib.training.target import check_batch

    page.check_libraries()
    settings = load_config(config)
    sweep = settings.sweep
    batch_size = usual_batch_size(settings) if batch is None else batch
    at_least_one(batch=batch_size, repeats=repeats, images=1 if images is None else images)
    if seed is not None and seed < 0:
        raise ConfigError(f"--seed must not be negative: {seed}")
    for each in part or ():
        if each not in PARTS:
            raise ConfigError(f"unknown part {each!r} in --part; known: {', '.join(PARTS)}")
    beside = tuple(against or ())
    for where, entry in (("judge", stage), *(("--against", each) for each in beside)):
        if is_path(entry):
            file_of(entry, where)
        elif where == "--against":
            find_stage(entry, where)
    name = dataset_for(settings, dataset, network)
    settings.dataset(name, "--dataset")
    built = settings.network(first(network, sweep.networks), name, "--network")
    loaded = load_data(settings, name, data)
    check_batch(loaded, batch_size)
    if images is not None and not batch_size <= images <= len(loaded.train_labels):
        raise ConfigError(
            f"--images must be from {batch_size}, one batch, to {len(loaded.train_labels)}, the "
            f"training images of '{name}'; not {images}"
        )
    folder = Path(settings.results, "judge", Path(stage).stem) if out is None else out
    check_writable(*record.files(folder))
    used = secrets.randbits(32) if seed is None else seed
    wanted = Wanted(
        stage, name, built, batch_size, repeats, images, used, beside, rivals, tuple(part or ())
    )
    judgement = Judgement(settings, wanted, loaded, folder, typer.echo)
    judgement.open()  # what cannot be judged at all leaves an earlier judgement as it is
    if record.clear(folder):
        typer.echo(f"{folder}: the earlier judgement there is removed", err=True)
    findings = judgement.make()
    typer.echo(f"{findings.stage}: {findings.verdict}")
    typer.echo(f"page: {folder / record.PAGE}")
    if findings.rejected:
        raise typer.Exit(1)
