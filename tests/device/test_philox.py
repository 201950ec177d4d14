"""The kernels' random numbers are those of the published generator, and of cnnlib.layers.philox."""

from pathlib import Path

import numpy as np
import pytest

from cnnlib.device import Device, cuda
from cnnlib.layers.philox import philox

SOURCE = (Path(__file__).parent / "philox.cu").read_text()
ONES = 0xFFFFFFFF


def words(device: Device, counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(n, 4) words of counters (n, 4) under keys (n, 2), by the kernels' generator."""
    module = device.compile(SOURCE, "philox.cu", ["philox_words"])
    given = [device.array(numbers.shape, np.uint32) for numbers in (counters, keys)]
    for array, numbers in zip(given, (counters, keys), strict=True):
        array.set(np.ascontiguousarray(numbers, np.uint32))
    found = device.array(counters.shape, np.uint32)
    module.kernel("philox_words").bind(2, 32, *given, found, len(counters))()
    return found.get()


@pytest.mark.quick
def test_known_answers(device: Device) -> None:
    """Those that Random123 publishes for philox4x32-10."""
    counters = [[0] * 4, [ONES] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]
    keys = [[0] * 2, [ONES] * 2, [0xA4093822, 0x299F31D0]]
    assert words(device, np.array(counters), np.array(keys)).tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


@pytest.mark.quick
def test_any_counter_and_key_as_in_numpy(device: Device) -> None:
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, (100, 4))
    keys = generator.integers(0, 2**32, (100, 2))
    right = [
        philox(counter, (int(low), int(high)))
        for counter, (low, high) in zip(counters, keys, strict=True)
    ]
    assert np.array_equal(words(device, counters, keys), right)


@pytest.mark.skipif(cuda.find_nvcc() is None, reason="no nvcc on PATH")
def test_it_compiles_for_a_gpu() -> None:
    assert b".text.philox_words" in cuda.compile_cubin(SOURCE, "philox.cu", "sm_90")
