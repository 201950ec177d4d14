"""Commands that fetch data sets and combine tables."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.options import CONFIG, ConfigFiles


def download(
    dataset: Annotated[str, typer.Option(help="A data set of the config.")],
    folder: Annotated[Path, typer.Option(help="The folder for its files.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Download a data set's files and check them.

    Each file comes from the first mirror that has it.
    """
    from cnnlib import datasets
    from cnnlib.config import load_config

    datasets.download(dataset, load_config(config).dataset(dataset, "--dataset"), folder)


def prepare(
    dataset: Annotated[str, typer.Option(help="A data set of the config.")],
    folder: Annotated[Path, typer.Option(help="The folder with its files.")],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Convert a data set's files into one .npz file."""
    from cnnlib import datasets
    from cnnlib.config import load_config
    from cnnlib.files import check_writable

    check_writable(out)
    datasets.prepare(dataset, load_config(config).dataset(dataset, "--dataset"), folder, out)


def checksum(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Four IDX files, .npz files, files of records as CIFAR has them, an archive of "
            "such files, or a folder with train/CLASS and test/CLASS.",
        ),
    ],
    name: Annotated[str, typer.Option(help="The data set's name in the entry.")] = "mine",
    only: Annotated[
        str, typer.Option(help="Of an archive, only files whose names contain this text.")
    ] = "",
) -> None:
    """Print the entry of a data set for the config, with the checksums of its files.

    Kind, shape and classes are guessed from what is in the files. Look at the entry before you
    trust it.
    """
    import re

    import yaml

    from cnnlib import patterns
    from cnnlib.config import check_dataset
    from cnnlib.datasets.describe import describe
    from cnnlib.errors import UserError

    if not re.fullmatch(patterns.NAME, name):
        raise UserError(f"--name {name!r} must be made of {patterns.WORDS[patterns.NAME]}")
    entry = describe(files, only)
    check_dataset(name, entry)
    text = yaml.safe_dump({"datasets": {name: entry}}, sort_keys=False, default_flow_style=None)
    typer.echo(text.rstrip())


def combine(
    table: Annotated[str, typer.Option(help="The table's name: epochs, steps, ...")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    files: Annotated[list[Path] | None, typer.Argument(help="CSV files of that table.")] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="A file with further file names, one per line.")
    ] = None,
) -> None:
    """Check many CSV files and write all their rows into one."""
    from cnnlib.errors import DataError, UserError
    from cnnlib.measuring import schema

    if schema.current_name(table) not in schema.TABLES:
        raise UserError(f"unknown table {table!r} in --table; known: {', '.join(schema.TABLES)}")
    paths = list(files or [])
    if list_file is not None:
        try:
            names = list_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot read {list_file}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise DataError(f"{list_file} is not a list of files: it is not UTF-8") from None
        paths += [Path(name) for name in names if name.strip()]
    if list_file is not None and not paths:
        # A sweep without GPU stages has no transfers; a table without rows is then correct.
        schema.write(out, schema.current_name(table), [])
        typer.echo(f"{out}: no rows, {list_file} names no file")
        return
    rows = schema.combine(paths, table, out)
    typer.echo(f"{out}: {rows} rows of {len(paths)} files")
