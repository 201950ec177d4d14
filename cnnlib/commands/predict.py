"""The command that recognises what is on pictures by trained weights."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

import typer

from cnnlib.commands.options import PerhapsConfigFiles
from cnnlib.commands.reading_weights import (
    ENDINGS,
    Asked,
    DeviationOption,
    MeanOption,
    NamelessNetworkOption,
)

BAR_WIDTH = 40
"""Characters of the bar of a class that is certain."""
CERTAIN = 0.9
"""Probability below which an answer is doubtful.

Of LeNet-5's answers to 2,438 artificial photos of MNIST's test images, 99.5 % of those above this
probability were right, and 61 % of the 94 below it.
"""

Answer = TypedDict(
    "Answer",
    {
        "picture": str,
        "class": int,
        "name": str,
        "probability": float,
        "doubtful": bool,
        "runner_up": int | None,
        "runner_up_name": str | None,
        "probabilities": list[float],
    },
)
"""What a network takes a picture for."""


class Refusal(TypedDict):
    """A picture that cannot be read, and why."""

    picture: str
    error: str


def predict(
    pictures: Annotated[
        list[Path],
        typer.Argument(
            help="Photos or scans of one digit or sign each; for a network of three channels, "
            "photos of one thing each: PNG, JPEG, WebP, BMP, TIFF or GIF."
        ),
    ],
    weights: Annotated[
        Path,
        typer.Option(
            help=f"The file written by `train`, or another one that says its network: {ENDINGS}."
        ),
    ] = Path("results/weights.npz"),
    config: PerhapsConfigFiles = None,
    network: NamelessNetworkOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A data set of the config, which says what the file does not: how images are "
            "normalised and what classes are called."
        ),
    ] = None,
    mean: MeanOption = None,
    deviation: DeviationOption = None,
    class_names: Annotated[
        str | None,
        typer.Option(help="What the classes are called, as cat,dog; default: as the file says."),
    ] = None,
    ink: Annotated[
        bool | None,
        typer.Option(
            "--ink/--photo",
            help="Look for ink on paper, as in MNIST, or take the middle of the picture as it is; "
            "default: ink for a network of one channel.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with an object for each picture.")
    ] = False,
) -> None:
    """Recognise the class of each picture, such as a digit.

    The probability of every class is shown. An answer below 90 % is marked as doubtful and names
    the runner-up. Pictures that cannot be read are named on stderr; the others get their answers,
    and the exit code is 2.
    """
    import json

    import numpy as np

    from cnnlib.engine import Setup
    from cnnlib.errors import ConfigError, DataError
    from cnnlib.exchange.agreement import cpu_stage
    from cnnlib.exchange.formats import FORMATS
    from cnnlib.layers import softmax
    from cnnlib.photos.image import picture_format, read_image

    if kind := picture_format(weights):
        raise DataError(
            f"--weights {weights} is a {kind} picture: the option takes the file that `train` "
            f"wrote; pictures are given without an option"
        )
    if not weights.exists() and (named := [p for p in pictures if p.suffix in FORMATS]):
        raise DataError(
            f"there is no weights file {weights}, and {named[0]} is given as a picture: "
            f"--weights {named[0]} takes it for one"
        )
    asked = Asked(config, network, dataset, None, mean, deviation)
    with contextlib.redirect_stdout(sys.stderr):  # where a data set has to be fetched or made
        loaded = asked.read(weights)
        names = loaded.class_names or (() if dataset is None else asked.class_names())
    if class_names is not None:
        names = tuple(class_names.split(","))
    if len(names) not in (0, loaded.network.classes):
        raise ConfigError(
            f"--class-names has {len(names)} names for {loaded.network.classes} classes"
        )
    stage = cpu_stage(loaded.network)
    setup = Setup(loaded.network, 1, 0.0, mean=loaded.mean, deviation=loaded.deviation)
    answers: list[Answer | Refusal] = []
    failed = False
    with stage.engine(stage, setup) as engine:
        engine.parameters = loaded.parameters
        for picture in pictures:
            try:
                image = read_image(picture, loaded.network.input_shape, ink)
            except DataError as error:
                failed = True
                typer.echo(f"error: {error}", err=True)
                answers.append({"picture": str(picture), "error": str(error)})
                continue
            shares = softmax(engine.logits(image[np.newaxis])[0].astype(np.float64))
            found = answer(str(picture), shares.tolist(), names)
            answers.append(found)
            if not as_json:
                typer.echo(in_words(found, names))
    if as_json:
        typer.echo(json.dumps(answers, indent=2))
    if failed:
        raise typer.Exit(2)


def answer(picture: str, shares: list[float], names: Sequence[str] = ()) -> Answer:
    """The most probable class, the runner-up, and whether the answer is doubtful.

    Classes without `names` are called by their numbers.
    """
    names = names or [str(class_) for class_ in range(len(shares))]
    best, *others = sorted(range(len(shares)), key=lambda class_: -shares[class_])
    return {
        "picture": picture,
        "class": best,
        "name": names[best],
        "probability": shares[best],
        "doubtful": not shares[best] >= CERTAIN,
        "runner_up": others[0] if others else None,
        "runner_up_name": names[others[0]] if others else None,
        "probabilities": shares,
    }


def in_words(found: Answer, names: Sequence[str] = ()) -> str:
    """An answer as lines of text: the class, and a bar for every class."""
    shares = found["probabilities"]
    names = names or [str(class_) for class_ in range(len(shares))]
    width = max(4, 2 + max(map(len, names)))
    doubt = ""
    if found["doubtful"]:
        doubt = f" (doubtful: {100 * found['probability']:.1f} %"
        if found["runner_up"] is not None:
            doubt += f"; or {found['runner_up_name']}: {100 * shares[found['runner_up']]:.1f} %"
        doubt += ")"
    lines = [f"{found['picture']}: {found['name']}{doubt}"]
    for name, share in zip(names, shares, strict=True):
        bar = "#" * round(BAR_WIDTH * share)
        lines.append(f"{name:>{width}}  {100 * share:6.2f} %  {bar}".rstrip())
    return "\n".join(lines)
