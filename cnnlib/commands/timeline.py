"""The command that records what every block of a persistent kernel does when."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.options import (
    CONFIG,
    USUAL_DATASET,
    ConfigFiles,
    at_least_one,
    dataset_for,
    first,
    report_death,
    run_of,
)


def timeline(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    stage: Annotated[str, typer.Option(help="A stage with a persistent kernel.")] = "tuned",
    dataset: Annotated[str | None, typer.Option(help=USUAL_DATASET)] = None,
    network: Annotated[str | None, typer.Option(help="Default: the sweep's first.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: the sweep's first.")] = None,
    steps: Annotated[int, typer.Option(help="Steps that are recorded, at least 2.")] = 16,
    perfetto: Annotated[
        Path | None, typer.Option(help="Also write a trace that ui.perfetto.dev opens.")
    ] = None,
    config: ConfigFiles = CONFIG,
) -> None:
    """Record when every block of a persistent kernel is in which section of a step.

    Every block reads the clock at the end of each section, which makes a step a little longer. The
    plan is that of the stage's rule: others are not compiled, as they are where one is measured.
    Noise serves for images. Without a GPU the blocks run one after another, and times mean nothing.
    Put beside the other tables as timeline.csv, the file is drawn in the report.
    """
    from cnnlib.config import load_config
    from cnnlib.errors import ConfigError
    from cnnlib.files import check_writable
    from cnnlib.measuring import schema
    from cnnlib.measuring.timeline import measure_timeline, write_trace
    from cnnlib.system.supervisor import supervise

    if steps < 2:
        raise ConfigError(f"--steps must be at least 2, not {steps}")
    settings = load_config(config)
    dataset = dataset_for(settings, dataset, network)
    size = first(batch_size, settings.sweep.batch_sizes)
    at_least_one(batch_size=size)
    run = run_of(settings, dataset, first(network, settings.sweep.networks), stage, size)
    for path in filter(None, (out, perfetto)):
        check_writable(path)

    def record() -> tuple[int, str]:
        """Write the files, whose rows are too many to be the result of a supervised call."""
        rows = measure_timeline(settings, run, steps)
        schema.write(out, "timeline", rows)
        if perfetto:
            write_trace(perfetto, rows)
        return len(rows), str(rows[0]["device"])

    with report_death():
        count, device = supervise(record, limit=settings.measuring.limit_seconds)
    typer.echo(f"{out}: {count} sections of {steps} steps on {device}")
