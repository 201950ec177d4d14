"""Products of matrices that tensor cores make of halves of floats are as good as float32's."""

from pathlib import Path

import numpy as np
import pytest

from cnnlib.device import Device

pytestmark = pytest.mark.quick

SOURCE = (Path(__file__).parent / "tensor.cu").read_text()


@pytest.fixture
def multiply(device: Device):
    module = device.compile(SOURCE, "tensor.cu", ["tensor_multiply", "tensor_multiply_whole"])

    def run(left, right):
        whole = left.dtype == np.int32
        arrays = [device.array(x.shape, x.dtype) for x in (left, right)]
        for array, values in zip(arrays, (left, right), strict=True):
            array.set(values)
        target = device.array((16, 8), np.float32)
        kernel = module.kernel("tensor_multiply_whole" if whole else "tensor_multiply")
        kernel.bind(1, 32, *arrays, target)()
        return target.get()

    return run


def matrices(inner: int, spread: int):
    """Numbers of many sizes, so that halves of some are as large as wholes of others."""
    generator = np.random.default_rng(7)
    shapes = (16, inner), (inner, 8)
    return [
        (generator.standard_normal(s) * 2.0 ** generator.integers(-spread, spread + 1, s)).astype(
            np.float32
        )
        for s in shapes
    ]


def check(found, left, right, relative: float) -> None:
    left, right = left.astype(np.float64), right.astype(np.float64)
    bound = relative * (np.abs(left) @ np.abs(right))
    assert (np.abs(found - left @ right) <= bound).all()


def test_floats(multiply) -> None:
    left, right = matrices(8, 6)
    check(multiply(left, right), left, right, 2.0**-20)


def test_whole_numbers_are_exact(multiply) -> None:
    generator = np.random.default_rng(0)
    left = generator.integers(-900, 900, (16, 8)).astype(np.float32)
    right = generator.integers(-900, 900, (8, 8)).astype(np.float32)
    assert np.array_equal(multiply(left, right), left @ right)


def test_bytes_by_floats(multiply) -> None:
    left = np.random.default_rng(3).integers(0, 256, (16, 16)).astype(np.int32)
    _, right = matrices(16, 6)
    check(multiply(left, right), left, right, 2.0**-21)


def test_a_byte_by_a_float_is_as_exact_as_float32(multiply) -> None:
    left = np.zeros((16, 16), np.int32)
    left[:, 3] = np.arange(16) * 17
    # Sums of three products; tensor cores cut off what float32 would round.
    right = np.full((16, 8), np.float32(1 / 3))
    check(multiply(left, right), left, right, 2.0**-22)
    # 16 significant bits: nothing is left to round
    right = np.full((16, 8), np.float32(round(2**17 / 3) / 2**17))
    assert np.array_equal(multiply(left, right), np.outer(left[:, 3], right[3]).astype(np.float32))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_a_number_is_not_lost(multiply, wrong: float) -> None:
    left, right = matrices(8, 1)
    left[5, 2] = wrong
    found = multiply(left, right)
    assert not np.isfinite(found[5]).any()
    assert np.isfinite(np.delete(found, 5, axis=0)).all()
