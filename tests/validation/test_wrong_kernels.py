"""Broken kernels, each of which must be rejected by the check that exists for its kind of mistake.

tests/wrong/NAME.toml says what is wrong, in which file of kernels/ (`old` becomes `new`), which
stage shows it and which check has to reject it. Every file in that folder is tested.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.device import KernelError, sanitizer_environment
from cnnlib.device.cache import KERNELS
from cnnlib.device.emulated import FIBER_ORDERS, EmulatedDevice
from cnnlib.errors import DeviceError
from cnnlib.paths import ROOT
from cnnlib.stages import find_stage
from cnnlib.training.target import open_target, setup_of
from cnnlib.validation.parity import validate
from cnnlib.validation.reference import FAST_REFERENCE
from cnnlib.validation.spot_checks import exact, five_steps
from cnnlib.validation.trajectory import check_training
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.engines import open_engine, pictures
from tests.support.networks import (
    build,
    dropped,
    fused_padding,
    fused_tall,
    overlapping,
    padded,
)
from tests.support.toys import toy_config

pytestmark = pytest.mark.usefixtures("in_haste")

NETWORKS = {
    network.name: network
    for network in (
        build(
            "small",
            (2, 14, 14),
            3,
            [
                {"conv": {"maps": 4, "kernel": 3}},
                {"activation": "relu"},
                {"subsample": 2},
                {"conv": {"maps": 5, "kernel": 3}},
                {"activation": "tanh"},
                {"dense": 3},
            ],
        ),
        build(
            "ties",
            (1, 14, 14),
            4,
            [{"conv": {"maps": 1, "kernel": 3}}, {"subsample": 2}, {"dense": 4}],
        ),
        # This network's maps are too tall for all rows to be on chip at once.
        build(
            "tall",
            (2, 90, 40),
            3,
            [{"conv": {"maps": 4, "kernel": 3}}, {"conv": {"maps": 4, "kernel": 3}}, {"dense": 3}],
        ),
        build(
            "strided",
            (2, 90, 60),
            3,
            [
                {"conv": {"maps": 6, "kernel": 1}},
                {"conv": {"maps": 2, "kernel": 2, "stride": 5}},
                {"dense": 3},
            ],
        ),
        padded(),
        overlapping(),
        dropped(),
        fused_padding(),
        fused_tall(),
    )
}


class Rejected(Exception):
    """Raised by the checks below that compare results themselves."""


# Each of the checks raises an exception for wrong kernels and returns for right ones.


def gradient(stage, network, **training):
    with EmulatedDevice() as device:
        for batch_size in (1, 33):
            with open_engine(stage, network, batch_size, device, **training) as engine:
                engine.steps = 3
                validate(engine, *pictures(network, batch_size))


def launch(stage, network):
    """A launch that cannot end, such as one with a divergent barrier, is a KernelError."""
    with EmulatedDevice() as device, open_engine(stage, network, 7, device) as engine:
        engine.gradient(*pictures(network, 7))


def order(stage, network):
    results = []
    for fiber_order in FIBER_ORDERS:
        with (
            EmulatedDevice(fiber_order) as device,
            open_engine(stage, network, 7, device) as engine,
        ):
            results.append(engine.gradient(*pictures(network, 7)))
    if results[0][0] != results[1][0] or not np.array_equal(results[0][1], results[1][1]):
        raise Rejected("another order of the threads gives another result")


def momentum(stage, network, **training):
    with EmulatedDevice() as device:
        with open_engine(stage, network, 16, device, momentum=0.9, **training) as engine:
            five_steps(engine, *pictures(network, 80))


def train(stage, network):
    """The checks of a whole measurement, on a config without momentum."""
    images, labels = pictures(network, 40)
    dataset = Dataset(
        "noise", images, labels, images[:8], labels[:8], network.classes, mean=33.3, deviation=78.6
    )
    config = toy_config(training={"momentum": 0.0}, sweep={"device": "emulated"})
    setup = setup_of(config, network, dataset, 8)
    with open_target(stage, config.sweep.device) as target:
        check_training(stage, setup, target, dataset, seed=1)


def ties(stage, network):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 2, (8, *network.input_shape), dtype=np.uint8)
    with EmulatedDevice() as device:
        with open_engine(stage, network, 8, device, mean=0, deviation=1) as engine:
            # the first convolution copies its source
            vector = np.zeros(network.parameter_count)
            views = network.views(vector)
            views[0]["weight"][0, 0, 0, 0] = 1
            views[-1]["weight"][...] = generator.integers(-3, 4, views[-1]["weight"].shape)
            engine.parameters = vector
            exact(engine, images, generator.integers(-3, 4, (8, network.classes)))


def nan(stage, network):
    with EmulatedDevice() as device, open_engine(stage, network, 4, device) as engine:
        vector = engine.parameters
        vector[0] = np.nan
        engine.parameters = vector
        if not np.isnan(engine.gradient(*pictures(network, 4))[0]):
            raise Rejected("the loss of a network with a NaN is a number")


def evaluated(stage, network):
    with EmulatedDevice() as device, open_engine(stage, network, 7, device) as engine:
        right = FAST_REFERENCE.engine(FAST_REFERENCE, engine.setup)
        images, _ = pictures(network, 7)
        with right:
            right.parameters = engine.parameters
            if not np.allclose(engine.logits(images), right.logits(images), atol=1e-4):
                raise Rejected("the logits are not the reference's")


LAUNCH = """
import sys
from tests.validation.test_wrong_kernels import NETWORKS, find_stage, launch
launch(find_stage(sys.argv[1], ""), NETWORKS[sys.argv[2]])
"""


def sanitizer(stage, network):
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, stage.name, network.name],
        env={**os.environ, **sanitizer_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    if done.returncode:
        raise Rejected(done.stderr)


CHECKS = {
    "gradient": (gradient, ValidationFailed, "fails validation on network"),
    "launch": (launch, KernelError, "barrier"),
    "order": (order, Rejected, "another order"),
    "five steps": (momentum, ValidationFailed, "after five steps|loss of five steps"),
    "training": (train, ValidationFailed, "fails validation on network"),
    "exact": (ties, ValidationFailed, "on integers is off by"),
    "nan": (nan, Rejected, "is a number"),
    "evaluated": (evaluated, Rejected, "logits"),
    "sanitizer": (sanitizer, Rejected, "heap-buffer-overflow|out of bounds|use-after-poison"),
}


@dataclass(frozen=True)
class Mistake:
    """One file of tests/wrong/."""

    name: str
    what: str
    file: str
    stage: str
    rejected_by: str
    old: str
    new: str
    network: str = "small"
    training: dict[str, object] = field(default_factory=dict)
    """Settings of a Setup that the check is made with."""

    @property
    def of_right_kernels(self):
        """The check that right kernels must pass."""
        return "-".join([self.stage, self.network, self.rejected_by, *self.training])

    def apply(self, folder):
        path = folder / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, (
            f"tests/wrong/{self.name}.toml: its old text is {text.count(self.old)} times in "
            f"kernels/{self.file}, not once; make the mistake in the kernel as it is now"
        )
        path.write_text(text.replace(self.old, self.new))


MISTAKES = [
    Mistake(path.stem, **tomllib.loads(path.read_text()))
    for path in sorted((ROOT / "tests/wrong").glob("*.toml"))
]


def run_check(mistake):
    check, _, _ = CHECKS[mistake.rejected_by]
    stage = find_stage(mistake.stage, mistake.name)
    check(stage, NETWORKS[mistake.network], **mistake.training)


def skip_without_sanitizer():
    try:
        sanitizer_environment()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_wrong_kernels_are_rejected(mistake, tmp_path, monkeypatch):
    if mistake.rejected_by == "sanitizer":
        skip_without_sanitizer()
    folder = tmp_path / "kernels"
    shutil.copytree(KERNELS, folder)
    mistake.apply(folder)
    monkeypatch.setenv("CNNLIB_KERNELS", str(folder))
    _, exception, message = CHECKS[mistake.rejected_by]
    with pytest.raises(exception, match=message):
        run_check(mistake)


RIGHT = {mistake.of_right_kernels: mistake for mistake in MISTAKES}


@pytest.mark.parametrize("mistake", RIGHT.values(), ids=list(RIGHT))
def test_right_kernels_pass_the_same_check(mistake):
    if mistake.rejected_by == "sanitizer":
        skip_without_sanitizer()
    run_check(mistake)


def test_every_check_has_a_mistake_to_reject():
    assert {mistake.rejected_by for mistake in MISTAKES} == CHECKS.keys()


def test_a_mistake_whose_text_is_gone_says_so(tmp_path):
    (tmp_path / "conv.cuh").write_text("// written anew")
    mistake = Mistake("gone", "", "conv.cuh", "fused", "gradient", "old text", "new text")
    with pytest.raises(
        AssertionError, match=r"wrong/gone\.toml: its old text is 0 times in kernels"
    ):
        mistake.apply(tmp_path)
