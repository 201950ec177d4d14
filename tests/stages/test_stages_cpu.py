"""The CPU stages agree with the float64 reference, and their engines keep their promises."""

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

from cnnlib.engine.cpu import MICRO_BATCH, MicroBatchEngine
from cnnlib.errors import DeviceError
from cnnlib.layers import Conv, Dense, Subsample
from cnnlib.paths import ROOT
from cnnlib.stages import LADDER, gemm, naive
from cnnlib.validation.parity import validate
from cnnlib.validation.reference import FAST_REFERENCE
from cnnlib.validation.spot_checks import exact, five_steps
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.engines import open_engine, pictures, training
from tests.support.networks import NETWORKS, awkward, build, lenet5

CPU_STAGES = [stage for stage in LADDER if stage.runs_on == "cpu"]

each_stage = pytest.mark.parametrize("stage", CPU_STAGES, ids=lambda stage: stage.name)
each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


@each_network
@pytest.mark.parametrize("batch_size", [1, 2, pytest.param(7, marks=pytest.mark.quick), 64])
@pytest.mark.parametrize(
    "stage", [*CPU_STAGES, FAST_REFERENCE], ids=lambda stage: stage.name.replace(" ", "-")
)
def test_gradient_parity(stage, network, batch_size):
    with open_engine(stage, network, batch_size) as engine:
        validate(engine, *pictures(network, batch_size))


@each_network
@pytest.mark.parametrize("batch_size", [33, 100, 261])
def test_gradient_parity_of_batches_that_fill_no_micro_batch(network, batch_size):
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


def test_repeats_of_long_trainings_are_bit_identical():
    results = []
    for _ in range(3):
        with training(gemm.STAGE, lenet5(), 64, 640) as engine:
            for _ in range(3):
                engine.train(np.arange(640))
            results.append(engine.parameters)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_logits_of_both_stages_agree():
    network = lenet5()
    images, _ = pictures(network, 9)
    with (
        open_engine(naive.STAGE, network, 4) as loops,
        open_engine(gemm.STAGE, network, 4) as fast,
    ):
        assert fast.logits(images) == pytest.approx(loops.logits(images), rel=1e-4, abs=1e-5)


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

        for operator in {type(operator) for operator in engine.lane.operators}:
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
from tests.support.networks import awkward
from tests.stages.test_stages_cpu import two_lanes
engines = [two_lanes(awkward()), two_lanes(awkward())]
for engine in engines:
    print(engine._workers[0]._process.pid)
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_killed_parent():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, stdout=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL
    pids = [int(line) for line in done.stdout.split()]
    assert len(pids) == 2
    for _ in range(300):
        if not any(alive(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError("a lane's process goes on without its parent")


def alive(pid):
    """Whether the process runs; a zombie, which its parent has not waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Each class below is an operator of stage gemm with a typical mistake for validation to find.


class TransposedKernel(gemm.MatrixConv):
    def forward(self):
        upright = self.parameters  # other lanes share these arrays, so they must not be written
        self.parameters = upright | {"weight": upright["weight"].swapaxes(2, 3)}
        super().forward()
        self.parameters = upright


class ForgottenBias(gemm.MatrixConv):
    def backward(self):
        super().backward()
        self.gradients["bias"][-1] = 0


class LastColumnLost(gemm.MatrixConv):
    def backward(self):
        self.target_error[:, :, -1] = 0
        super().backward()


class LastOfEquals(gemm.SlicedSubsample):
    def make_buffers(self):
        super().make_buffers()
        self.along_x.places.reverse()


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
    micro_batches = 0

    def backward(self):
        self.micro_batches += 1
        if self.micro_batches % (4096 // MICRO_BATCH) == 0:
            self._error[:, -1] = 0
        super().backward()


def test_validation_notices_that_one_image_of_many_is_lost():
    stage = dataclasses.replace(broken(Dense, LastImageLost), threads=1)
    network = lenet5()
    with open_engine(stage, network, 4096) as engine:
        # With these weights, one image's share is less than the rounding allowed for the batch.
        engine.parameters = engine.parameters * 2
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
    class WrongRate(MicroBatchEngine):
        def _update(self, rate):
            super()._update(rate)
            self._vector *= 0.999

    stage = dataclasses.replace(gemm.STAGE, engine=WrongRate)
    with open_engine(stage, lenet5(), 16) as engine:
        images, labels = pictures(lenet5(), 80)
        validate(engine, images[:16], labels[:16])
        with pytest.raises(ValidationFailed, match="five steps is off by"):
            five_steps(engine, images, labels)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("stage", "size"), [(naive.STAGE, 2), (gemm.STAGE, 48)])
def test_a_profile_counts_every_operator_and_changes_nothing(stage, size, momentum):
    network = lenet5()
    stage = dataclasses.replace(stage, threads=2 if stage.name == "gemm" else 1)
    with open_engine(stage, network, size, momentum=momentum) as engine:
        engine.load(*pictures(network, size))
        engine.velocity = np.linspace(-1, 1, network.parameter_count)
        before = engine.parameters, engine.velocity
        began = time.perf_counter()
        rows = engine.profile()
        took = time.perf_counter() - began
        assert np.array_equal(engine.parameters, before[0])
        assert np.array_equal(engine.velocity, before[1])
        # the timed methods have been removed again
        operators = engine.lane.operators if stage.name == "gemm" else engine.operators
        assert not any({"forward", "backward"} & set(vars(each)) for each in operators)
        named = {(row.layers, row.part): row for row in rows}
        assert len(named) == len(rows)
        assert set(named) == {
            *((planned.name, part) for planned in engine.plan for part in ("forward", "backward")),
            ("batch", "loss"),
            ("batch", "update"),
        }
        for planned in engine.plan:
            for part in ("forward", "backward"):
                row = named[planned.name, part]
                assert (row.flops, row.bytes) == planned.arithmetic(part, size)
    assert all((row.kernel, row.grid, row.launches) == ("numpy", 0, 1) for row in rows)
    assert all(row.seconds > 0 for row in rows)
    assert sum(row.seconds for row in rows) <= took


def test_an_update_that_lanes_share_is_the_same_to_the_bit(monkeypatch):
    network = awkward()
    images, labels = pictures(network, 96)
    found = []
    for least in (1, 2**60):
        monkeypatch.setattr("cnnlib.engine.cpu.UPDATED_ALONE", least)
        stage = dataclasses.replace(gemm.STAGE, threads=3)
        with open_engine(stage, network, 48, momentum=0.9, weight_decay=0.01) as engine:
            engine.load(images, labels)
            engine.train(np.arange(96))
            found.append((engine.parameters, engine.velocity))
            five_steps(engine, images, labels)
    assert np.array_equal(found[0], found[1])


def test_larger_networks_have_more_lanes():
    few = {"conv": {"maps": 2, "kernel": 3, "padding": 1}}
    many = {"conv": {"maps": 64, "kernel": 3, "padding": 1}}
    stage = dataclasses.replace(gemm.STAGE, threads=8)
    for layer, lanes in ((few, 2), (many, 8)):
        network = build("lanes", (16, 16, 16), 4, [layer, {"dense": 4}])
        with open_engine(stage, network, 32) as engine:
            assert engine.lane_count == lanes
            validate(engine, *pictures(network, 32))


def test_no_lane_is_left_without_images():
    with open_engine(dataclasses.replace(gemm.STAGE, threads=8), lenet5(), 100) as engine:
        assert engine.lane_count == 6
    network = build("wide", (16, 20, 20), 4, [{"conv": {"maps": 64, "kernel": 5}}, {"dense": 4}])
    with open_engine(dataclasses.replace(gemm.STAGE, threads=8), network, 33) as engine:
        assert engine.lane_count == 7
