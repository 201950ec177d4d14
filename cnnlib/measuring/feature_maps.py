"""What a trained network looks like: its first filters, and what it makes of an image.

Trained by stage `gemm`, which runs everywhere. Other stages run the same training, which ends with
other weights once rounding has driven them apart, but with filters of the same kind. The maps are
computed by the float64 reference layers.
"""

import time
from typing import Any

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.layers import Array, Conv, Subsample
from cnnlib.measuring.learning_curve import watched_images
from cnnlib.measuring.runs import Run, seed_of, usual_batch_size
from cnnlib.network import Network
from cnnlib.stages import gemm
from cnnlib.training.loop import epoch_order, start
from cnnlib.training.target import Target, open_engine, open_target, setup_of

Row = dict[str, Any]


def features(config: Config, network: Network, dataset: Dataset) -> list[Row]:
    """Rows of the table `features`: filters, one image, and its maps after each convolution's
    activation and each subsampling; none for a network that does not begin with maps.
    """
    run = Run(dataset.name, network.name, gemm.STAGE.name, usual_batch_size(config), 1)
    with open_target(gemm.STAGE, config.sweep.device) as target:
        parameters = trained(config, network, dataset, run.batch_size, target)
        device = target.name
    identity = {
        "dataset": run.dataset, "network": run.network, "stage": run.stage, "device": device,
        "batch_size": run.batch_size, "seed": seed_of(config, 1), "repeat": 1,
    }  # fmt: skip
    standing = {
        "device_kind": "cpu", "status": "ok", "validated": False, "extrapolated": False,
    }  # fmt: skip
    views = network.views(parameters)
    image = dataset.test_images[watched_images(dataset, [])[-1]]
    found = [*filters(network, views), *maps(network, views, image, dataset)]
    return [identity | row | standing for row in found]


def trained(
    config: Config, network: Network, dataset: Dataset, batch_size: int, target: Target
) -> Array:
    """Parameters after training.epochs, or as much of it as measuring.budget_seconds allow."""
    ends = time.perf_counter() + config.measuring.budget_seconds
    count, seed, epochs = len(dataset.train_labels), seed_of(config, 1), config.training.epochs
    steps = count // batch_size
    part = max(1, steps // 20)
    setup = setup_of(config, network, dataset, batch_size)
    with open_engine(gemm.STAGE, setup, target, dataset) as engine:
        start(engine, seed)
        for epoch in range(1, epochs + 1):
            order = epoch_order(count, seed, epoch)
            rates = engine.setup.schedule.rates(epoch, epochs, steps)
            for first in range(0, steps, part):
                last = min(first + part, steps)
                if time.perf_counter() < ends:
                    engine.train(order[first * batch_size : last * batch_size], rates[first:last])
        return engine.parameters.astype(np.float64)


def filters(network: Network, views: list[Any]) -> list[Row]:
    """The weights of the first convolution; row and column within the filter."""
    for i, layer in enumerate(network.layers):
        if isinstance(layer, Conv):
            return numbers("filter", network.layer_names[i], views[i]["weight"])
    return []


def maps(network: Network, views: list[Any], image: Array, dataset: Dataset) -> list[Row]:
    """The image as bytes, and its maps, as far as there are maps."""
    rows = numbers("image", "images", image[:, None].astype(np.float64))
    source = (image - np.float64(dataset.mean)) / np.float64(dataset.deviation)
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
            "kind": kind, "layer": layer, "map": m, "source": s, "row": r, "column": c,
            "value": round(float(value), 5),
        }
        for (m, s, r, c), value in np.ndenumerate(values)
    ]  # fmt: skip
