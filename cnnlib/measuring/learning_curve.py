"""What a network knows in the course of its training: its accuracy, and what it takes a few digits
for.

A training is stopped at numbers of steps that double each time, so that the first moments are seen
as well as the last; only training is on the clock.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import Engine
from cnnlib.errors import ConfigError
from cnnlib.layers import Array
from cnnlib.training.loop import accuracy, epoch_order, start

Row = dict[str, Any]


def watched_images(dataset: Dataset, hard: Sequence[int]) -> list[int]:
    """Indices of test images to watch: the first of each class, then the `hard` ones.

    Raises ConfigError for an index that the test set does not have.
    """
    count = len(dataset.test_labels)
    for index in hard:
        if index >= count:
            raise ConfigError(
                f"hard image {index} of data set '{dataset.name}' is beyond its {count} test images"
            )
    _, first = np.unique(dataset.test_labels, return_index=True)
    return list(dict.fromkeys([*first.tolist(), *hard]))


def pauses(steps: int, epochs: int) -> list[int]:
    """Numbers of steps after which to look: 0, 1, 2, 4, ... and the end of every epoch."""
    total = steps * epochs
    doubling = [2**k for k in range(total.bit_length()) if 2**k < total]
    return sorted({0, *doubling, *(steps * epoch for epoch in range(1, epochs + 1))})


def learning_curve(
    engine: Engine,
    dataset: Dataset,
    watched: Sequence[int],
    *,
    seed: int,
    epochs: int,
    test_images: int,
    budget_seconds: float = math.inf,
    ended: Callable[[int], None] | None = None,
) -> tuple[list[Row], list[Row]]:
    """Train from the start, as training.train_epochs does, with looks in between.

    Returns rows of the tables `learning` (accuracy over the first `test_images` test images) and
    `predictions` (probabilities of the test images at the indices `watched`), without identity and
    standing. Ends after `epochs`, when `budget_seconds` of training are used up, or when the
    numbers are not finite any more. `ended` is called after each epoch, with its number, before
    anything is evaluated.
    """
    points: list[Row] = []
    beliefs: list[Row] = []
    images, labels = dataset.test_images[:test_images], dataset.test_labels[:test_images]
    indices = np.asarray(watched, dtype=np.intp)
    start(engine, seed)
    whole = len(dataset.train_labels) // engine.setup.batch_size * engine.setup.batch_size
    for seen, seconds in _stops(engine, len(dataset.train_labels), seed, epochs):
        if ended is not None and seen and seen % whole == 0:
            ended(seen // whole)
        moment = {"images": seen, "train_seconds": seconds}
        known = accuracy(engine, images, labels)
        points.append(moment | {"test_images": len(labels), "test_accuracy": known})
        logits = engine.logits(dataset.test_images[indices])
        if not (math.isfinite(known) and np.isfinite(logits).all()):
            break
        for index, chances in zip(indices.tolist(), probabilities(logits), strict=True):
            label = int(dataset.test_labels[index])
            text = " ".join(f"{chance:.4f}" for chance in chances)
            beliefs.append(moment | {"image_index": index, "label": label, "probabilities": text})
        if seconds >= budget_seconds:
            break
    return points, beliefs


def _stops(engine: Engine, count: int, seed: int, epochs: int) -> Iterator[tuple[int, float]]:
    """(images trained on, seconds of training) at every pause; trains in between."""
    size = engine.setup.batch_size
    steps = count // size
    done, seconds = 0, 0.0
    for pause in pauses(steps, epochs):
        if pause > done:
            # A stretch ends with its epoch at the latest: the end of every epoch is a pause.
            epoch, first = divmod(done, steps)
            began = time.perf_counter()
            order = epoch_order(count, seed, epoch + 1)
            rates = engine.setup.schedule.rates(epoch + 1, epochs, steps)
            last = first + pause - done
            engine.train(order[first * size : last * size], rates[first:last])
            seconds += time.perf_counter() - began
            done = pause
        yield done * size, seconds


def probabilities(logits: Array) -> Array:
    """Softmax of each row, in float64: (n, classes)."""
    exact = logits.astype(np.float64)
    powers = np.exp(exact - exact.max(axis=1, keepdims=True))
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares


def pictures(config: Config, name: str, dataset: Dataset) -> list[Row]:
    """Rows of the table `pictures`: the watched digits of a data set, as they are."""
    channels, height, width = dataset.test_images.shape[1:]
    hard = config.dataset(name, "sweep.datasets").hard_images
    return [
        {
            "dataset": name,
            "image_index": index,
            "label": int(dataset.test_labels[index]),
            "channels": channels,
            "height": height,
            "width": width,
            "pixels": dataset.test_images[index].tobytes().hex(),
        }
        for index in watched_images(dataset, hard)
    ]
