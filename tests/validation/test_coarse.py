"""Stages that multiply TF32: honest ones pass every check with some margin, wrong ones do not.

The network is as deep as those on which limits for any network were too narrow for libraries on an
H100, on images of 12x12.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.engine import Setup, Stage
from cnnlib.engine.cpu import MicroBatchOperator
from cnnlib.layers import Activation, Conv
from cnnlib.peers import TF32
from cnnlib.stages import gemm
from cnnlib.training.target import open_target
from cnnlib.validation.coarse import TRIES, coarse_references, length
from cnnlib.validation.reference import FAST_REFERENCE
from cnnlib.validation.trajectory import check_training
from cnnlib.validation.verdicts import Unjudged, ValidationFailed
from tests.support.tensor_cores import MINIATURE, StepByStep, blobs, tf32_stage, use_tensor_cores
from tests.wrong.trainings import (
    FAULTS,
    Background,
    LastBatchTwice,
    NoMomentum,
    ProfileTrains,
    QuarterOfTheVelocity,
    VelocityReset,
    Wrong,
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return blobs(120)


def check(stage: Stage, data: Dataset, seed: int, **settings: Any) -> float:
    setup = Setup(MINIATURE, 8, 0.05, mean=data.mean, deviation=data.deviation)
    with open_target(stage) as target:
        return check_training(stage, dataclasses.replace(setup, **settings), target, data, seed)


@pytest.mark.parametrize("toward_zero", [False, True], ids=["nearest", "cut"])
@pytest.mark.parametrize("seed", range(3, 6))
def test_honest_products_pass(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, toward_zero: bool, seed: int
) -> None:
    use_tensor_cores(monkeypatch, toward_zero, noise=1e-7)
    assert check(tf32_stage(), data, seed) < 1


def test_products_that_are_coarser_than_the_stage_says(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tensor_cores(monkeypatch)
    with pytest.raises(ValidationFailed, match="is off by"):
        check(dataclasses.replace(tf32_stage(), rounding=None), data, 1)


def test_a_coarse_reference_is_as_far_off_as_products_are_rounded(data: Dataset) -> None:
    setup = Setup(MINIATURE, 8, 0.05, mean=data.mean, deviation=data.deviation)
    images, labels = data.train_images[:8], data.train_labels[:8]
    vector = MINIATURE.initial_parameters(1, np.float64)
    with FAST_REFERENCE.engine(FAST_REFERENCE, setup) as right:
        right.parameters = vector
        exact = right.gradient(images, labels)[1]
    distances = []
    for rounding in (TF32, TF32 / 2**20):
        with coarse_references(setup, rounding) as coarse:
            for engine in coarse:
                engine.parameters = vector
                found = engine.gradient(images, labels)[1]
                assert np.array_equal(engine.parameters, vector)
                distances.append(length(found - exact) / length(exact))
    assert all(TF32 / 8 < distance < 0.1 for distance in distances[:TRIES])
    assert all(distance < 1e-7 for distance in distances[TRIES:])
    with coarse_references(setup, None) as none:
        assert none == []


UNSEEN = [
    LastBatchTwice,  # a single wrong step late in an epoch: bits that do not repeat hide it
    ProfileTrains,  # it is a measurement that asks for a profile
]
OF_MOMENTUM = [NoMomentum, QuarterOfTheVelocity, VelocityReset]


@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in UNSEEN], ids=lambda f: f.__name__)
def test_wrong_trainings_are_rejected(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, fault: type[Wrong]
) -> None:
    use_tensor_cores(monkeypatch, noise=1e-7)
    engine = type("Broken", (fault, StepByStep), {})
    warmup = 0.2 if "schedule" in fault.training else None
    momentum = 0.5 if fault in OF_MOMENTUM else 0.0
    # a thread may change the weights at any time, also while it is found what they should be
    rejections = (ValidationFailed, Unjudged) if fault is Background else ValidationFailed
    with pytest.raises(rejections):
        check(tf32_stage(engine), data, 1, warmup=warmup, momentum=momentum)


class LastRowLost(gemm.MatrixConv):
    def backward(self) -> None:
        assert self.target_error is not None
        self.target_error[-1] = 0
        super().backward()


class LostImage(gemm.MatrixConv):
    def backward(self) -> None:
        assert self.target_error is not None
        self.target_error[..., 0] = 0
        super().backward()


class LeakyRelu(gemm.WholeActivation):
    def forward(self) -> None:
        super().forward()
        self._slope[0] = True


class NoBias(gemm.MatrixConv):
    def backward(self) -> None:
        super().backward()
        self.gradients["bias"] *= 0.5


@pytest.mark.parametrize(
    ("kind", "operator"),
    [(Conv, LastRowLost), (Conv, LostImage), (Activation, LeakyRelu), (Conv, NoBias)],
)
def test_wrong_operators_are_rejected(
    data: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    operator: type[MicroBatchOperator],
) -> None:
    use_tensor_cores(monkeypatch)
    with pytest.raises(ValidationFailed, match="fails validation on network 'miniature'"):
        check(tf32_stage(operators={(kind,): operator}), data, 1)
