"""What the GPU stages take and what they refuse: large maps, depth, memory, unknown layers."""

import dataclasses
import math

import numpy as np
import pytest

from cnnlib.device.emulated import EmulatedDevice
from cnnlib.engine import Setup, plan
from cnnlib.errors import DoesNotFit, Unsupported
from cnnlib.layers import Dense, Layer
from cnnlib.network import Network
from cnnlib.stages import fused, gemm_cuda, ring
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import five_steps
from tests.support.engines import each_gpu_stage, each_of, on, open_engine, pictures
from tests.support.networks import (
    awkward,
    build,
    curved,
    fused_linear,
    fused_means,
    fused_padding,
    fused_tall,
    lenet5,
    many_maps,
    small,
    strides,
    windows,
)

pytestmark = pytest.mark.usefixtures("in_haste")

# Maps larger than shared memory


def maps256():
    return build(
        "maps256",
        (1, 256, 256),
        4,
        [
            {"conv": {"maps": 3, "kernel": 5}},
            {"activation": "relu"},
            {"subsample": 3},
            {"conv": {"maps": 5, "kernel": 4, "stride": 2}},
            {"activation": "tanh"},
            {"dense": 4},
        ],
    )


def maps1024():
    return build(
        "maps1024",
        (1, 1024, 1024),
        3,
        [
            {"conv": {"maps": 2, "kernel": 5, "stride": 2}},
            {"activation": "relu"},
            {"subsample": {"size": 2, "method": "max"}},
            {"conv": {"maps": 2, "kernel": 3, "stride": 5}},
            {"dense": 3},
        ],
    )


KEEP_WHOLE_MAPS = {
    stage.name: rf"stage '{stage.name}' cannot take conv1.* of network '{{}}': .* shared memory, "
    r"which takes \d+ of \d+ bytes; stage 'ring'"
    for stage in (fused.STAGE, fused.PULL)
} | {
    name: rf"stage '{name}' keeps an image's maps .* shared memory: those of network '{{}}' \(.*\) "
    r"need [\d,]+ bytes, and a block may have [\d,]+$"
    for name in ("tuned", "tuned_split_at_use")
}
"""Stages that refuse such networks, and what they say."""


@each_gpu_stage
@on(maps256(), maps1024())
def test_large_maps(stage, network, optimized):
    if stage.name in KEEP_WHOLE_MAPS:
        message = KEEP_WHOLE_MAPS[stage.name].format(network.name)
        with pytest.raises(Unsupported, match=message):
            open_engine(stage, network, 2, optimized)
        return
    with open_engine(stage, network, 2, optimized) as engine:
        validate(engine, *pictures(network, 2))
        validate(engine, *pictures(network, 1))


@each_of([ring.STAGE])
@on(maps256())
def test_ring_trains_on_large_maps(stage, network, optimized):
    with open_engine(stage, network, 2, optimized, momentum=0.9, learning_rate=0.01) as engine:
        five_steps(engine, *pictures(network, 4))


@pytest.mark.parametrize("size", [64, 256, 1024, 4096])
def test_ring_needs_shared_memory_for_a_window_not_for_the_map(size, device):
    layers = [
        {"conv": {"maps": 8, "kernel": 5}},
        {"activation": "relu"},
        {"conv": {"maps": 16, "kernel": 5}},
        {"dense": 2},
    ]
    network = build("wide", (3, size, size), 2, layers)
    for planned in plan(ring.STAGE, network)[:2]:
        # Making it checks what it needs against the 48 KiB that it may have.
        assert planned.operator(planned, ring.STAGE, device).backward_bytes <= 48 * 1024
    if size > 64:
        planned = plan(fused.STAGE, network)[0]
        with pytest.raises(Unsupported, match="stage 'fused' cannot take conv1"):
            planned.operator(planned, fused.STAGE, device)


SHORT_OF_MEMORY = (
    *(awkward(), strides(), windows(), many_maps(), curved()),
    *(fused_padding(), fused_means(), fused_tall(), fused_linear()),
)
CUTS = ("tiles", "map_chunks", "error_tiles", "channel_chunks")


@pytest.fixture
def short_of_memory(monkeypatch):
    """So little shared memory that small maps are cut as large ones are otherwise."""
    monkeypatch.setattr(ring, "FEW_FLOATS", 300)
    monkeypatch.setattr(ring, "FLOATS", 600)


@on(*SHORT_OF_MEMORY)
def test_ring_cuts_what_does_not_fit(network, device, short_of_memory):
    with open_engine(ring.STAGE, network, 6, device) as engine:
        validate(engine, *pictures(network, 6))
        validate(engine, *pictures(network, 1))


def test_all_cuts_are_tested(device, short_of_memory):
    seen = set()
    for network in SHORT_OF_MEMORY:
        for planned in plan(ring.STAGE, network):
            if issubclass(planned.operator, ring.RingConv):
                operator = planned.operator(planned, ring.STAGE, device)
                seen |= {cut for cut in CUTS if getattr(operator, cut) > 1}
                seen |= {"band"} if operator.band < operator.out_rows else set()
    assert seen == {"band", *CUTS}


# Depth


def deep(convolutions):
    layers = [
        layer
        for _ in range(convolutions)
        for layer in ({"conv": {"maps": 3, "kernel": 3}}, {"activation": "tanh"})
    ]
    return build(f"deep{convolutions}", (1, 44, 44), 3, [*layers, {"dense": 3}])


def with_error_bytes(stage):
    """`stage` with an engine that knows the device memory of its error maps."""

    class Counting(stage.engine):
        def _error_maps(self, shapes):
            before = self.device.used_bytes()
            maps = super()._error_maps(shapes)
            self.error_bytes = self.device.used_bytes() - before
            return maps

    return dataclasses.replace(stage, engine=Counting)


class NoCompiler(EmulatedDevice):
    """Memory is given out without any kernel."""

    def compile(self, *source):
        return None


def error_bytes(stage, network, batch_size):
    counting = with_error_bytes(stage)
    with NoCompiler() as device:
        with counting.engine(counting, Setup(network, batch_size, 0.1), device) as engine:
            return engine.error_bytes


@each_of([ring.STAGE])
@on(deep(3), deep(12))
def test_recycled_error_maps_give_the_same_gradient(stage, network, device):
    with open_engine(stage, network, 5, device) as engine:
        validate(engine, *pictures(network, 5))
        five_steps(engine, *pictures(network, 15))


@pytest.mark.parametrize("batch_size", [1, 16])
def test_memory_for_error_maps_does_not_grow_with_depth(batch_size):
    shallow, twelve = deep(3), deep(12)
    largest = 4 * batch_size * 3 * 42 * 42
    of_ring = [error_bytes(ring.STAGE, each, batch_size) for each in (shallow, twelve)]
    assert of_ring[0] == of_ring[1] <= 2 * largest
    of_fused = [error_bytes(fused.STAGE, each, batch_size) for each in (shallow, twelve)]
    assert of_fused[1] > 2 * of_fused[0]


# Memory


@each_gpu_stage
def test_a_batch_that_does_not_fit_names_the_bytes(stage):
    network = small()
    with EmulatedDevice(memory=1_000_000) as device:
        with open_engine(stage, network, 64, device) as engine:
            engine.load(*pictures(network, 128))
            assert math.isfinite(engine.train(np.arange(128)))
        del engine
        with pytest.raises(DoesNotFit, match=r"\d+ bytes wanted, \d+ of 1000000 free"):
            open_engine(stage, network, 20_000, device)
        # what was taken for it is free again
        open_engine(stage, network, 64, device).close()


@each_gpu_stage
def test_a_training_set_larger_than_the_memory_goes_up_in_loads(stage):
    network = small()
    images, labels = pictures(network, 20_000)
    results = []
    for memory in (200_000, 10_000_000):
        with EmulatedDevice(memory=memory) as device:
            with open_engine(stage, network, 64, device) as engine:
                engine.load(images, labels)
                loss = engine.train(np.arange(len(labels)))
                assert device.used_bytes() <= memory
                results.append((loss, engine.parameters))
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])


@each_gpu_stage
def test_loads_that_do_not_fit_are_refused(stage):
    with EmulatedDevice(memory=200_000) as device:
        with open_engine(stage, small(), 64, device, resident_images=100_000) as engine:
            with pytest.raises(DoesNotFit, match=r"bytes wanted"):
                engine.load(*pictures(small(), 50_000))


@each_gpu_stage
def test_batches_beyond_the_kernels_indices_are_refused(stage, device):
    with pytest.raises(DoesNotFit, match=r"beyond 32-bit indices"):
        open_engine(stage, lenet5(), 2**23, device)


@each_of([gemm_cuda.STAGE, ring.STAGE])
def test_padding_beyond_the_kernels_indices_is_refused(stage, device):
    network = build(
        "far", (1, 6, 6), 2, [{"conv": {"maps": 1, "kernel": 1, "padding": 2**30}}, {"dense": 2}]
    )
    planned = plan(stage, network)[0]
    with pytest.raises(Unsupported, match=r"conv1 of network 'far': .* beyond 32-bit indices"):
        planned.operator(planned, stage, device)


@each_gpu_stage
def test_an_engine_gives_its_memory_back(stage, device):
    before = device.used_bytes()
    with open_engine(stage, small(), 16, device) as engine:
        engine.load(*pictures(small(), 64))
        engine.train(np.arange(64))
        assert device.used_bytes() > before
    del engine
    assert device.used_bytes() == before


# Layers


class Doubling(Layer):
    """target = 2 source."""

    kind = "doubling"
    shorthand = "nothing"

    def output_shape(self, shape):
        return shape

    def forward(self, parameters, source):
        return 2 * source

    def backward(self, parameters, source, target, target_error):
        return 2 * target_error, {}


@each_gpu_stage
def test_a_layer_kind_it_has_no_operator_for_is_named(stage, device):
    network = Network("doubled", (1, 4, 4), 3, (Doubling(), Dense(units=3)))
    message = (
        rf"stage '{stage.name}' has no operator for doubling1 of network 'doubled'; it knows: "
    )
    with pytest.raises(Unsupported, match=message + r".*conv.*dense"):
        stage.engine(stage, Setup(network, 2, 0.1), device)
