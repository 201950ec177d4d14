"""Numbers in planes of FP16: what they hold, their products, and the ends of their range."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cnnlib.device import Device
from cnnlib.device.api import DeviceArray, Module

pytestmark = pytest.mark.quick

SOURCE = (Path(__file__).parent / "planes.cu").read_text()
Array = np.ndarray


@pytest.fixture
def module(device: Device, kernels_in: Callable[[str], list[str]]) -> Module:
    return device.compile(SOURCE, "planes.cu", kernels_in(SOURCE))


def run(device: Device, module: Module, kernel: str, target: Array, *given: Array | int) -> Array:
    """Launch one warp on copies of the arrays; what it leaves in the last of them, the target."""
    arguments: list[DeviceArray | int] = []
    for value in given:
        if isinstance(value, int):
            arguments.append(value)
            continue
        array = device.array(value.shape, value.dtype)
        array.set(value)
        if value is target:
            left = array
        arguments.append(array)
    module.kernel(f"planes_{kernel}")(1, 32, *arguments)
    result: Array = left.get()
    return result


def split(device: Device, module: Module, numbers: Array) -> tuple[Array, Array]:
    """The wholes and the rests of numbers."""
    planes = np.zeros((2, len(numbers)), np.uint16)
    found = run(device, module, "split", planes, numbers, planes, len(numbers))
    return found[0].view(np.float16), found[1].view(np.float16)


def numbers(smallest: int, largest: int) -> Array:
    """Floats of both signs with exponents from `smallest` to `largest`."""
    generator = np.random.default_rng(1)
    exponents = generator.integers(smallest, largest + 1, 4096).astype(np.float32)
    sizes = generator.uniform(1, 2, 4096).astype(np.float32) * 2**exponents
    return (sizes * generator.choice([-1, 1], 4096)).astype(np.float32)


def test_a_whole_is_the_nearest_of_its_kind(device: Device, module: Module) -> None:
    """As NumPy rounds: to even where two are equally near, to infinity at the range's end."""
    ties = (np.arange(1024, 2048) + 0.5) / 1024
    edges = [0.0, -0.0, 65504.0, 65519.0, 65520.0, 1e9, 2.0**-24, 2.0**-25, 2.0**-26, np.inf]
    given = np.concatenate([numbers(-27, 17), ties, ties * 2.0**-20, edges]).astype(np.float32)
    whole, _ = split(device, module, given)
    with np.errstate(over="ignore"):
        expected = given.astype(np.float16)
    assert np.array_equal(whole.view(np.uint16), expected.view(np.uint16))


def test_whole_and_rest_hold_22_bits(device: Device, module: Module) -> None:
    given = numbers(-14, 15)
    whole, rest = split(device, module, given)
    held = whole.astype(np.float64) + rest.astype(np.float64) / 2048
    assert (np.abs(held - given) <= np.abs(given) * 2.0**-22).all()


def test_what_is_small_is_held_to_a_fixed_size(device: Device, module: Module) -> None:
    given = numbers(-40, -15)
    whole, rest = split(device, module, given)
    held = whole.astype(np.float64) + rest.astype(np.float64) / 2048
    assert (np.abs(held - given) <= 2.0**-36).all()


def multiply(
    device: Device, module: Module, left: Array, right: Array, turned: tuple[bool, bool]
) -> Array:
    sides = [side.T if turn else side for side, turn in zip((left, right), turned, strict=True)]
    target = np.zeros((16, 8), np.float32)
    copies = [np.ascontiguousarray(side, np.float32) for side in sides]
    return run(device, module, "multiply", target, *copies, target, *map(int, turned))


@pytest.mark.parametrize("turned", list(product([False, True], repeat=2)))
def test_a_product_is_as_good_as_that_of_floats(
    device: Device, module: Module, turned: tuple[bool, bool]
) -> None:
    given = numbers(-6, 6)
    left, right = given[:256].reshape(16, 16), given[256:384].reshape(16, 8)
    found = multiply(device, module, left, right, turned)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    bound = 2.0**-20 * (np.abs(left.astype(np.float64)) @ np.abs(right.astype(np.float64)))
    assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize("turned", list(product([False, True], repeat=2)))
def test_whole_numbers_are_exact(device: Device, module: Module, turned: tuple[bool, bool]) -> None:
    generator = np.random.default_rng(0)
    left = generator.integers(-900, 900, (16, 16)).astype(np.float32)
    right = generator.integers(-900, 900, (16, 8)).astype(np.float32)
    assert np.array_equal(multiply(device, module, left, right, turned), left @ right)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e5, -65520])
def test_what_is_beyond_the_range_is_not_lost(device: Device, module: Module, wrong: float) -> None:
    left, right = np.ones((16, 16), np.float32), np.ones((16, 8), np.float32)
    left[5, 2] = wrong
    found = multiply(device, module, left, right, (False, False))
    assert np.isnan(found[5]).all()
    assert np.array_equal(np.delete(found, 5, axis=0), np.full((15, 8), 16))


@pytest.mark.parametrize("size", [1e-38, 1e-30, 2.0**-14, 0.3, 1, 8191, 3e38])
@pytest.mark.parametrize("count", [1, 31, 100])
def test_a_scale_brings_the_largest_into_range(
    device: Device, module: Module, size: float, count: int
) -> None:
    given = np.random.default_rng(count).uniform(-1, 1, count)
    given[count // 2] = -1
    given = (given * size).astype(np.float32)
    target = np.zeros(3, np.float32)
    scale, inverse, others = run(device, module, "scale", target, given, count, target)
    assert others == 0
    assert scale * inverse == 1
    assert np.frexp(scale)[0] == 0.5
    largest = scale * np.abs(given).max()
    # no scale is larger than a float: what is smaller yet stays below
    assert largest < 2**14
    assert largest >= 2**13 or scale == 2.0**126


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_scale_does_not_hide_what_is_no_number(
    device: Device, module: Module, wrong: float
) -> None:
    given = np.array([1, wrong, 2], np.float32)
    target = np.zeros(3, np.float32)
    scale, *_ = run(device, module, "scale", target, given, 3, target)
    assert scale > 0
    assert not np.isfinite(scale * np.float32(wrong))
