"""How commands get the images of a data set."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from cnnlib.config import Config
    from cnnlib.datasets import Dataset


def load_data(settings: "Config", name: str, path: Path | None) -> "Dataset":
    """The data set from `path`, or from where the workflow puts it.

    The workflow's file is made now if it is missing, damaged or of another specification than the
    config's.
    """
    from cnnlib import datasets

    spec = settings.dataset(name, "--dataset")
    if path is None:
        folder = Path(settings.results) / "data"
        path = folder / f"{name}.npz"
        there = path.exists()
        why = datasets.problem(name, path, spec) if there else ""
        if why:
            typer.echo(f"{why}; it is made again", err=True)
        if why or not there:
            datasets.download(name, spec, folder / name)
            datasets.prepare(name, spec, folder / name, path)
    return datasets.load(name, path, spec)
