"""What a trained network looks like: its first filters, and the maps it makes of an image.

It is trained by stage `gemm`, which runs everywhere. Other stages run the same training; rounding
eventually drives their weights apart, but their filters are of the same kind. The maps are computed
by the float64 reference layers.
"""

import itertools
import time
from collections.abc import Sequence

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.layers import Array, Conv, Subsample, Views
from cnnlib.levels import for_maps
from cnnlib.measuring.learning_curve import watched_images
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import Run, seed_of, usual_batch_size
from cnnlib.measuring.schema import Row
from cnnlib.network import Network
from cnnlib.stages import gemm
from cnnlib.training.loop import batches, epoch_order, start
from cnnlib.training.target import Target, open_engine, open_target, setup_of


def feature_maps(config: Config, network: Network, dataset: Dataset) -> list[Row]:
    """Rows of the table `features`: filters, one image, and the image's maps.

    There are maps after each convolution's activation and after each subsampling. There are no
    rows for a network that does not begin with maps.
    """
    run = Run(dataset.name, network.name, gemm.STAGE.name, usual_batch_size(config), 1)
    with open_target(gemm.STAGE, config.sweep.device) as target:
        parameters = trained(config, network, dataset, run.batch_size, target)
        rows = RunRows(run, seed_of(config, 1), target.name, target.kind)
    views = network.views(parameters)
    image = dataset.test_images[watched_images(dataset, [])[-1]]
    found = [*filters(network, views), *maps(network, views, image, dataset)]
    return [rows.row(**row) for row in found]


def trained(
    config: Config, network: Network, dataset: Dataset, batch_size: int, target: Target
) -> Array:
    """Parameters after training.epochs, or as much of it as measuring.budget_seconds allow."""
    ends = time.perf_counter() + config.measuring.budget_seconds
    count, seed, epochs = len(dataset.train_labels), seed_of(config, 1), config.training.epochs
    steps = count // batch_size
    part = max(1, steps // 20) * batch_size
    setup = setup_of(config, network, dataset, batch_size)
    with open_engine(gemm.STAGE, setup, target, dataset) as engine:
        start(engine, seed)
        for epoch in range(1, epochs + 1):
            order = epoch_order(count, seed, epoch)
            rates = engine.setup.schedule.rates(epoch, epochs, steps)
            lengths = itertools.repeat(part)
            for chunk in batches(order, rates, size=batch_size, lengths=lengths):
                if time.perf_counter() < ends:
                    engine.train(chunk.order, chunk.rates)
        return engine.parameters.astype(np.float64)


def filters(network: Network, views: Sequence[Views]) -> list[Row]:
    """The weights of the first convolution; row and column are those within the filter."""
    for i, layer in enumerate(network.layers):
        if isinstance(layer, Conv):
            return numbers("filter", network.layer_names[i], views[i]["weight"])
    return []


def maps(network: Network, views: Sequence[Views], image: Array, dataset: Dataset) -> list[Row]:
    """The image as bytes, and its maps up to the first layer whose output is not a map."""
    rows = numbers("image", "images", image[:, None].astype(np.float64))
    mean, deviation = (for_maps(level, np.float64) for level in (dataset.mean, dataset.deviation))
    source = (image - mean) / deviation
    for i, layer in enumerate(network.layers):
        source = layer.forward(views[i], source)
        if source.ndim != 3:
            break
        following = network.layers[i + 1 : i + 2]
        between = isinstance(layer, Conv) and following and following[0].kind == "activation"
        if not between and (layer.kind in ("conv", "activation") or isinstance(layer, Subsample)):
            rows += numbers("map", network.layer_names[i], source[:, None])
    return rows if len(rows) > image.size else []


def numbers(kind: str, layer: str, values: Array) -> list[Row]:
    """A row for each of `values` (map, source, row, column)."""
    return [
        {
            "kind": kind,
            "layer": layer,
            "map": m,
            "source": s,
            "row": r,
            "column": c,
            "value": round(float(value), 5),
        }
        for (m, s, r, c), value in np.ndenumerate(values)
    ]
