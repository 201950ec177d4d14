"""A mean and a deviation of each channel: every stage sees the same numbers."""

import numpy as np
import pytest

from cnnlib.device import Device
from cnnlib.engine import Setup
from cnnlib.levels import first_of, for_maps, of_channels
from cnnlib.stages import LADDER, naive
from cnnlib.validation.parity import validate
from tests.support.engines import open_engine, pictures
from tests.support.networks import build

LAYERS = {
    "bytes": [
        {"conv": {"maps": 3, "kernel": 3}},
        {"activation": "tanh"},
        {"subsample": {"size": 2}},
        {"dense": 4},
    ],
    "stride": [
        {"conv": {"maps": 3, "kernel": 3, "stride": 2}},
        {"activation": "tanh"},
        {"dense": 4},
    ],
}
MEAN, DEVIATION = (30.0, 120.0, 200.5), (20.0, 64.25, 90.0)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("stage", LADDER, ids=lambda stage: stage.name)
def test_every_stage_has_the_levels_of_each_channel(
    stage: object, layers: str, device: Device
) -> None:
    network = build(f"colours_{layers}", (3, 10, 8), 4, LAYERS[layers])
    images, labels = pictures(network, 6)
    levels = {"mean": MEAN, "deviation": DEVIATION}
    with (
        open_engine(stage, network, 6, device, **levels) as engine,
        open_engine(naive.STAGE, network, 6) as other,
    ):
        assert validate(engine, images, labels) < 1
        # not merely the first channel's
        assert np.abs(engine.logits(images) - other.logits(images)).max() > 0.1
        by_hand = (images - np.reshape(MEAN, (3, 1, 1))) / np.reshape(DEVIATION, (3, 1, 1))
        logits = []
        for maps in by_hand:
            for layer, views in zip(
                network.layers, network.views(engine.parameters.astype(np.float64)), strict=True
            ):
                maps = layer.forward(views, maps)
            logits.append(maps)
        np.testing.assert_allclose(engine.logits(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", LADDER, ids=lambda stage: stage.name)
def test_the_same_level_thrice_is_one_level(stage: object, device: Device) -> None:
    network = build("colours", (3, 10, 8), 4, LAYERS["bytes"])
    images, _ = pictures(network, 6)
    found = []
    for mean, deviation in ((33.3, 78.6), ((33.3,) * 3, (78.6,) * 3)):
        with open_engine(stage, network, 6, device, mean=mean, deviation=deviation) as engine:
            found.append(engine.logits(images))
    np.testing.assert_array_equal(found[0], found[1])


def test_levels_of_channels() -> None:
    assert for_maps(3.5, np.float32).shape == ()
    assert for_maps((1.0, 2.0), np.float32).tolist() == [[[1.0]], [[2.0]]]
    assert of_channels(2.0, 3).tolist() == [2, 2, 2]
    assert (first_of((4.0, 5.0)), first_of(6.0)) == (4, 6)
    with pytest.raises(ValueError, match="shape"):
        of_channels((1.0, 2.0), 3)


def test_a_setup_with_levels_of_other_channels(device: Device) -> None:
    network = build("colours", (3, 10, 8), 4, LAYERS["bytes"])
    with pytest.raises(ValueError, match="3 channels, and its mean has 2 numbers"):
        Setup(network, 6, 0.1, mean=(1.0, 2.0))
