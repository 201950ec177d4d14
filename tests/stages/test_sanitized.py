"""Every GPU stage under the address and undefined-behaviour sanitizers, and in reverse order.

The emulated device makes a training step, a gradient of part of a batch and logits. The order in
which a block's threads and the blocks run must not change a bit: where it does, a barrier is
missing.
"""

import hashlib
import os
import sys
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest

from cnnlib.device import sanitizer_environment
from cnnlib.device.emulated import FIBER_ORDERS, EmulatedDevice
from cnnlib.engine import plan
from cnnlib.errors import DeviceError, Unsupported
from cnnlib.paths import ROOT
from cnnlib.stages import ring
from tests.support.ahead import Program, begins
from tests.support.engines import (
    GPU_STAGES,
    SERVE_ALL,
    each_gpu_stage,
    open_engine,
    pictures,
    skip_if_declined,
)
from tests.support.networks import GENERAL, awkward, build, fused_padding, lenet5

SANITIZED = {
    network.name: network
    for network in (
        awkward(),
        # Padding of the images, strides beyond the kernel and means over an activation.
        build(
            "strided_means",
            (2, 29, 23),
            3,
            [
                {"conv": {"maps": 5, "kernel": 2, "stride": 3, "padding": 1}},
                {"conv": {"maps": 4, "kernel": 3}},
                {"activation": "sigmoid"},
                {"subsample": {"size": 2, "method": "mean"}},
                {"dense": 3},
            ],
        ),
        *GENERAL.values(),
        fused_padding(),
    )
}


def sanitized_networks(stage):
    """Those that the stage serves."""
    for network in SANITIZED.values():
        try:
            plan(stage, network)
        except Unsupported:
            assert stage.name not in SERVE_ALL
            continue
        yield network


# With so little shared memory, stage ring cuts small maps as it otherwise cuts large ones.
SHORT_OF_MEMORY = dict(FEW_FLOATS=400, FLOATS=1100)


def digest(stage, network, fiber_order, batch_size):
    """A digest of all that a step, a gradient and logits give."""
    found = hashlib.sha256()
    small = network.name in SANITIZED
    memory = mock.patch.multiple(ring, **SHORT_OF_MEMORY) if small else nullcontext()
    with EmulatedDevice(fiber_order) as device, memory:
        with open_engine(stage, network, batch_size, device, momentum=0.5) as engine:
            images, labels = pictures(network, 2 * batch_size)
            engine.load(images, labels)
            loss = engine.train(np.arange(2 * batch_size))
            part = batch_size // 2 + 1
            part_loss, gradient = engine.gradient(images[:part], labels[:part])
            results = engine.parameters, engine.velocity, gradient, engine.logits(images[:1])
            assert np.isfinite([loss, part_loss]).all()
            for array in (np.array([loss, part_loss]), *results):
                assert np.isfinite(array).all()
                found.update(array.tobytes())
    return found.hexdigest()


@each_gpu_stage
@pytest.mark.parametrize(
    ("network", "batch_size"),
    [*((network, 6) for network in SANITIZED.values()), (lenet5(), 40)],
    ids=[*SANITIZED, "lenet5"],
)
def test_the_order_of_threads_and_blocks_changes_no_bit(stage, network, batch_size, request):
    skip_if_declined(stage, network)
    if network.name in SANITIZED:
        request.getfixturevalue("in_haste")
    forward, reverse = (digest(stage, network, each, batch_size) for each in FIBER_ORDERS)
    assert forward == reverse


PROGRAM = """
import sys
from tests.stages.test_sanitized import FIBER_ORDERS, digest, sanitized_networks
from tests.support.engines import GPU_STAGES
(stage,) = (each for each in GPU_STAGES if each.name == sys.argv[1])
for network in sanitized_networks(stage):
    for order in FIBER_ORDERS:
        print(digest(stage, network, order, 6))
"""


ONE_BY_ONE = """
for stage; do
    timeout 280 env $SANITIZER "$PYTHON" -c "$PROGRAM" "$stage" >"$stage.out" 2>"$stage.err"
    echo $? >"$stage.code"
done
"""


@begins("sanitized")
def begin(folder):
    """A program that runs one stage after the other; each leaves NAME.out, .err and .code."""
    try:
        sanitizer = sanitizer_environment()
    except DeviceError:
        sanitizer = {}  # the fixture skips the tests and says why
    names = [stage.name for stage in GPU_STAGES] if sanitizer else []
    env = {
        **os.environ,
        "SANITIZER": " ".join(f"{name}={value}" for name, value in sanitizer.items()),
        "PYTHON": sys.executable,
        "PROGRAM": PROGRAM,
        "PYTHONPATH": str(ROOT),
        "CNNLIB_EMULATED_THREADS": "2",
    }
    return Program(["sh", "-c", ONE_BY_ONE, "sh", *names], folder, env)


@pytest.fixture(scope="module")
def sanitized(ahead):
    """The folder with what the program has left."""
    try:
        sanitizer_environment()
    except DeviceError as error:
        pytest.skip(str(error))
    ahead["sanitized"].end()
    return ahead["sanitized"].folder


@each_gpu_stage
def test_nothing_for_the_sanitizers_to_report(stage, sanitized):
    out, err, code = (
        (sanitized / f"{stage.name}.{what}").read_text() for what in ("out", "err", "code")
    )
    assert int(code) == 0, err
    assert "Sanitizer" not in err
    digests = out.split()
    assert digests
    assert len(digests) == 2 * len(list(sanitized_networks(stage)))
    assert digests[::2] == digests[1::2]  # forward and reverse
