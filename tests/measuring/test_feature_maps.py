"""Filters and feature maps are those of the trained network."""

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.measuring.feature_maps import feature_maps
from cnnlib.stages import gemm
from cnnlib.training.loop import start, train_epochs
from cnnlib.training.target import Target, open_engine, setup_of
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


COLUMNS = ["map", "source", "row", "column"]


def test_features_are_those_of_the_training(data: Dataset) -> None:
    config = toy_config()
    network = config.network("small", "toy", "a test")
    rows = feature_maps(config, network, data)
    setup = setup_of(config, network, data, 8)
    with open_engine(gemm.STAGE, setup, Target("here", "cpu"), data) as engine:
        start(engine, config.training.seed)
        list(train_epochs(engine, len(data.train_labels), config.training.epochs, 1))
        weights = network.views(engine.parameters)[0]["weight"]
    found = [row for row in rows if row["kind"] == "filter"]
    assert len(found) == weights.size
    for row in found:
        assert row["value"] == pytest.approx(weights[tuple(row[c] for c in COLUMNS)], abs=6e-6)
    image = [row for row in rows if row["kind"] == "image"]
    assert len(image) == 64
    assert all(0 <= row["value"] <= 255 for row in image)
    shapes = {
        layer: tuple(
            max(row[c] for row in rows if row["layer"] == layer) + 1
            for c in ("map", "row", "column")
        )
        for layer in ("activation1", "subsample1")
    }
    assert shapes == {"activation1": (2, 6, 6), "subsample1": (2, 3, 3)}
    # After relu and the maximum of each window.
    values = {
        (row["layer"], row["map"], row["row"], row["column"]): row["value"]
        for row in rows
        if row["kind"] == "map"
    }
    assert min(values.values()) == 0
    window = [values["activation1", 1, r, c] for r in (2, 3) for c in (4, 5)]
    assert values["subsample1", 1, 1, 2] == max(window)


def test_a_network_without_maps_has_no_features(data: Dataset) -> None:
    config = toy_config(networks={"small": [{"dense": 3}]})
    assert feature_maps(config, config.network("small", "toy", "a test"), data) == []


def test_a_training_that_takes_too_long_is_cut(data: Dataset) -> None:
    config = toy_config(measuring={"budget_seconds": 1e-9})
    network = config.network("small", "toy", "a test")
    rows = [row for row in feature_maps(config, network, data) if row["kind"] == "filter"]
    untrained = network.views(network.initial_parameters(config.training.seed))[0]["weight"]
    assert np.allclose([row["value"] for row in rows], untrained.ravel(), atol=6e-6)
