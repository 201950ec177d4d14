"""Stage gemm with products as tensor cores make them from float32: TF32, sums in float32."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.datasets.specs import SyntheticSpec
from cnnlib.datasets.synthetic import synthetic
from cnnlib.engine import Engine, Stage
from cnnlib.layers import Array, Conv
from cnnlib.peers import TF32
from cnnlib.stages import gemm
from tests.support.networks import build

LOST_BITS = 13
"""Bits of a float32's mantissa that TF32 does not have."""


MINIATURE = build(
    "miniature",
    (3, 12, 12),
    4,
    [
        {"conv": {"maps": 8, "kernel": 3, "padding": 1}},
        {"activation": "relu"},
        {"conv": {"maps": 8, "kernel": 3}},
        {"activation": "relu"},
        {"subsample": 2},
        {"conv": {"maps": 8, "kernel": 3}},
        {"activation": "relu"},
        {"dense": 16},
        {"activation": "relu"},
        {"dense": 4},
    ],
)
"""A network as deep as those on which limits for any network were too narrow for TF32."""


def blobs(train_images: int) -> Dataset:
    """Images for MINIATURE."""
    spec = SyntheticSpec(
        kind="synthetic",
        shape=MINIATURE.input_shape,
        classes=MINIATURE.classes,
        train_images=train_images,
        test_images=20,
    )
    images = synthetic(spec)
    mean, deviation = float(images[0].mean()), float(images[0].std())
    return Dataset("blobs", *images, MINIATURE.classes, mean=mean, deviation=deviation)


class Products:
    """numpy, but for products of float32: their factors are rounded to 10 bits."""

    def __init__(self, toward_zero: bool = False, noise: float = 0.0) -> None:
        """`noise`: relative errors of sums, new ones each time, as sums without an order have."""
        self._half = np.uint32(0 if toward_zero else 1 << (LOST_BITS - 1))
        self._noise, self._random = noise, np.random.default_rng(3)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def _rounded(self, factor: Array) -> Array:
        bits = np.ascontiguousarray(factor).view(np.uint32) + self._half
        return np.asarray((bits >> LOST_BITS << LOST_BITS).view(np.float32))

    def matmul(self, first: Array, second: Array, out: Array) -> Array:
        if out.dtype != np.float32:
            return np.matmul(first, second, out=out)
        if second.ndim > 1:  # a product with a vector of ones is a sum
            first, second = self._rounded(first), self._rounded(second)
        np.matmul(first, second, out=out)
        if self._noise:
            out *= 1 + self._noise * self._random.standard_normal(out.shape, np.float32)
        return out


def use_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, toward_zero: bool = False, noise: float = 0.0
) -> None:
    """Let stage gemm multiply TF32 until the end of the test; see Products."""
    products = Products(toward_zero, noise)
    for module in (gemm.conv, gemm.dense):
        assert isinstance(module, ModuleType)
        monkeypatch.setattr(module, "np", products)


class StepByStep(gemm.STAGE.engine):  # type: ignore[misc, name-defined]
    """Keeps the loss of every step, as engines do whose bits do not repeat."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        size = self.setup.batch_size
        due = self.rates_of(len(order) // size, rates)
        parts = np.split(order[: len(due) * size], max(1, len(due)))
        losses = [
            super(StepByStep, self).train(part, np.array([rate]))
            for part, rate in zip(parts, due, strict=False)
        ]
        self.step_losses = np.array(losses)
        return float(np.mean(losses))


def tf32_stage(
    engine: type[Engine] = StepByStep, operators: Mapping[Any, Any] | None = None
) -> Stage:
    """What a library that multiplies TF32 says of itself."""
    chosen = {**gemm.STAGE.operators, (Conv,): gemm.MatrixConv, **(operators or {})}
    return dataclasses.replace(
        gemm.STAGE,
        name="tf32",
        engine=engine,
        operators=chosen,
        rounding=TF32,
        repeatable=False,
        threads=1,
    )
