"""What a CPU can be asked: its caches' and memory's latency and bandwidth, BLAS at its best."""

import time
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from cnnlib.device import open_device
from cnnlib.errors import DeviceError
from cnnlib.probes.book import Book, Step
from cnnlib.probes.chase import Probes
from cnnlib.system.machine import usable_cores

KIB, MIB = 2**10, 2**20
CPU_LINE = 64
"""Bytes from one place of a chain to the next: a cache line."""
CPU_CHAINS = [2**k * KIB for k in range(3, 19)]
CPU_COPIES = [2**k * KIB for k in range(7, 18)]
"""From a size on at which numpy's call takes no time beside the copy."""
MATRIX = 1024


def cpu_steps(book: Book) -> list[Step]:
    """Caches, memory and BLAS of this machine's CPU."""
    return [
        (("chase_cpu",), lambda: probe_cpu_memory(book)),
        *[(("copy_cpu",), partial(probe_cpu_copy, book, size)) for size in CPU_COPIES],
        (("blas_one", "blas_all"), lambda: probe_blas(book)),
    ]


def probe_cpu_memory(book: Book) -> None:
    """Latency of every level of memory; compiled code follows the chain."""
    with open_device("emulated") as device:
        probes = Probes(device)
        for size in CPU_CHAINS:
            probes.follow(book, "chase_cpu", size, CPU_LINE)


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

    # Said even when all cores are meant: a caller such as Snakemake sets OMP_NUM_THREADS.
    for probe, threads in (("blas_one", 1), ("blas_all", usable_cores())):
        with threadpool_limits(threads, user_api="blas"):
            multiply()
            if not (product == MATRIX).all():
                raise DeviceError("BLAS gives wrong sums")
            book.repeat(probe, multiply, "TFLOP/s", 2 * MATRIX**3 / 1e12)
