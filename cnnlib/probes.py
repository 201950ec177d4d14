"""The machine's own limits: what the stages' times have to be seen against.

Latency of launches, events, barriers, copies and of every level of memory; bandwidth of copies;
peak arithmetic. Memory latency is that of one thread following a chain of addresses in random
order, each load waiting for the one before (as lmbench's lat_mem_rd does). Every result of
arithmetic is checked: a rate of wrong sums is none.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cnnlib.config import Config
from cnnlib.device import Device, open_device
from cnnlib.device.cuda import missing_parts
from cnnlib.errors import DeviceError, UserError
from cnnlib.machine import cpu_description

Row = dict[str, Any]

REPEATS = 5
KIB, MIB = 2**10, 2**20
GPU_LINE, CPU_LINE, WORD = 128, 64, 4
"""Bytes from one place of a chain to the next: a cache line, so that every hop asks for another."""
THREADS = 256
COPIES = [4**k for k in range(1, 15)]
"""Bytes copied between host and device: 4 B to 256 MB."""
SHARED_CHAINS = [*(2**k * KIB for k in range(8)), 192 * KIB]
GPU_CHAINS = [2**k * KIB for k in range(21)]
CPU_CHAINS = [2**k * KIB for k in range(3, 19)]
CPU_COPIES = [2**k * KIB for k in range(7, 18)]
"""From a size on at which numpy's call takes no time beside the copy."""
ALONG, WARMING = 8192, 300_000
"""Hops timed at once, at least, and hops at most before, so that what fits a cache is in it."""
WALK_SECONDS = 0.01
"""A walk is timed about so long, if ALONG hops do not take longer: a launch empties a GPU's L1, and
the first round through a chain that fits it must not count."""
LAUNCHES = 500
BARRIERS = 2000
ROUNDS = 8192
MATRIX = 1024
DEVICE_COPY = 64 * MIB
"""Numbers copied from device memory to device memory: 256 MB."""

KERNELS = ("follow_chain", "follow_chain_shared", "do_nothing", "wait_in_block", "copy_numbers",
           "multiply_add")  # fmt: skip
CUDA_KERNELS = ("wait_in_grid", "multiply_matrices")


@dataclass
class Book:
    """Rows of the table `probes`, and the time there is for them."""

    deadline: float = math.inf
    """perf_counter after which nothing is measured more than once."""
    rows: list[Row] = field(default_factory=list)
    device: str = ""
    device_kind: str = ""

    def repeat(
        self,
        probe: str,
        measure: Callable[[], float],
        unit: str = "s",
        work: float = 0.0,
        size: int = 0,
    ) -> None:
        """Rows of up to REPEATS calls of `measure`, which returns seconds.

        The rate is work / seconds, in a unit that `work` is given in; in "s" it is the seconds.
        """
        for repeat in range(1, REPEATS + 1):
            seconds = measure()
            rate = seconds if unit == "s" else work / seconds
            self.add(probe, size, repeat, seconds, rate, unit, "ok")
            if time.perf_counter() > self.deadline:
                return

    def add(
        self, probe: str, size: int, repeat: int, seconds: float, rate: float, unit: str,
        status: str,
    ) -> None:  # fmt: skip
        self.rows.append(
            {
                "device": self.device, "device_kind": self.device_kind, "probe": probe,
                "size_bytes": size, "repeat": repeat, "seconds": seconds, "rate": rate,
                "unit": unit, "status": status,
            }
        )  # fmt: skip

    @contextmanager
    def probing(self, *probes: str) -> Iterator[None]:
        """What fails inside leaves a row `unavailable` for each of `probes`; the others go on."""
        try:
            yield
        except (UserError, MemoryError):
            for probe in probes:
                self.add(probe, 0, 1, math.nan, math.nan, "", "unavailable")


def measure_limits(config: Config) -> list[Row]:
    """Rows of the table `probes` for the CPU and, where sweep.device allows one, the GPU.

    Raises DeviceError when sweep.device is cuda and there is none.
    """
    book = Book()
    share = config.measuring.probe_seconds / 2
    wanted = config.sweep.device
    if wanted == "cuda" or (wanted == "auto" and not missing_parts()):
        with open_device("cuda") as device:
            book.deadline = time.perf_counter() + share
            book.device, book.device_kind = device.name, device.kind
            probe_gpu(book, device)
    book.deadline = time.perf_counter() + share
    book.device, book.device_kind = cpu_description(None), "cpu"
    probe_cpu(book)
    return book.rows


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


def probe_gpu(book: Book, device: Device) -> None:
    """All that a GPU can be asked."""
    probes = Probes(device)
    with book.probing("launch", "launch_host", "event"):
        probe_launches(book, probes)
    with book.probing("barrier_block"):
        waited = device.array((1,), np.int32)
        wait = probes.kernels["wait_in_block"].bind(1, THREADS, waited, BARRIERS)
        wait()
        book.repeat("barrier_block", lambda: probes.time(wait) / BARRIERS)
    with book.probing("barrier_grid"):
        probe_grid_barrier(book, probes)
    for size in SHARED_CHAINS:
        if size <= device.shared_bytes:
            with book.probing("chase_shared"):
                probes.follow_shared(book, size)
    for size in GPU_CHAINS:
        with book.probing("chase_global"):
            probes.follow(book, "chase_global", size, GPU_LINE)
    with book.probing("copy_device"):
        probe_device_copy(book, probes)
    with book.probing("peak_fp32"):
        probe_arithmetic(book, probes)
    with book.probing("peak_tf32"):
        probe_tensor_cores(book, probes)
    for size in COPIES:
        with book.probing("copy_up_pageable", "copy_down_pageable"):
            probe_copies(book, device, np.ones(size, np.uint8), "pageable")
        with book.probing("copy_up_pinned", "copy_down_pinned"):
            pinned = device.pinned((size,), np.uint8)
            pinned.fill(1)
            probe_copies(book, device, pinned, "pinned")


def probe_launches(book: Book, probes: Probes) -> None:
    """Launches in a row, by the device's clock and by the host's; an event's way there and back."""
    device = probes.device
    nothing = probes.kernels["do_nothing"].bind(1, 32, device.array((1,), np.int32))
    nothing()
    book.repeat("launch", lambda: probes.time(nothing, LAUNCHES))

    def by_host() -> float:
        device.synchronize()
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            nothing()
        seconds = time.perf_counter() - began
        device.synchronize()
        return seconds / LAUNCHES

    book.repeat("launch_host", by_host)

    def there_and_back() -> float:
        device.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            probes.ended.record()
            device.synchronize()
        return (time.perf_counter() - began) / 100

    book.repeat("event", there_and_back)


def probe_grid_barrier(book: Book, probes: Probes) -> None:
    """A barrier of as many blocks as there are multiprocessors."""
    device = probes.device
    arrived, failed = device.array((1,), np.uint32), device.array((1,), np.uint32)
    wait = probes.kernels["wait_in_grid"].bind(
        device.multiprocessors, THREADS, arrived, failed, BARRIERS
    )

    def once() -> float:
        arrived.fill_bytes(0)
        failed.fill_bytes(0)
        seconds = probes.time(wait) / BARRIERS
        if failed.get()[0] or arrived.get()[0] != device.multiprocessors * BARRIERS:
            raise DeviceError("not all blocks of the grid barrier were resident")
        return seconds

    once()
    book.repeat("barrier_grid", once)


def probe_device_copy(book: Book, probes: Probes) -> None:
    """From device memory to device memory; bytes read and bytes written count."""
    device, count = probes.device, DEVICE_COPY
    source, target = device.array((count,)), device.array((count,))
    source.fill_bytes(1)
    copy = probes.kernels["copy_numbers"].bind(
        device.multiprocessors * 8, THREADS, source, target, count
    )
    copy()
    book.repeat(
        "copy_device", lambda: probes.time(copy, 10), "GB/s", 2 * source.nbytes / 1e9, source.nbytes
    )


def probe_arithmetic(book: Book, probes: Probes) -> None:
    """Fused multiply-adds of float32 by all cores, two operations each."""
    device = probes.device
    blocks = device.multiprocessors * 8
    sums = device.array((blocks * THREADS,))
    run = probes.kernels["multiply_add"].bind(blocks, THREADS, sums, 1.0, 1.0, ROUNDS)
    run()
    if not (sums.get() == 8 * ROUNDS).all():
        raise DeviceError("fused multiply-adds give wrong sums")
    book.repeat("peak_fp32", lambda: probes.time(run), "TFLOP/s", 2 * 8 * ROUNDS * sums.size / 1e12)


def probe_tensor_cores(book: Book, probes: Probes) -> None:
    """Products of matrices in TF32 by mma.sync, the way a kernel of one warp's reach takes.

    Hopper's wgmma, by which four warps multiply out of shared memory, is faster.
    """
    device = probes.device
    blocks = device.multiprocessors * 8
    sums = device.array((blocks * THREADS,))
    run = probes.kernels["multiply_matrices"].bind(blocks, THREADS, sums, ROUNDS)
    run()
    if not (sums.get() == 4 * 4 * 8 * ROUNDS).all():
        raise DeviceError("tensor cores give wrong sums")
    flops = 2 * 16 * 8 * 8 * 4 * ROUNDS * sums.size / 32
    book.repeat("peak_tf32", lambda: probes.time(run), "TFLOP/s", flops / 1e12)


def probe_copies(book: Book, device: Device, host: NDArray[np.uint8], how: str) -> None:
    """Up and down, from the host's point of view: until the copy is known to be done."""
    there = device.array(host.shape, np.uint8)

    def up() -> float:
        device.synchronize()
        began = time.perf_counter()
        there.set(host)
        device.synchronize()
        return time.perf_counter() - began

    def down() -> float:
        device.synchronize()
        began = time.perf_counter()
        there.get(host)
        return time.perf_counter() - began

    for name, copy in (("copy_up", up), ("copy_down", down)):
        copy()
        book.repeat(f"{name}_{how}", copy, "GB/s", host.nbytes / 1e9, host.nbytes)
    there.free()


def probe_cpu(book: Book) -> None:
    """Caches, memory and BLAS of this machine's CPU; the chain is followed by compiled code."""
    with book.probing("chase_cpu"), open_device("host") as host:
        probes = Probes(host)
        for size in CPU_CHAINS:
            probes.follow(book, "chase_cpu", size, CPU_LINE)
    for size in CPU_COPIES:
        with book.probing("copy_cpu"):
            probe_cpu_copy(book, size)
    with book.probing("blas_one", "blas_all"):
        probe_blas(book)


def probe_cpu_copy(book: Book, size: int) -> None:
    """numpy copying from one half of `size` bytes to the other, one thread."""
    source, target = np.ones(size // 2, np.uint8), np.zeros(size // 2, np.uint8)
    times = max(1, 128 * MIB // size)

    def copy() -> float:
        began = time.perf_counter()
        for _ in range(times):
            np.copyto(target, source)
        return (time.perf_counter() - began) / times

    copy()
    book.repeat("copy_cpu", copy, "GB/s", 2 * source.nbytes / 1e9, size)


def probe_blas(book: Book) -> None:
    """numpy's product of square float32 matrices, by one thread and by all."""
    left = np.ones((MATRIX, MATRIX), np.float32)
    right, product = left.copy(), np.empty_like(left)

    def multiply() -> float:
        began = time.perf_counter()
        np.matmul(left, right, out=product)
        return time.perf_counter() - began

    for probe, threads in (("blas_one", 1), ("blas_all", None)):
        with threadpool_limits(threads, user_api="blas"):
            multiply()
            if not (product == MATRIX).all():
                raise DeviceError("BLAS gives wrong sums")
            book.repeat(probe, multiply, "TFLOP/s", 2 * MATRIX**3 / 1e12)
