"""The limits of a CPU: latency and bandwidth of its caches and memory, and the peak of BLAS."""

import time
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from cnnlib.device import open_device
from cnnlib.errors import DeviceError
from cnnlib.probes.chase import Probes
from cnnlib.probes.log import ProbeLog, Step
from cnnlib.system.machine import usable_cores

KIB, MIB = 2**10, 2**20
CPU_LINE = 64
"""Bytes from one position of a chain to the next: a cache line."""
CPU_CHAINS = [2**k * KIB for k in range(3, 19)]
CPU_COPIES = [2**k * KIB for k in range(7, 18)]
"""Sizes in bytes, from one on at which the time of numpy's call is negligible."""
MATRIX = 1024


def cpu_steps(log: ProbeLog) -> list[Step]:
    """The probes of this machine's CPU: caches, memory and BLAS."""
    return [
        (("chase_cpu",), lambda: probe_cpu_memory(log)),
        *[(("copy_cpu",), partial(probe_cpu_copy, log, size)) for size in CPU_COPIES],
        (("blas_one", "blas_all"), lambda: probe_blas(log)),
    ]


def probe_cpu_memory(log: ProbeLog) -> None:
    """Measure the latency of every level of memory by compiled code that follows a chain."""
    with open_device("emulated") as device:
        probes = Probes(device)
        for size in CPU_CHAINS:
            probes.follow(log, "chase_cpu", size, CPU_LINE)


def probe_cpu_copy(log: ProbeLog, size: int) -> None:
    """Measure how fast numpy copies from one half of `size` bytes to the other, on one thread."""
    source, target = np.ones(size // 2, np.uint8), np.zeros(size // 2, np.uint8)
    times = max(1, 128 * MIB // size)

    def copy() -> float:
        began = time.perf_counter()
        for _ in range(times):
            np.copyto(target, source)
        return (time.perf_counter() - began) / times

    copy()
    log.repeat("copy_cpu", copy, "GB/s", 2 * source.nbytes / 1e9, size)


def probe_blas(log: ProbeLog) -> None:
    """Measure numpy's product of square float32 matrices on one thread and on all."""
    left = np.ones((MATRIX, MATRIX), np.float32)
    right, product = left.copy(), np.empty_like(left)

    def multiply() -> float:
        began = time.perf_counter()
        np.matmul(left, right, out=product)
        return time.perf_counter() - began

    # Set even when all cores are meant: a caller such as Snakemake sets OMP_NUM_THREADS.
    for probe, threads in (("blas_one", 1), ("blas_all", usable_cores())):
        with threadpool_limits(threads, user_api="blas"):
            multiply()
            if not (product == MATRIX).all():
                raise DeviceError("BLAS gives wrong sums")
            log.repeat(probe, multiply, "TFLOP/s", 2 * MATRIX**3 / 1e12)
