"""The CPU stages against the float64 reference, and what every engine promises."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from networks import awkward, build, lenet5, simard

from cnnlib.engine import Setup
from cnnlib.engine.cpu import BLOCK_IMAGES
from cnnlib.errors import DeviceError
from cnnlib.layers import Conv, Dense, Subsample
from cnnlib.stages import LADDER, gemm, naive
from cnnlib.validate import (
    FAST_REFERENCE,
    ValidationFailed,
    exact,
    five_steps,
    validate,
)

CPU_STAGES = [stage for stage in LADDER if stage.runs_on == "cpu"]
NETWORKS = {
    network.name: network for network in (lenet5(), lenet5("mean", "tanh"), simard(), awkward())
}

each_stage = pytest.mark.parametrize("stage", CPU_STAGES, ids=lambda stage: stage.name)
each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def pictures(network, count, seed=0):
    """Random images, half of them with a dark background like digits, and labels."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *network.input_shape), dtype=np.uint8)
    images[::2, :, :3] = 0
    images[::2, :, :, -4:] = 0
    return images, generator.integers(0, network.classes, count).astype(np.uint8)


def open_engine(stage, network, batch_size, **options):
    settings = dict(learning_rate=0.05, mean=33.3, deviation=78.6) | options
    engine = stage.engine(stage, Setup(network, batch_size, **settings))
    engine.parameters = network.initial_parameters(1)
    return engine


@each_network
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "stage", [*CPU_STAGES, FAST_REFERENCE], ids=lambda stage: stage.name.replace(" ", "-")
)
def test_gradient_parity(stage, network, batch_size):
    with open_engine(stage, network, batch_size) as engine:
        validate(engine, *pictures(network, batch_size))


@each_network
@pytest.mark.parametrize("batch_size", [33, 100, 261])
def test_gradient_parity_of_batches_that_fill_no_block(network, batch_size):
    with open_engine(gemm.STAGE, network, batch_size) as engine:
        validate(engine, *pictures(network, batch_size))
        validate(engine, *pictures(network, batch_size // 3))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_gradient_parity_with_any_number_of_threads(threads):
    network, stage = awkward(), dataclasses.replace(gemm.STAGE, threads=threads)
    with open_engine(stage, network, 81) as engine:
        assert engine.lane_count == threads
        validate(engine, *pictures(network, 81))
        validate(engine, *pictures(network, 20))


@each_network
@pytest.mark.parametrize(("stage", "batch_size"), [(naive.STAGE, 2), (gemm.STAGE, 64)])
def test_five_steps(stage, network, batch_size):
    with open_engine(stage, network, batch_size, momentum=0.9) as engine:
        five_steps(engine, *pictures(network, 3 * batch_size))


LINEAR = {
    "conv, max, dense": (
        (2, 8, 9),
        [
            {"conv": {"maps": 3, "kernel": 3, "stride": 1}},
            {"conv": {"maps": 4, "kernel": 2}},
            {"dense": 4},
        ],
    ),
    "strides": (
        (3, 11, 8),
        [
            {"conv": {"maps": 3, "kernel": 3, "stride": 2}},
            {"conv": {"maps": 2, "kernel": 2, "stride": 3}},
            {"dense": 4},
        ],
    ),
    "subsampling": (
        (1, 14, 10),
        [
            {"conv": {"maps": 3, "kernel": 3}},
            {"subsample": {"size": 2, "method": "max"}},
            {"conv": {"maps": 2, "kernel": 1}},
            {"subsample": {"size": 2, "method": "mean"}},
            {"dense": 5},
            {"dense": 4},
        ],
    ),
}


@each_stage
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("batch_size", [1, 5, 40])
def test_integers_are_exact(stage, name, batch_size):
    input_shape, layers = LINEAR[name]
    network = build(name, input_shape, 4, layers)
    generator = np.random.default_rng(2)
    images = generator.integers(0, 4, (batch_size, *input_shape), dtype=np.uint8)
    with open_engine(stage, network, batch_size, mean=0, deviation=1) as engine:
        engine.parameters = generator.integers(-2, 3, network.parameter_count)
        error = generator.integers(-3, 4, (batch_size, 4))
        exact(engine, images, error)
        assert engine.backward(images, error).any()


@each_stage
@pytest.mark.parametrize("size", [2, 3])
def test_first_of_equals_in_reading_order_wins(stage, size):
    # Windows of zeros and ones are full of ties. The first convolution copies its source, but the
    # gradients of its other weights depend on where in the source the errors arrive.
    layers = [{"conv": {"maps": 1, "kernel": 3}}, {"subsample": size}, {"dense": 4}]
    network = build("ties", (1, 14, 14), 4, layers)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 2, (8, 1, 14, 14), dtype=np.uint8)
    with open_engine(stage, network, 8, mean=0, deviation=1) as engine:
        vector = np.zeros(network.parameter_count)
        views = network.views(vector)
        views[0]["weight"][0, 0, 0, 0] = 1
        views[2]["weight"][...] = generator.integers(-3, 4, views[2]["weight"].shape)
        engine.parameters = vector
        exact(engine, images, generator.integers(-3, 4, (8, 4)))


def training(stage, network, batch_size, count, **options):
    """An engine with `count` random images loaded."""
    engine = open_engine(stage, network, batch_size, **options)
    engine.load(*pictures(network, count))
    return engine


@each_stage
def test_repeats_are_bit_identical(stage):
    results = []
    for _ in range(2):
        with training(stage, awkward(), 20, 40, momentum=0.5) as engine:
            loss = engine.train(np.random.default_rng(0).permutation(40))
            results.append(
                (loss, engine.parameters, engine.velocity, engine.logits(pictures(awkward(), 9)[0]))
            )
    for first, second in zip(*results, strict=True):
        assert np.array_equal(first, second)


def test_repeats_of_long_trainings_are_bit_identical():
    results = []
    for _ in range(3):
        with training(gemm.STAGE, lenet5(), 64, 640) as engine:
            for _ in range(3):
                engine.train(np.arange(640))
            results.append(engine.parameters)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@each_stage
def test_momentum(stage):
    network = build("small", (1, 4, 4), 3, [{"dense": 3}])
    images, labels = pictures(network, 4)
    with open_engine(stage, network, 2, learning_rate=0.5, momentum=0.75) as engine:
        engine.load(images, labels)
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
def test_what_is_left_over_is_dropped(stage):
    network = build("small", (1, 4, 4), 3, [{"dense": 3}])
    results = []
    for order in ([5, 1, 4, 2, 0, 3], [5, 1, 4, 2, 0, 3, 7, 6]):
        with training(stage, network, 3, 8) as engine:
            results.append((engine.train(np.array(order)), engine.parameters))
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])


@each_stage
def test_training_reports_the_mean_loss_of_its_steps(stage):
    network = build("small", (1, 4, 4), 3, [{"dense": 3}])
    images, labels = pictures(network, 8)
    with training(stage, network, 2, 8) as engine:
        losses = []
        for start in range(0, 8, 2):
            losses.append(engine.gradient(images[start : start + 2], labels[start : start + 2])[0])
            engine.train(np.arange(start, start + 2))
    with training(stage, network, 2, 8) as engine:
        assert engine.train(np.arange(8)) == pytest.approx(np.mean(losses), rel=1e-6)


@each_stage
def test_a_training_goes_on_bit_for_bit(stage):
    network, order = awkward(), np.random.default_rng(0).permutation(32)
    with training(stage, network, 8, 32, momentum=0.9) as engine:
        engine.train(order)
        whole = engine.parameters, engine.velocity
    with training(stage, network, 8, 32, momentum=0.9) as engine:
        engine.train(order[:16])
        parameters, velocity = engine.parameters, engine.velocity
    with training(stage, network, 8, 32, momentum=0.9) as engine:
        engine.parameters, engine.velocity = parameters, velocity
        engine.train(order[16:])
        assert np.array_equal(engine.parameters, whole[0])
        assert np.array_equal(engine.velocity, whole[1])


@each_stage
def test_parameters_and_velocity_are_copies(stage):
    network = build("small", (1, 4, 4), 3, [{"dense": 3}])
    with training(stage, network, 2, 4) as engine:
        engine.train(np.arange(4))
        for name in ("parameters", "velocity"):
            before = getattr(engine, name)
            given = before.copy()
            setattr(engine, name, given)
            given[:] = 7
            getattr(engine, name)[:] = 8
            assert np.array_equal(getattr(engine, name), before)


@each_stage
def test_gradient_and_logits_change_nothing(stage):
    network = awkward()
    images, labels = pictures(network, 8)
    with training(stage, network, 8, 8, momentum=0.9) as engine:
        engine.train(np.arange(8))
        before = engine.parameters, engine.velocity
        first = engine.gradient(images, labels)
        engine.logits(images)
        engine.backward(images, np.ones((8, 5)))
        second = engine.gradient(images, labels)
        assert np.array_equal(engine.parameters, before[0])
        assert np.array_equal(engine.velocity, before[1])
        assert first[0] == second[0]
        assert np.array_equal(first[1], second[1])


@each_stage
def test_logits_of_any_number_of_images(stage):
    network = awkward()
    images, _ = pictures(network, 21)
    with open_engine(stage, network, 4) as engine:
        together = engine.logits(images)
        assert together.shape == (21, 5)
        apart = np.concatenate([engine.logits(images[:1]), engine.logits(images[1:])])
        assert together == pytest.approx(apart, rel=1e-5, abs=1e-6)
        assert engine.logits(images[:0]).shape == (0, 5)


def test_logits_of_both_stages_agree():
    network = lenet5()
    images, _ = pictures(network, 9)
    with (
        open_engine(naive.STAGE, network, 4) as loops,
        open_engine(gemm.STAGE, network, 4) as fast,
    ):
        assert fast.logits(images) == pytest.approx(loops.logits(images), rel=1e-4, abs=1e-5)


@each_stage
@pytest.mark.parametrize("network", [lenet5(), awkward()], ids=lambda network: network.name)
def test_divergence_is_seen(stage, network):
    with training(stage, network, 4, 8) as engine:
        vector = engine.parameters
        vector[0] = np.nan
        engine.parameters = vector
        assert math.isnan(engine.train(np.arange(4)))
        assert np.isnan(engine.logits(pictures(network, 1)[0])).any()


@each_stage
def test_infinite_weights_are_seen(stage):
    with training(stage, lenet5(), 4, 8) as engine:
        engine.parameters = np.full(engine.network.parameter_count, np.finfo(stage.dtype).max)
        with np.errstate(all="ignore"):
            assert not math.isfinite(engine.train(np.arange(4)))


def test_no_warnings_reach_the_log_when_gemm_diverges(recwarn):
    with training(gemm.STAGE, lenet5(), 64, 64, learning_rate=1e30) as engine:
        for _ in range(4):
            loss = engine.train(np.arange(64))
        assert not math.isfinite(loss)
    assert not recwarn.list


def test_buffers_are_made_once(monkeypatch):
    with training(gemm.STAGE, lenet5(), 64, 128) as engine:
        engine.train(np.arange(128))

        def no_more(*arguments, **options):
            raise AssertionError("an operator was made while training")

        for operator in gemm.STAGE.operators.values():
            monkeypatch.setattr(operator, "__init__", no_more)
        buffers = [(id(o.target), id(o.target_error)) for o in engine.lane.operators]
        engine.train(np.arange(128))
        assert buffers == [(id(o.target), id(o.target_error)) for o in engine.lane.operators]


def two_lanes(network):
    stage = dataclasses.replace(gemm.STAGE, threads=2)
    return training(stage, network, 32, 32)


def test_engines_end_in_any_order():
    first, second = two_lanes(awkward()), two_lanes(awkward())
    processes = [worker._process for engine in (first, second) for worker in engine._workers]
    first.train(np.arange(32))
    first.close()
    second.train(np.arange(32))
    second.close()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_lost_process_is_reported():
    engine = two_lanes(awkward())
    engine.train(np.arange(32))
    engine._workers[0]._process.kill()
    engine._workers[0]._process.join()
    with pytest.raises(DeviceError, match=r"a process of stage 'gemm' ended with exit code -9"):
        engine.train(np.arange(32))
    engine.close()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from networks import awkward
from test_stages_cpu import two_lanes
engines = [two_lanes(awkward()), two_lanes(awkward())]
for engine in engines:
    print(engine._workers[0]._process.pid)
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_killed_parent():
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(tests.parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tests)], env=environment, stdout=subprocess.PIPE
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(line) for line in done.stdout.split()]
    assert len(pids) == 2
    for _ in range(50):
        if not any(alive(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError("a lane's process goes on without its parent")


def alive(pid):
    """Whether the process runs; one that only nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# What validation must not let through: one operator of stage gemm with a typical mistake each.


class TransposedKernel(gemm.MatrixConv):
    def forward(self):
        weight = self.parameters["weight"]
        upright = weight.copy()
        weight[...] = upright.swapaxes(2, 3)
        super().forward()
        weight[...] = upright


class ForgottenBias(gemm.MatrixConv):
    def backward(self):
        super().backward()
        self.gradients["bias"][-1] = 0


class LastColumnLost(gemm.MatrixConv):
    def backward(self):
        self.target_error[:, :, -1] = 0
        super().backward()


class LastOfEquals(gemm.SlicedSubsample):
    def along_x(self, block):
        return super().along_x(block)[::-1]


class NotANumber(gemm.MatrixDense):
    def backward(self):
        super().backward()
        self.gradients["weight"][0, 0] = np.nan


class LowPrecision(gemm.MatrixDense):
    def forward(self):
        super().forward()
        self.target[...] = self.target.astype(np.float16)


def broken(kind, operator):
    return dataclasses.replace(gemm.STAGE, operators=gemm.STAGE.operators | {(kind,): operator})


class LastImageLost(gemm.MatrixDense):
    blocks = 0

    def backward(self):
        self.blocks += 1
        if self.blocks % (4096 // BLOCK_IMAGES) == 0:
            self._error[:, -1] = 0
        super().backward()


def test_validation_notices_that_one_image_of_many_is_lost():
    stage = dataclasses.replace(broken(Dense, LastImageLost), threads=1)
    network = lenet5()
    with open_engine(stage, network, 4096) as engine:
        with pytest.raises(ValidationFailed, match="for errors of a few images in a batch of 4096"):
            validate(engine, *pictures(network, 4096))


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize(
    ("kind", "operator", "where"),
    [
        (Conv, TransposedKernel, ""),
        (Conv, ForgottenBias, r"the gradient of conv1\.bias"),
        (Conv, LastColumnLost, r"the gradient of conv1\.weight"),
        (Dense, NotANumber, r"the gradient of dense1\.weight .* is off by nan"),
        (Dense, LowPrecision, ""),
    ],
)
def test_validation_rejects(kind, operator, where, batch_size):
    with open_engine(broken(kind, operator), lenet5(), batch_size) as engine:
        message = rf"stage 'gemm' fails validation on network 'lenet5_max_relu': .*{where}"
        with pytest.raises(ValidationFailed, match=message):
            validate(engine, *pictures(lenet5(), batch_size))


def test_exact_rejects_the_last_of_equals():
    with pytest.raises(ValidationFailed, match=r"the gradient of conv1\.weight on integers"):
        test_first_of_equals_in_reading_order_wins(broken(Subsample, LastOfEquals), 2)


def test_five_steps_reject_a_wrong_rate():
    class WrongRate(gemm.BlockEngine):
        def _update(self):
            super()._update()
            self._vector *= 0.999

    stage = dataclasses.replace(gemm.STAGE, engine=WrongRate)
    with open_engine(stage, lenet5(), 16) as engine:
        images, labels = pictures(lenet5(), 80)
        validate(engine, images[:16], labels[:16])
        with pytest.raises(ValidationFailed, match="five steps is off by"):
            five_steps(engine, images, labels)
