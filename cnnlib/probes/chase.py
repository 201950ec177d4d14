"""The kernels of kernels/probes.cuh and a clock; latency of memory by following addresses."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cnnlib.device import Device
from cnnlib.probes.book import Book

WORD = 4
THREADS = 256
ALONG, WARMING = 8192, 300_000
"""Hops timed at once, at least, and hops at most before, so that what fits a cache is in it."""
WALK_SECONDS = 0.01
"""A walk is timed about so long, if ALONG hops do not take longer: a launch empties a GPU's L1, and
the first round through a chain that fits it must not count."""

KERNELS = ("follow_chain", "follow_chain_shared", "do_nothing", "wait_in_block", "copy_numbers",
           "multiply_add")  # fmt: skip
CUDA_KERNELS = ("wait_in_grid", "multiply_matrices")


def chain(count: int, step: int, seed: int = 1) -> NDArray[np.int32]:
    """next[p] for `count` places `step` apart: one cycle through all of them, in random order."""
    order = np.random.default_rng(seed).permutation(count).astype(np.int32) * np.int32(step)
    following = np.zeros(count * step, np.int32)
    following[order] = np.roll(order, -1)
    return following


class Probes:
    """The kernels of kernels/probes.cuh on one device, and a clock."""

    def __init__(self, device: Device) -> None:
        self.device = device
        names = [*KERNELS, *(CUDA_KERNELS if device.kind == "cuda" else ())]
        source = '#include "portable.cuh"\n#define LAYER probe\n#include "probes.cuh"\n'
        module = device.compile(source, "probes", [f"probe_{name}" for name in names])
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

    def follow(self, book: Book, probe: str, size: int, line: int) -> None:
        """Latency of memory of which `size` bytes are used."""
        device, count = self.device, size // line
        following = device.array((size // WORD,), np.int32)
        following.set(chain(count, line // WORD))
        place = device.array((1,), np.int32)
        place.fill_bytes(0)

        def hops(number: int) -> Callable[[], None]:
            return self.kernels["follow_chain"].bind(1, 1, following, place, number)

        hops(min(count, WARMING))()
        each = self.time(hops(ALONG)) / ALONG
        number = max(ALONG, round(WALK_SECONDS / max(each, 1e-9)))
        walk = hops(number)
        book.repeat(probe, lambda: self.time(walk) / number, size=size)
        following.free()
        place.free()

    def follow_shared(self, book: Book, size: int) -> None:
        """The same of shared memory."""
        count = size // WORD
        following, place = self.device.array((count,), np.int32), self.device.array((1,), np.int32)
        following.set(chain(count, 1))
        place.fill_bytes(0)

        def walk(number: int) -> float:
            kernel = self.kernels["follow_chain_shared"]
            return self.time(
                kernel.bind(1, THREADS, following, place, count, number, shared_bytes=size)
            )

        walk(1)
        book.repeat(
            "chase_shared", lambda: (walk(9 * ALONG) - walk(ALONG)) / (8 * ALONG), size=size
        )
