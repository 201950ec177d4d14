"""The promises of every engine hold for all stages, on a GPU or emulated."""

import math

import numpy as np
import pytest

from cnnlib.stages import LADDER, VARIANTS
from cnnlib.validation.reference import FAST_REFERENCE
from tests.support.engines import each_of, on, open_engine, pictures, training
from tests.support.networks import awkward, lenet5, small

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("in_haste")]

each_stage = each_of([*LADDER, *VARIANTS])


@each_stage
@on(awkward())
def test_repeats_are_bit_identical(stage, network, device):
    results = []
    for _ in range(2):
        with training(stage, network, 20, 40, device, momentum=0.5) as engine:
            loss = engine.train(np.random.default_rng(0).permutation(40))
            logits = engine.logits(pictures(network, 9)[0])
            results.append((loss, engine.parameters, engine.velocity, logits))
    for first, second in zip(*results, strict=True):
        assert np.array_equal(first, second)


@each_stage
@on(small())
def test_momentum(stage, network, device):
    images, labels = pictures(network, 4)
    options = dict(learning_rate=0.5, momentum=0.75)
    with training(stage, network, 2, 4, device, **options) as engine:
        assert not engine.velocity.any()
        start = engine.parameters
        _, first = engine.gradient(images[:2], labels[:2])
        engine.train(np.array([0, 1]))
        assert engine.velocity == pytest.approx(first, rel=1e-5)
        assert engine.parameters == pytest.approx(start - 0.5 * first, rel=1e-5)
        after_one = engine.parameters
        _, second = engine.gradient(images[2:], labels[2:])
        engine.train(np.array([2, 3]))
        velocity = 0.75 * first + second
        assert engine.velocity == pytest.approx(velocity, rel=1e-4, abs=1e-6)
        assert engine.parameters == pytest.approx(after_one - 0.5 * velocity, rel=1e-4, abs=1e-6)


@each_stage
@on(small())
def test_every_step_has_its_learning_rate(stage, network, device):
    """It does so even where the device holds the images of only two steps at a time."""
    images, labels = pictures(network, 6)
    rates = np.array([0.5, 0.0, 0.25])
    with training(stage, network, 2, 6, device, resident_images=4) as engine:
        weights = engine.parameters
        for _ in range(2):
            engine.parameters = weights
            engine.train(np.arange(6), rates)
        after = engine.parameters
        engine.parameters = weights
        for step, rate in enumerate(rates):
            part = slice(2 * step, 2 * step + 2)
            _, gradient = engine.gradient(images[part], labels[part])
            engine.parameters = engine.parameters - rate.astype(gradient.dtype) * gradient
        assert after == pytest.approx(engine.parameters, rel=1e-5, abs=1e-7)
        assert abs(after - weights).max() > 0.01


@each_stage
@on(small())
def test_images_after_the_last_whole_batch_are_dropped(stage, network, device):
    results = []
    for order in ([5, 1, 4, 2, 0, 3], [5, 1, 4, 2, 0, 3, 7, 6]):
        with training(stage, network, 3, 8, device) as engine:
            results.append((engine.train(np.array(order)), engine.parameters))
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])


@each_stage
@on(small())
def test_training_reports_the_mean_loss_of_its_steps(stage, network, device):
    images, labels = pictures(network, 8)
    with training(stage, network, 2, 8, device) as engine:
        losses = []
        for start in range(0, 8, 2):
            losses.append(engine.gradient(images[start : start + 2], labels[start : start + 2])[0])
            engine.train(np.arange(start, start + 2))
    with training(stage, network, 2, 8, device) as engine:
        assert engine.train(np.arange(8)) == pytest.approx(np.mean(losses), rel=1e-6)


@each_stage
@on(awkward())
def test_a_training_continues_bit_for_bit(stage, network, device):
    order = np.random.default_rng(0).permutation(32)
    with training(stage, network, 8, 32, device, momentum=0.9) as engine:
        engine.train(order)
        whole = engine.parameters, engine.velocity
    with training(stage, network, 8, 32, device, momentum=0.9) as engine:
        engine.train(order[:16])
        parameters, velocity = engine.parameters, engine.velocity
    with training(stage, network, 8, 32, device, momentum=0.9) as engine:
        engine.parameters, engine.velocity = parameters, velocity
        engine.train(order[16:])
        assert np.array_equal(engine.parameters, whole[0])
        assert np.array_equal(engine.velocity, whole[1])


@each_stage
@on(small())
def test_parameters_and_velocity_are_copies(stage, network, device):
    with training(stage, network, 2, 4, device) as engine:
        engine.train(np.arange(4))
        for name in ("parameters", "velocity"):
            before = getattr(engine, name)
            given = before.copy()
            setattr(engine, name, given)
            given[:] = 7
            getattr(engine, name)[:] = 8
            assert np.array_equal(getattr(engine, name), before)


@each_stage
@on(awkward())
def test_gradient_and_logits_change_nothing(stage, network, device):
    images, labels = pictures(network, 8)
    with training(stage, network, 8, 8, device, momentum=0.9) as engine:
        engine.train(np.arange(8))
        before = engine.parameters, engine.velocity
        first = engine.gradient(images, labels)
        engine.logits(images)
        engine.backward(images, np.ones((8, network.classes)))
        second = engine.gradient(images, labels)
        assert np.array_equal(engine.parameters, before[0])
        assert np.array_equal(engine.velocity, before[1])
        assert first[0] == second[0]
        assert np.array_equal(first[1], second[1])


@each_stage
@on(awkward())
def test_logits_of_any_number_of_images(stage, network, device):
    images, _ = pictures(network, 21)
    with open_engine(stage, network, 4, device) as engine:
        together = engine.logits(images)
        assert together.shape == (21, 5)
        apart = np.concatenate([engine.logits(images[:1]), engine.logits(images[1:])])
        assert together == pytest.approx(apart, rel=1e-5, abs=1e-6)
        assert engine.logits(images[:0]).shape == (0, 5)
    with open_engine(FAST_REFERENCE, network, 21) as reference:
        assert together == pytest.approx(reference.logits(images), rel=1e-4, abs=1e-5)


@each_stage
@on(lenet5(), awkward())
def test_divergence_shows_in_the_loss(stage, network, device):
    with training(stage, network, 4, 8, device) as engine:
        vector = engine.parameters
        vector[0] = np.nan
        engine.parameters = vector
        assert math.isnan(engine.train(np.arange(4)))
        assert np.isnan(engine.logits(pictures(network, 1)[0])).any()


@each_stage
@on(lenet5())
def test_infinite_weights_show_in_the_loss(stage, network, device):
    with training(stage, network, 4, 8, device) as engine:
        engine.parameters = np.full(network.parameter_count, np.finfo(stage.dtype).max)
        with np.errstate(all="ignore"):
            assert not math.isfinite(engine.train(np.arange(4)))
