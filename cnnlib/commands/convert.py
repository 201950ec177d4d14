"""The command that writes weights in another format, and checks that other programs agree."""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnnlib.commands.options import PerhapsConfigFiles, at_least_one
from cnnlib.commands.reading_weights import (
    ENDINGS,
    Asked,
    DeviationOption,
    MeanOption,
    NamelessNetworkOption,
)

if TYPE_CHECKING:
    from cnnlib.engine import Bytes
    from cnnlib.exchange.agreement import Difference
    from cnnlib.exchange.weights import Weights
    from cnnlib.layers import Shape


class Input(StrEnum):
    """What a model of ONNX takes."""

    uint8 = "uint8"
    float32 = "float32"


def convert(
    source: Annotated[Path, typer.Argument(help=f"A file of weights: {ENDINGS}.")],
    target: Annotated[Path, typer.Argument(help="The file to write; its ending says the format.")],
    config: PerhapsConfigFiles = None,
    network: NamelessNetworkOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="The data set that the network is for. It says what the file does not: how images "
            "are normalised and what classes are called. --check uses its test images."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The data set's .npz file.")] = None,
    mean: MeanOption = None,
    deviation: DeviationOption = None,
    takes: Annotated[
        Input,
        typer.Option(
            "--input",
            help="What an .onnx model takes: bytes, which it normalises, or normalised images.",
        ),
    ] = Input.uint8,
    opset: Annotated[
        int | None,
        typer.Option(help="The version of ONNX's operators; a lower one for older runtimes."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare logits with onnxruntime's for .onnx files, and with PyTorch's for "
            "others; nothing is written unless they agree.",
        ),
    ] = False,
    images: Annotated[int, typer.Option(help="Images for --check.")] = 1000,
) -> None:
    """Convert a file of weights to another format: to and from PyTorch and ONNX.

    The exit code is 1 if --check finds that another program computes other logits.
    """
    from cnnlib.errors import ConfigError
    from cnnlib.exchange import onnx_export
    from cnnlib.exchange.formats import format_of
    from cnnlib.files import check_writable, write_whole

    at_least_one(images=images)
    written = format_of(target)
    opsets = onnx_export.OPSETS
    if opset is not None and opset not in opsets:
        raise ConfigError(f"--opset is one of {opsets[0]} to {opsets[-1]}, not {opset}")
    check_writable(target)
    asked = Asked(config, network, dataset, data, mean, deviation)
    weights = asked.read(source)
    if dataset is not None and not weights.class_names:
        weights = dataclasses.replace(weights, class_names=asked.class_names())
    with write_whole(target) as temporary:
        if target.suffix.lower() == ".onnx":
            onnx_export.write(temporary, weights, takes.value, opset)
        else:
            written.write(temporary, weights)
        if check:
            pixels = (
                noise(weights.network.input_shape, images)
                if dataset is None
                else asked.images.test_images[:images]
            )
            report(differences([source, temporary], weights, pixels))
    typer.echo(
        f"{target}: {written.title}, network {weights.network.name} "
        f"({weights.network.parameter_count:,} parameters)"
    )


def noise(shape: "Shape", count: int) -> "Bytes":
    """Images (count, C, H, W) of random bytes, the same ones each time."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def differences(files: list[Path], weights: "Weights", images: "Bytes") -> "list[Difference]":
    """How far other programs are from this library, for the files with these weights.

    Models of ONNX are computed by onnxruntime; if none of the files is one, the network is computed
    by PyTorch. Raises DataError for a file that does not give back the same parameters.
    """
    import numpy as np

    from cnnlib.errors import DataError
    from cnnlib.exchange.agreement import with_onnxruntime, with_pytorch
    from cnnlib.exchange.formats import load_weights

    for path in files:
        again = load_weights(path, weights.network, weights.mean, weights.deviation)
        if not np.array_equal(again.parameters, weights.parameters):
            raise DataError(f"{path} does not hold the parameters that it should")
    models = [path for path in files if path.suffix.lower() == ".onnx"]
    found = [with_onnxruntime(path, weights, images) for path in models]
    return found or [with_pytorch(weights, images)]


def report(found: "list[Difference]") -> None:
    """Print each difference; exit with code 1 if one is too large."""
    from cnnlib.exchange.agreement import TOLERANCE

    for difference in found:
        typer.echo(str(difference))
        if not difference.agrees:
            typer.echo(
                f"they differ by more than {TOLERANCE:g} of the largest: nothing is written",
                err=True,
            )
            raise typer.Exit(1)
