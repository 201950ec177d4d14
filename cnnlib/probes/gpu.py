"""The limits of a GPU: launches, barriers, copies, levels of memory, peak arithmetic."""

import time
from functools import partial

import numpy as np

from cnnlib.device import Device
from cnnlib.device.architecture import TENSOR_CORES
from cnnlib.errors import DeviceError
from cnnlib.probes.chase import THREADS, Probes
from cnnlib.probes.log import ProbeLog, Step

KIB, MIB = 2**10, 2**20
GPU_LINE = 128
"""Bytes from one position of a chain to the next: a cache line, so that each hop needs another."""
COPIES = [4**k for k in range(1, 15)]
"""Bytes copied between host and device: 4 B to 256 MB."""
SHARED_CHAINS = [*(2**k * KIB for k in range(8)), 192 * KIB]
GPU_CHAINS = [2**k * KIB for k in range(21)]
LAUNCHES = 500
BARRIERS = 2000
ROUNDS = 8192
DEVICE_COPY = 64 * MIB
"""How many numbers are copied from device memory to device memory: 256 MB."""


def gpu_steps(log: ProbeLog, device: Device) -> list[Step]:
    """The probes of a GPU."""
    probes = Probes(device)
    shared = [size for size in SHARED_CHAINS if size <= device.shared_bytes]
    return [
        (("launch", "launch_host", "event"), lambda: probe_launches(log, probes)),
        (("barrier_block",), lambda: probe_block_barrier(log, probes)),
        (("barrier_grid",), lambda: probe_grid_barrier(log, probes)),
        *[(("chase_shared",), partial(probes.follow_shared, log, size)) for size in shared],
        *[
            (("chase_global",), partial(probes.follow, log, "chase_global", size, GPU_LINE))
            for size in GPU_CHAINS
        ],
        (("copy_device",), lambda: probe_device_copy(log, probes)),
        (("peak_fp32",), lambda: probe_arithmetic(log, probes)),
        (("peak_tf32",), lambda: probe_tensor_cores(log, probes)),
        *[
            ((f"copy_up_{how}", f"copy_down_{how}"), partial(probe_copies, log, device, size, how))
            for size in COPIES
            for how in ("pageable", "pinned")
        ],
    ]


def probe_launches(log: ProbeLog, probes: Probes) -> None:
    """Measure launches in a row by the clocks of device and host, and an event's round trip."""
    device = probes.device
    nothing = probes.kernels["do_nothing"].bind(1, 32, device.array((1,), np.int32))
    nothing()
    log.repeat("launch", lambda: probes.time(nothing, LAUNCHES))

    def by_host() -> float:
        device.synchronize()
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            nothing()
        seconds = time.perf_counter() - began
        device.synchronize()
        return seconds / LAUNCHES

    log.repeat("launch_host", by_host)

    def there_and_back() -> float:
        device.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            probes.ended.record()
            device.synchronize()
        return (time.perf_counter() - began) / 100

    log.repeat("event", there_and_back)


def probe_block_barrier(log: ProbeLog, probes: Probes) -> None:
    """Measure a barrier of the threads of one block."""
    waited = probes.device.array((1,), np.int32)
    wait = probes.kernels["wait_in_block"].bind(1, THREADS, waited, BARRIERS)
    wait()
    log.repeat("barrier_block", lambda: probes.time(wait) / BARRIERS)


def probe_grid_barrier(log: ProbeLog, probes: Probes) -> None:
    """Measure a barrier of as many blocks as there are multiprocessors."""
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
    log.repeat("barrier_grid", once)


def probe_device_copy(log: ProbeLog, probes: Probes) -> None:
    """Measure a copy within device memory; bytes read and bytes written both count."""
    device, count = probes.device, DEVICE_COPY
    source, target = device.array((count,)), device.array((count,))
    source.fill_bytes(1)
    copy = probes.kernels["copy_numbers"].bind(
        device.multiprocessors * 8, THREADS, source, target, count
    )
    copy()
    log.repeat(
        "copy_device", lambda: probes.time(copy, 10), "GB/s", 2 * source.nbytes / 1e9, source.nbytes
    )


def probe_arithmetic(log: ProbeLog, probes: Probes) -> None:
    """Measure fused multiply-adds of float32 by all cores, which count as two operations each."""
    device = probes.device
    blocks = device.multiprocessors * 8
    sums = device.array((blocks * THREADS,))
    run = probes.kernels["multiply_add"].bind(blocks, THREADS, sums, 1.0, 1.0, ROUNDS)
    run()
    if not (sums.get() == 8 * ROUNDS).all():
        raise DeviceError("fused multiply-adds give wrong sums")
    log.repeat("peak_fp32", lambda: probes.time(run), "TFLOP/s", 2 * 8 * ROUNDS * sums.size / 1e12)


def probe_tensor_cores(log: ProbeLog, probes: Probes) -> None:
    """Measure matrix products in TF32 by mma.sync, the instruction of a single warp.

    Hopper's wgmma, by which four warps multiply operands in shared memory, is faster.
    """
    device = probes.device
    if device.capability < TENSOR_CORES.since:
        major, minor = device.capability
        raise DeviceError(f"a GPU of compute capability {major}.{minor} has no {TENSOR_CORES.name}")
    blocks = device.multiprocessors * 8
    sums = device.array((blocks * THREADS,))
    run = probes.kernels["multiply_matrices"].bind(blocks, THREADS, sums, ROUNDS)
    run()
    if not (sums.get() == 4 * 4 * 8 * ROUNDS).all():
        raise DeviceError("tensor cores give wrong sums")
    flops = 2 * 16 * 8 * 8 * 4 * ROUNDS * sums.size / 32
    log.repeat("peak_tf32", lambda: probes.time(run), "TFLOP/s", flops / 1e12)


def probe_copies(log: ProbeLog, device: Device, size: int, how: str) -> None:
    """Measure copies to the device and back until the host knows that they are done."""
    host = device.pinned((size,), np.uint8) if how == "pinned" else np.empty(size, np.uint8)
    host.fill(1)
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
        log.repeat(f"{name}_{how}", copy, "GB/s", host.nbytes / 1e9, host.nbytes)
    there.free()
