"""The command that fills a lab report from measurements."""

from pathlib import Path
from typing import Annotated

import typer


def lab_report(
    results: Annotated[
        Path, typer.Argument(help="A folder of results, such as results, or one of `measure`.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write; its figures lie beside it.")] = Path(
        "report.md"
    ),
    dataset: Annotated[str, typer.Option(help="A data set; default: the first measured.")] = "",
    network: Annotated[str, typer.Option(help="A network; default: the first measured.")] = "",
    figures: Annotated[bool, typer.Option(help="Draw figures, which needs Matplotlib.")] = True,
) -> None:
    """Write a lab report: your own measurements in tables and figures, and questions to answer.

    Stages that were not measured have no number, and so have those that ran emulated: such times
    say nothing about a GPU. An existing report is not written over, since it may have answers.
    """
    from cnnlib.errors import ConfigError
    from cnnlib.exercises import lab_figures
    from cnnlib.exercises.lab_report import gather, page
    from cnnlib.files import check_writable, write_whole

    if out.exists():
        raise ConfigError(f"{out} exists already, and may have answers; choose another with --out")
    if figures:
        lab_figures.check_libraries()
    report = gather(results, dataset, network)
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = lab_figures.draw(report, out.parent, out.stem) if figures else []
    with write_whole(out) as path:
        path.write_text(page(report, drawn), encoding="utf-8")
    typer.echo(f"report: {out}")
