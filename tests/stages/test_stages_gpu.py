"""The GPU stages against the float64 reference, and what their engine promises.

Whatever `open_device("auto")` gives is tested: a GPU, or the same kernels emulated.
"""

import dataclasses
import math

import numpy as np
import pytest

from cnnlib.stages import gemm
from cnnlib.validation.parity import validate
from cnnlib.validation.reference import FAST_REFERENCE
from cnnlib.validation.spot_checks import FIVE_STEPS_BOUND, exact, five_steps
from tests.support.engines import (
    each_gpu_stage,
    on,
    open_engine,
    pictures,
    skip_if_declined,
    training,
)
from tests.support.networks import (
    GENERAL,
    GENERAL_LINEAR,
    LINEAR,
    NETWORKS,
    UNUSUAL,
    awkward,
    build,
    lenet5,
    small,
)

pytestmark = pytest.mark.usefixtures("in_haste")

LARGE_BATCH = 256
"""With so many images, and where kernels run often, optimising them is worth its time."""


# Right results


@each_gpu_stage
@pytest.mark.parametrize(
    ("network", "batch_size"),
    [
        pytest.param(
            network,
            size,
            id=f"{network.name}-{size}",
            marks=[pytest.mark.quick] * ((network.name, size) == ("awkward", 7)),
        )
        for network in (*NETWORKS.values(), *GENERAL.values())
        for size in (1, 2, 7, 16, 64, LARGE_BATCH)
    ],
)
def test_gradient_parity(stage, network, batch_size, device, optimized):
    skip_if_declined(stage, network)
    where = optimized if batch_size == LARGE_BATCH else device
    with open_engine(stage, network, batch_size, where) as engine:
        validate(engine, *pictures(network, batch_size))


@each_gpu_stage
@on(*UNUSUAL.values())
@pytest.mark.parametrize("batch_size", [1, 33])
def test_gradient_parity_of_unusual_networks(stage, network, batch_size, device):
    with open_engine(stage, network, batch_size, device) as engine:
        validate(engine, *pictures(network, batch_size))


@each_gpu_stage
@on(*NETWORKS.values(), *GENERAL.values())
@pytest.mark.parametrize("count", [1, 13, 31])
def test_gradient_of_part_of_a_batch(stage, network, count, optimized):
    skip_if_declined(stage, network)
    with open_engine(stage, network, 32, optimized) as engine:
        validate(engine, *pictures(network, 32))  # leaves more than `count` images in the buffers
        validate(engine, *pictures(network, count, seed=1))


@each_gpu_stage
@on(*NETWORKS.values(), *GENERAL.values())
@pytest.mark.parametrize(("batch_size", "momentum"), [(16, 0.0), (64, 0.9)])
def test_five_steps(stage, network, batch_size, momentum, device, optimized):
    skip_if_declined(stage, network)
    where = optimized if batch_size == 64 else device
    with open_engine(stage, network, batch_size, where, momentum=momentum) as engine:
        five_steps(engine, *pictures(network, 3 * batch_size))


@each_gpu_stage
@on(*LINEAR.values(), *GENERAL_LINEAR.values())
@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_integers_are_exact(stage, network, batch_size, device):
    skip_if_declined(stage, network)
    generator = np.random.default_rng(2)
    images = generator.integers(0, 4, (batch_size, *network.input_shape), dtype=np.uint8)
    with open_engine(stage, network, batch_size, device, mean=0, deviation=1) as engine:
        engine.parameters = generator.integers(-2, 3, network.parameter_count)
        error = generator.integers(-3, 4, (batch_size, network.classes))
        exact(engine, images, error)
        gradient = engine.backward(images, error)
        assert all(gradient[p.offset : p.offset + p.size].any() for p in network.parameters)
        assert np.abs(gradient).max() < 2**20  # sixteenths of it fit a float32 too


TIES = [
    build(
        name,
        (1, 14, 14),
        4,
        [{"conv": {"maps": 1, "kernel": 3}}, {"subsample": subsample}, {"dense": 4}],
    )
    for name, subsample in (
        ("ties2", 2),
        ("ties3", 3),
        ("ties_of_overlaps", {"size": 3, "stride": 2, "padding": 1}),
        ("ties_of_rows", {"size": [1, 4], "stride": [2, 1], "padding": [0, 2]}),
    )
]


@each_gpu_stage
@on(*TIES)
def test_first_of_equals_in_reading_order_wins(stage, network, device):
    skip_if_declined(stage, network)
    # Windows of zeros and ones are full of ties. The convolution copies its source, but the
    # gradients of its other weights depend on where in the source the errors arrive.
    generator = np.random.default_rng(0)
    images = generator.integers(0, 2, (8, 1, 14, 14), dtype=np.uint8)
    with open_engine(stage, network, 8, device, mean=0, deviation=1) as engine:
        vector = np.zeros(network.parameter_count)
        views = network.views(vector)
        views[0]["weight"][0, 0, 0, 0] = 1
        views[2]["weight"][...] = generator.integers(-3, 4, views[2]["weight"].shape)
        engine.parameters = vector
        exact(engine, images, generator.integers(-3, 4, (8, 4)))


# The same results, however they are asked for


@each_gpu_stage
@on(lenet5())
def test_three_trainings_of_two_epochs_are_bit_identical(stage, network, optimized):
    images, _ = pictures(network, 9)
    size = 32 if optimized.kind == "emulated" else 64  # fewer show the same, in half the time
    results = []
    for _ in range(3):
        with training(stage, network, size, 3 * size, optimized, momentum=0.5) as engine:
            orders = [np.random.default_rng(0).permutation(3 * size) for _ in range(2)]
            losses = [engine.train(order) for order in orders]
            results.append((losses, engine.parameters, engine.velocity, engine.logits(images)))
    for repeat in results[1:]:
        for first, again in zip(results[0], repeat, strict=True):
            assert np.array_equal(first, again)


@each_gpu_stage
@on(awkward())
def test_the_order_of_the_images_is_followed(stage, network, device):
    order = np.random.default_rng(3).permutation(40)
    results = []
    for trained, where in ((stage, device), (FAST_REFERENCE, None)):
        with training(trained, network, 10, 40, where) as engine:
            results.append((engine.train(order), engine.parameters))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert np.abs(results[0][1] - results[1][1]).max() < FIVE_STEPS_BOUND


@each_gpu_stage
@on(awkward())
def test_small_loads_train_as_one_large_load_does(stage, network, device):
    order = np.random.default_rng(0).permutation(50)
    results = []
    for resident in ("auto", 8, 20, 24, 1000):
        with training(
            stage, network, 8, 50, device, momentum=0.9, resident_images=resident
        ) as engine:
            results.append((engine.train(order), engine.parameters, engine.velocity))
    for loads in results[1:]:
        for first, again in zip(results[0], loads, strict=True):
            assert np.array_equal(first, again)


@each_gpu_stage
@on(small())
def test_large_loads_are_gathered_piece_by_piece(stage, network, device):
    order = np.random.default_rng(0).permutation(10_000)
    results = []
    for resident in ("auto", 1000, 3000):
        with training(stage, network, 1000, 10_000, device, resident_images=resident) as engine:
            results.append((engine.train(order), engine.parameters))
    with training(gemm.STAGE, network, 1000, 10_000, None) as engine:
        right = engine.train(order), engine.parameters
    for loss, parameters in results:
        assert loss == results[0][0]
        assert np.array_equal(parameters, results[0][1])
        assert loss == pytest.approx(right[0], rel=1e-5)
        assert np.abs(parameters - right[1]).max() < FIVE_STEPS_BOUND


@each_gpu_stage
@on(awkward())
def test_profiling_changes_nothing(stage, network, device):
    with training(stage, network, 8, 8, device, momentum=0.9) as engine:
        engine.train(np.arange(8))
        before = engine.parameters, engine.velocity
        profile = engine.profile()
        assert np.array_equal(engine.parameters, before[0])
        assert np.array_equal(engine.velocity, before[1])
    assert all(kernel.seconds > 0 for kernel in profile)
    assert {"conv1", "dense2"} <= {kernel.layer for kernel in profile if kernel.launches}
    assert {"input", "forward", "loss", "backward", "update"} <= {kernel.part for kernel in profile}
    least = {(kernel.layers, kernel.part): kernel.flops for kernel in profile}
    of_layers = sum(flops for (_, part), flops in least.items() if part in ("forward", "backward"))
    assert of_layers == 8 * sum(engine.network.training_flops)


@each_gpu_stage
@on(awkward())
def test_timed_training_is_the_same_training(stage, network, device):
    with training(stage, network, 8, 40, device, resident_images=16) as engine:
        engine.train(np.arange(40))
        parameters = engine.parameters
    with training(stage, network, 8, 40, device, resident_images=16) as engine:
        times = engine.train_timed(np.arange(40))
        assert np.array_equal(engine.parameters, parameters)
    assert min(times) >= 0
    assert times.kernels > 0
    assert times.total >= times.gather


@each_gpu_stage
@on(awkward())
def test_two_engines_on_one_device_keep_apart(stage, network, device):
    with (
        training(stage, network, 8, 16, device) as first,
        training(stage, network, 8, 16, device) as second,
    ):
        first.train(np.arange(16))
        second.train(np.arange(16)[::-1])
        parameters = first.parameters
        assert not np.array_equal(parameters, second.parameters)
    with training(stage, network, 8, 16, device) as alone:
        alone.train(np.arange(16))
        assert np.array_equal(alone.parameters, parameters)


# Nothing hides a NaN


@each_gpu_stage
@on(lenet5())
def test_a_nan_in_any_parameter_is_seen(stage, network, device):
    images, labels = pictures(network, 2)
    labels[:] = 0
    with training(stage, network, 2, 2, device) as engine:
        start = engine.parameters
        for p in network.parameters:
            for position in (p.offset, p.offset + p.size - 1):
                vector = start.copy()
                vector[position] = np.nan
                engine.parameters = vector
                where = f"element {position - p.offset} of {p.name}"
                assert math.isnan(engine.gradient(images, labels)[0]), where
                assert math.isnan(engine.train(np.arange(2))), where


LARGE = {("tuned", "hiding_in_planes"): 6e4}
"""Where numbers are FP16, whose range ends at 65,504."""
HIDING, HIDING_IN_OVERLAPS, HIDING_IN_PLANES = (
    build(
        name,
        (1, 6, 6),
        2,
        [
            {"conv": {"maps": maps, "kernel": 1}},
            {"conv": {"maps": 1, "kernel": 1}},
            {"activation": "tanh"},
            {"subsample": subsample},
            {"dense": 2},
        ],
    )
    for name, maps, subsample in (
        ("hiding", 1, 2),
        ("hiding_in_overlaps", 1, {"size": 3, "stride": 2}),
        ("hiding_in_planes", 5, 2),
    )
)


@each_gpu_stage
@on(HIDING, HIDING_IN_OVERLAPS, HIDING_IN_PLANES)
@pytest.mark.parametrize("position", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_nan_beats_any_other_value_of_its_window(stage, network, position, device):
    skip_if_declined(stage, network)
    images = np.ones((1, 1, 6, 6), np.uint8)
    with open_engine(stage, network, 1, device, mean=0, deviation=1) as engine:
        vector = np.ones(network.parameter_count)
        maps = network.parameters[0].shape[0]
        large = LARGE.get((stage.name, network.name), 3e38)
        vector[:maps] = large  # times 1 is finite, times 2 it is not
        vector[2 * maps : 3 * maps] = 0  # times what is finite is 0, else NaN
        engine.parameters = vector
        assert np.isfinite(engine.logits(images)).all()
        images[0, 0, 2 + position[0], 2 + position[1]] = 2
        assert np.isnan(engine.logits(images)).all()


# What the checks above must not let through


@each_gpu_stage
@on(awkward())
def test_a_wrong_rate_is_noticed(stage, network, device):
    class WrongRate(stage.engine):
        def _train(self, order, rates, pieces):
            loss = super()._train(order, rates, pieces)
            self.parameters = self.parameters * 0.999
            return loss

    with open_engine(dataclasses.replace(stage, engine=WrongRate), network, 16, device) as engine:
        with pytest.raises(Exception, match="five steps is off by"):
            five_steps(engine, *pictures(network, 80))
