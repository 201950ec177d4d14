"""What a network knows in the course of its training: its accuracy, and a few predictions.

A training is paused after numbers of steps that double each time, so that the first moments are
seen as well as the last. Only training is on the clock.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import Engine
from cnnlib.errors import ConfigError
from cnnlib.layers import softmax
from cnnlib.measuring.schema import Row
from cnnlib.training.loop import accuracy, batches, epoch_order, start


def watched_images(dataset: Dataset, hard: Sequence[int]) -> list[int]:
    """Indices of the test images to watch: the first of each class, then the `hard` ones.

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
    """Numbers of steps after which to pause: 0, 1, 2, 4, ... and the end of every epoch."""
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
    """Train from the start, as training.loop.train_epochs does, with pauses.

    Returns rows of the tables `learning` (accuracy over the first `test_images` test images) and
    `predictions` (probabilities of the test images at the indices `watched`), without identity and
    standing. Ends after `epochs`, when `budget_seconds` of training are used up, or when the
    numbers are no longer finite. `ended` is called after each epoch, with its number, before
    anything is evaluated.
    """
    points: list[Row] = []
    predictions: list[Row] = []
    images, labels = dataset.test_images[:test_images], dataset.test_labels[:test_images]
    indices = np.asarray(watched, dtype=np.intp)
    start(engine, seed)
    whole = len(dataset.train_labels) // engine.setup.batch_size * engine.setup.batch_size
    for seen, seconds in _stops(engine, len(dataset.train_labels), seed, epochs):
        if ended is not None and seen and seen % whole == 0:
            ended(seen // whole)
        moment: Row = {"images": seen, "train_seconds": seconds}
        share = accuracy(engine, images, labels)
        points.append(moment | {"test_images": len(labels), "test_accuracy": share})
        if dataset.has_validation:
            watched_share = accuracy(engine, dataset.validation_images, dataset.validation_labels)
            points[-1]["validation_accuracy"] = watched_share
        logits = engine.logits(dataset.test_images[indices])
        if not (math.isfinite(share) and np.isfinite(logits).all()):
            break
        for index, row in zip(indices.tolist(), softmax(logits.astype(np.float64)), strict=True):
            predictions.append(
                moment
                | {
                    "image_index": index,
                    "label": int(dataset.test_labels[index]),
                    "probabilities": " ".join(f"{probability:.4f}" for probability in row),
                }
            )
        if seconds >= budget_seconds:
            break
    return points, predictions


def _stops(engine: Engine, count: int, seed: int, epochs: int) -> Iterator[tuple[int, float]]:
    """Yield (images trained on, seconds of training) at every pause; train in between."""
    size = engine.setup.batch_size
    steps = count // size
    done, seconds = 0, 0.0
    for pause in pauses(steps, epochs):
        if pause > done:
            # Every stretch lies within one epoch, because the end of every epoch is a pause.
            epoch, first = divmod(done, steps)
            began = time.perf_counter()
            order = epoch_order(count, seed, epoch + 1)
            rates = engine.setup.schedule.rates(epoch + 1, epochs, steps)
            stretch = [(pause - done) * size]
            for chunk in batches(order, rates, size=size, lengths=stretch, first=first * size):
                engine.train(chunk.order, chunk.rates)
            seconds += time.perf_counter() - began
            done = pause
        yield done * size, seconds


def pictures(config: Config, name: str, dataset: Dataset) -> list[Row]:
    """Rows of the table `pictures`: the pixels of the watched test images of a data set."""
    channels, height, width = dataset.test_images.shape[1:]
    hard = config.dataset(name, "sweep.datasets").hard_images
    return [
        {
            "dataset": name,
            "image_index": index,
            "label": int(dataset.test_labels[index]),
            "class_name": dataset.name_of(int(dataset.test_labels[index]), ""),
            "channels": channels,
            "height": height,
            "width": width,
            "pixels": dataset.test_images[index].tobytes().hex(),
        }
        for index in watched_images(dataset, hard)
    ]
