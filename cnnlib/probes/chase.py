"""The kernels of kernels/probes.cuh with a clock, and memory latency by pointer chasing."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cnnlib.device import Device
from cnnlib.probes.log import ProbeLog

WORD = 4
THREADS = 256
ALONG, WARMING = 8192, 300_000
"""Least number of hops that are timed at once, and largest number of hops that precede them.

The first ones bring into the cache what fits there.
"""
WALK_SECONDS = 0.01
"""Duration of a timed walk, unless ALONG hops take longer.

A launch empties a GPU's L1 cache, so the first round through a chain that fits must not count.
"""

KERNELS = (
    "follow_chain",
    "follow_chain_shared",
    "do_nothing",
    "wait_in_block",
    "copy_numbers",
    "multiply_add",
)
CUDA_KERNELS = ("wait_in_grid", "multiply_matrices")


def chain(count: int, step: int, seed: int = 1) -> NDArray[np.int32]:
    """A cycle through `count` positions `step` apart in random order: position -> the next one.

    The result is (count * step,); only the entries at those positions are used.
    """
    order = np.random.default_rng(seed).permutation(count).astype(np.int32) * np.int32(step)
    following = np.zeros(count * step, np.int32)
    following[order] = np.roll(order, -1)
    return following


class Probes:
    """The kernels of kernels/probes.cuh on one device, with a clock."""

    def __init__(self, device: Device) -> None:
        self.device = device
        names = [*KERNELS, *(CUDA_KERNELS if device.kind == "cuda" else ())]
        module = device.compile(
            '#include "probes.cuh"\n', "probes", [f"probe_{name}" for name in names]
        )
        self.kernels = {name: module.kernel(f"probe_{name}") for name in names}
        self.began, self.ended = device.event(), device.event()

    def time(self, call: Callable[[], object], times: int = 1) -> float:
        """Seconds of one call, by the device's clock."""
        self.began.record()
        for _ in range(times):
            call()
        self.ended.record()
        self.device.synchronize()
        return self.ended.seconds_since(self.began) / times

    def follow(self, log: ProbeLog, probe: str, size: int, line: int) -> None:
        """Measure the latency of memory by one load from each `line` of `size` bytes."""
        device, count = self.device, size // line
        following = device.array((size // WORD,), np.int32)
        following.set(chain(count, line // WORD))
        position = device.array((1,), np.int32)
        position.fill_bytes(0)

        def hops(number: int) -> Callable[[], None]:
            return self.kernels["follow_chain"].bind(1, 1, following, position, number)

        hops(min(count, WARMING))()
        each = self.time(hops(ALONG)) / ALONG
        number = max(ALONG, round(WALK_SECONDS / max(each, 1e-9)))
        walk = hops(number)
        log.repeat(probe, lambda: self.time(walk) / number, size=size)
        following.free()
        position.free()

    def follow_shared(self, log: ProbeLog, size: int) -> None:
        """Measure the latency of shared memory when `size` bytes of it are used."""
        count = size // WORD
        following, position = (
            self.device.array((count,), np.int32),
            self.device.array((1,), np.int32),
        )
        following.set(chain(count, 1))
        position.fill_bytes(0)

        def walk(number: int) -> float:
            kernel = self.kernels["follow_chain_shared"]
            return self.time(
                kernel.bind(1, THREADS, following, position, count, number, shared_bytes=size)
            )

        walk(1)
        log.repeat("chase_shared", lambda: (walk(9 * ALONG) - walk(ALONG)) / (8 * ALONG), size=size)
