"""What the live part of the page needs: who recognises which digit when, and trained weights.

The moment of a look is the images that had been seen times the stage's own time for an image, as
its epochs were timed in the sweep. A stage that was not followed while it trained has the looks of
another at the same batch size: all stages compute the same up to rounding.
"""

import base64
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cnnlib.errors import DataError
from cnnlib.exchange.formats import load_weights
from cnnlib.layers import Activation, Array, Conv, Dense, Dropout, Subsample
from workflow.plotting import ladder, style, wording
from workflow.report.shown import Shown

PIXELS = 28
"""A side of the images that one can draw on the page."""
DRAWABLE = (1, PIXELS, PIXELS)
Json = dict[str, object]


@dataclass(frozen=True)
class Moment:
    """What a stage recognises when, for a page without a script."""

    title: str
    color: str
    looks: tuple[str, ...]
    """At each of the looks of the table: the time, and how many digits are recognised."""
    borrowed: bool


def recognition(shown: Shown) -> tuple[Json, list[Moment]]:
    """(all looks, a few of them for a table); empty where no training was followed.

    Digits are those of the table `predictions`: one of each class, and
    some that are hard to recognise.
    """
    digits, size = shown.table("predictions"), shown.size
    pictures = shown.tables.get("pictures")
    if digits.empty or pictures is None:
        return {}, []
    at_size = digits[(digits["batch_size"] == size) & (digits["status"] == "ok")]
    if at_size.empty:
        return {}, []
    images = list(dict.fromkeys(at_size["image_index"]))
    label = at_size.drop_duplicates("image_index").set_index("image_index")["label"]
    # the first of each class is the easy one: hard ones are listed behind them
    hard = [bool(label.iloc[: i + 1].eq(label.iloc[i]).sum() > 1) for i in range(len(label))]
    by_stage = {str(name): rows for name, rows in at_size.groupby("stage", sort=False)}
    own = {name: rows for name, rows in by_stage.items() if rows["images"].max() > 0}
    if not own:
        return {}, []
    longest = max(own.values(), key=lambda rows: (rows["images"].max(), len(rows)))
    columns = chosen(sorted(set(longest["images"])))
    stages: list[Json] = []
    moments = []
    for stage in shown.stages:
        seconds = shown.step_seconds(stage, size) / size
        if math.isnan(seconds):
            continue
        rows = own.get(stage, longest)
        borrowed = stage not in own or bool(rows["images"].max() < longest["images"].max())
        rows = longest if borrowed else rows
        looks = sorted(set(rows["images"]))
        believed = {
            (row["image_index"], row["images"]): most_probable(row["probabilities"])
            for row in rows.to_dict("records")
        }
        beliefs = [[believed[image, look] for look in looks] for image in images]
        stages.append(
            {
                "title": wording.title(stage),
                "color": style.mark(stage).color,
                "peer": stage in ladder.NAMES_OF_PEERS,
                "seconds": seconds,
                "borrowed": borrowed,
                "images": looks,
                "beliefs": beliefs,
            }
        )
        labels = [int(label[image]) for image in images]
        moments.append(
            Moment(
                wording.title(stage),
                style.mark(stage).color,
                tuple(
                    at_look(look, beliefs, labels, hard, looks, seconds) for look in chosen(looks)
                ),
                borrowed,
            )
        )
    found: Json = {
        "batch": size,
        "digits": [
            {
                "label": int(label[image]),
                "hard": is_hard,
                "pixels": pixels_of(pictures, shown.dataset, image),
            }
            for image, is_hard in zip(images, hard, strict=True)
        ],
        "stages": stages,
        "columns": columns,
    }
    return found, moments


def most_probable(probabilities: str) -> int:
    """The most probable class; the table has a probability for each, apart by spaces."""
    return int(np.argmax([float(chance) for chance in str(probabilities).split()]))


def chosen(looks: Sequence[int]) -> list[int]:
    """Images seen at the looks that the table shows: three that lie about evenly."""
    return [looks[i] for i in sorted({len(looks) // 2, 3 * len(looks) // 4, len(looks) - 1})]


def at_look(
    count: int,
    beliefs: Sequence[Sequence[int]],
    labels: Sequence[int],
    hard: Sequence[bool],
    looks: Sequence[int],
    seconds: float,
) -> str:
    """`1.23 ms: 9 of 10, 3 of 6 hard ones`."""
    look = bisect_right(looks, count) - 1
    right = [line[look] == label for line, label in zip(beliefs, labels, strict=True)]
    easy = [ok for ok, is_hard in zip(right, hard, strict=True) if not is_hard]
    rest = [ok for ok, is_hard in zip(right, hard, strict=True) if is_hard]
    text = f"{wording.duration(looks[look] * seconds)}: {sum(easy)} of {len(easy)}"
    return text + (f", {sum(rest)} of {len(rest)} hard ones" if rest else "")


def pixels_of(pictures: pd.DataFrame, dataset: str, image: int) -> str:
    """The bytes of a picture in hexadecimal, row by row; "" where it is not in the table."""
    found = pictures[(pictures["dataset"] == dataset) & (pictures["image_index"] == image)]
    return str(found.iloc[0]["pixels"]) if len(found) else ""


def network(path: Path) -> Json:
    """Trained weights for the page's own forward pass, as float16 in base64.

    Raises DataError for a network that the page cannot compute: it takes one channel of 28x28
    pixels, convolutions without strides or padding, relu, subsampling side by side and dense
    layers.
    """
    weights = load_weights(path)
    net, tensors = weights.network, weights.tensors
    mean, deviation = weights.mean, weights.deviation
    if (
        tuple(net.input_shape) != DRAWABLE
        or isinstance(mean, tuple)
        or isinstance(deviation, tuple)
    ):
        raise DataError(
            f"{path}: the page draws images of 28x28 grey pixels, this network's differ"
        )
    names = iter(tensors)
    layers: list[Json] = []
    for layer in net.layers:
        if isinstance(layer, Conv | Dense):
            weight, bias = tensors[next(names)], tensors[next(names)]
            plain = not isinstance(layer, Conv) or (layer.stride, layer.padding) == ((1, 1), (0, 0))
            require(plain, path, "a convolution with strides or padding")
            kind = "conv" if isinstance(layer, Conv) else "dense"
            shape = list(weight.shape)
            layers.append(
                {"kind": kind, "shape": shape, "weight": packed(weight), "bias": packed(bias)}
            )
        elif isinstance(layer, Activation):
            require(layer.function == "relu", path, f"the activation {layer.function}")
            layers.append({"kind": "relu"})
        elif isinstance(layer, Subsample):
            simple = layer.stride in (None, layer.size) and not any(layer.padding)
            require(simple, path, "windows that overlap or are padded")
            layers.append({"kind": layer.method, "size": list(layer.size)})
        else:
            require(isinstance(layer, Dropout), path, f"a layer {type(layer).__name__}")
    origin = weights.origin
    return {
        "mean": float(mean),
        "deviation": float(deviation),
        "layers": layers,
        "origin": {key: origin[key] for key in sorted(origin)},
    }


def require(holds: bool, path: Path, what: str) -> None:
    """DataError naming the file unless the page can compute this."""
    if not holds:
        raise DataError(f"{path}: the page cannot compute {what}")


def packed(values: Array) -> str:
    """Numbers as float16 in base64, little-endian."""
    return base64.b64encode(values.astype("<f2").tobytes()).decode()
