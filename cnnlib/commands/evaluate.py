"""The command that says how well trained weights recognise images whose classes are known."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from cnnlib.commands.options import CONFIG, ConfigFiles, columns, first, stage_of
from cnnlib.commands.reading_weights import ENDINGS, Asked, DeviationOption, MeanOption

if TYPE_CHECKING:
    from cnnlib.engine import Bytes, Stage
    from cnnlib.exchange.weights import Weights
    from cnnlib.layers import Array

BATCH = 250
"""Images whose logits are computed at a time."""

ClassResult = TypedDict(
    "ClassResult", {"class": int, "name": str, "images": int, "accuracy": float | None}
)
"""How many images of a class there are, and the share of them that is recognised."""


class Evaluated(TypedDict):
    """How well weights recognise images."""

    images: int
    accuracy: float
    loss: float
    """The mean cross-entropy."""
    classes: list[ClassResult]


def evaluate(
    weights: Annotated[Path, typer.Option(help=f"The file: {ENDINGS}.")] = Path(
        "results/weights.npz"
    ),
    config: ConfigFiles = CONFIG,
    dataset: Annotated[str | None, typer.Option(help="Default: the sweep's first.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The data set's .npz file; default: from results/data, downloaded if missing."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a data set's test images: an .npz file with the arrays `images`, "
            "bytes (N, C, H, W) or (N, H, W), and `labels` (N,)."
        ),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="A network of the config; default: the file's own.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="The stage that computes the logits; default: gemm.")
    ] = None,
    mean: MeanOption = None,
    deviation: DeviationOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Evaluate weights on the test images of a data set, or on given images.

    The accuracy, the mean cross-entropy and the accuracy on each class are printed. Images are
    normalised as the file says or, where it does not, like those of the data set. When a logit is
    not finite, the exit code is 1.
    """
    import json

    import numpy as np

    from cnnlib.config import load_config
    from cnnlib.exchange.agreement import cpu_stage

    settings = load_config(config)
    chosen = None if stage is None else stage_of(settings, stage)
    if images is None:
        dataset = first(dataset, settings.sweep.datasets)
    asked = Asked(config, network, dataset, data, mean, deviation)
    # A data set that is fetched or made says so, which is no JSON.
    with contextlib.redirect_stdout(sys.stderr):
        read = asked.read(weights)
        names = read.class_names or (() if dataset is None else asked.class_names())
        if images is None:
            pixels, labels = asked.images.test_images, asked.images.test_labels
            where = f"test images of {dataset}"
        else:
            pixels, labels = labelled(images, read)
            where = f"images of {images}"
    chosen = chosen or cpu_stage(read.network)
    logits = logits_by(chosen, read, pixels, settings.sweep.device)
    if not np.isfinite(logits).all():
        typer.echo(f"diverged: {weights} computes logits that are not finite", err=True)
        raise typer.Exit(1)
    result = evaluated(logits, labels, names)
    if as_json:
        about = {"weights": str(weights), "on": where, "stage": chosen.name}
        typer.echo(json.dumps(about | result, indent=2))
    else:
        typer.echo(f"{weights} on {len(labels):,} {where}, by stage {chosen.name}")
        typer.echo(in_words(result))


def labelled(path: Path, weights: "Weights") -> "tuple[Bytes, Bytes]":
    """Images (N, C, H, W) and labels (N,) of an .npz file; DataError if they do not suit."""
    import numpy as np

    from cnnlib.errors import DataError
    from cnnlib.files import read_arrays

    network = weights.network
    found = read_arrays(path, ("images", "labels"), "file of images")
    images, labels = found["images"], found["labels"]
    if images.ndim == 3:
        images = images[:, np.newaxis]
    if images.dtype != np.uint8 or images.shape[1:] != network.input_shape:
        raise DataError(
            f"{path}: images are {images.dtype} of shape {images.shape[1:]} each, expected uint8 "
            f"of {network.input_shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise DataError(
            f"{path}: labels are {labels.dtype} of shape {labels.shape}, expected whole numbers of "
            f"{(len(images),)}"
        )
    if not len(labels):
        raise DataError(f"{path} holds no images")
    if labels.min() < 0 or labels.max() >= network.classes:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= network.classes))[0])
        raise DataError(
            f"{path}: label {labels[wrong]} of image {wrong} is not below {network.classes}, the "
            "number of classes"
        )
    return images, labels


def logits_by(stage: "Stage", weights: "Weights", images: "Bytes", device: str) -> "Array":
    """Logits (n, classes) of images (n, C, H, W) by a stage on `device`, as in sweep.device."""
    from cnnlib.engine import Setup
    from cnnlib.training.target import open_engine, open_target

    setup = Setup(weights.network, BATCH, 0.0, mean=weights.mean, deviation=weights.deviation)
    with open_target(stage, device) as target, open_engine(stage, setup, target) as engine:
        engine.parameters = weights.parameters
        return engine.logits(images)


def evaluated(logits: "Array", labels: "Array", names: Sequence[str]) -> Evaluated:
    """How well logits (n, classes) name the classes `labels` (n,), over all images and by class."""
    import numpy as np
    from scipy.special import log_softmax

    right = logits.argmax(axis=1) == labels
    losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    classes: list[ClassResult] = []
    for label in range(logits.shape[1]):
        ours = right[labels == label]
        classes.append(
            {
                "class": label,
                "name": names[label] if names else str(label),
                "images": len(ours),
                "accuracy": float(ours.mean()) if len(ours) else None,
            }
        )
    return {
        "images": len(labels),
        "accuracy": float(right.mean()),
        "loss": float(losses.mean()),
        "classes": classes,
    }


def in_words(result: Evaluated) -> str:
    """Two lines for all images, and a table of the classes."""
    wrong = round(result["images"] * (1 - result["accuracy"]))
    rows = [["class", "images", "accuracy"]]
    for each in result["classes"]:
        share = each["accuracy"]
        said = "" if share is None else f"{100 * share:.2f} %"
        rows.append([each["name"], str(each["images"]), said])
    return (
        f"accuracy {100 * result['accuracy']:.2f} %, {wrong:,} wrong\n"
        f"loss {result['loss']:.4f}\n\n{columns(rows)}"
    )
