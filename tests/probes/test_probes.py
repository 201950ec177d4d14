"""The machine's own limits: complete chains, correct sums, and rows that fit the table."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cnnlib.device import Device, open_device
from cnnlib.device.architecture import KNOWN, T4, Architecture
from cnnlib.device.driver import gpu_present
from cnnlib.device.null import NullDevice
from cnnlib.errors import DeviceError
from cnnlib.measuring import schema
from cnnlib.paths import KERNELS
from cnnlib.probes import chase, cpu, gpu, measure_limits, walk
from cnnlib.probes import log as logs
from cnnlib.probes.chase import Probes, chain
from cnnlib.probes.log import ProbeLog
from cnnlib.system.machine import usable_cores
from tests.support.toys import toy_config


@pytest.mark.parametrize(("count", "step"), [(1, 1), (2, 16), (1000, 1), (257, 32)])
def test_a_chain_is_one_cycle_through_all_positions(count: int, step: int) -> None:
    following = chain(count, step)
    assert len(following) == count * step
    place, visited = 0, []
    for _ in range(count):
        visited.append(place)
        place = int(following[place])
    assert place == 0
    assert sorted(visited) == list(range(0, count * step, step))


def run(device: Device, kernel: str, *arguments: object, grid: int = 1, block: int = 1) -> None:
    Probes(device).kernels[kernel](grid, block, *arguments)
    device.synchronize()


def test_the_kernel_follows_the_chain(device: Device) -> None:
    following, place = device.array((96,), np.int32), device.array((1,), np.int32)
    links = chain(6, 16)
    following.set(links)
    place.fill_bytes(0)
    run(device, "follow_chain", following, place, 4)
    expected = 0
    for _ in range(4):
        expected = int(links[expected])
    assert place.get()[0] == expected
    run(device, "follow_chain", following, place, 2)
    assert place.get()[0] == 0


def test_multiply_adds_count(device: Device) -> None:
    sums = device.array((64,))
    run(device, "multiply_add", sums, 1.0, 1.0, 10, grid=2, block=32)
    assert (sums.get() == 80).all()


def test_numbers_are_copied(device: Device) -> None:
    source, target = device.array((1000,)), device.array((1000,))
    numbers = np.arange(1000, dtype=np.float32)
    source.set(numbers)
    run(device, "copy_numbers", source, target, 1000, grid=3, block=32)
    assert np.array_equal(target.get(), numbers)


def test_a_block_waits_so_often(device: Device) -> None:
    waited = device.array((3,), np.int32)
    run(device, "wait_in_block", waited, 5, grid=3, block=64)
    assert (waited.get() == 5).all()


def test_a_walk_is_long_enough_for_its_beginning_not_to_count(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, timed = ProbeLog(deadline=time.perf_counter()), Probes(device)
    monkeypatch.setattr(timed, "time", lambda call: (call(), 1e-5)[1])
    timed.follow(log, "chase_global", 4096, 128)
    # A walk of ALONG hops took 10 us, from which the hops in WALK_SECONDS follow.
    hops = chase.ALONG * chase.WALK_SECONDS / 1e-5
    assert log.rows[0]["seconds"] == pytest.approx(1e-5 / hops, rel=1e-3)


def test_shared_chain_is_followed(device: Device) -> None:
    log = ProbeLog(deadline=time.perf_counter())
    Probes(device).follow_shared(log, 1024)
    assert [row["probe"] for row in log.rows] == ["chase_shared"]


def test_a_cpu_has_limits_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "CPU_CHAINS", [2**13, 2**16])
    monkeypatch.setattr(cpu, "CPU_COPIES", [2**17])
    config = toy_config(sweep={"device": "emulated"}, measuring={"probe_seconds": 0.001})
    schema.write(tmp_path / "probes.csv", "probes", measure_limits(config))
    rows = schema.read(tmp_path / "probes.csv", "probes")
    assert set(rows.probe) == {"chase_cpu", "copy_cpu", "blas_one", "blas_all"}
    assert set(rows.device_kind) == {"cpu"}
    assert set(rows.status) == {"ok"}
    assert (rows.rate > 0).all()
    # There is no time to measure anything twice.
    assert not rows.duplicated(["probe", "size_bytes"]).any()
    chased = rows[rows.probe == "chase_cpu"]
    assert (chased.rate == chased.seconds).all()


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose sizes at which everything is measured within a second, even on a slow CPU."""
    for module, name, small in (
        (gpu, "SHARED_CHAINS", [2**10, 2**30]),
        (gpu, "GPU_CHAINS", [2**12]),
        (gpu, "COPIES", [4, 2**12]),
        (gpu, "DEVICE_COPY", 2**20),
        (gpu, "ROUNDS", 16),
        (gpu, "BARRIERS", 10),
        (gpu, "LAUNCHES", 10),
        (chase, "WALK_SECONDS", 1e-4),
        (cpu, "CPU_CHAINS", [2**13]),
        (cpu, "CPU_COPIES", [2**17]),
        (cpu, "MATRIX", 64),
    ):
        monkeypatch.setattr(module, name, small)


def test_without_a_compiler_only_the_chain_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    rows = measure_limits(toy_config(sweep={"device": "emulated"}))
    standing = {row["probe"]: row["status"] for row in rows}
    assert standing == {
        "chase_cpu": "unavailable",
        "copy_cpu": "ok",
        "blas_one": "ok",
        "blas_all": "ok",
    }


@pytest.mark.skipif(gpu_present(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(DeviceError, match="device cuda does not work here"):
        measure_limits(toy_config(sweep={"device": "cuda"}))


ASKED = {
    "launch",
    "launch_host",
    "event",
    "barrier_block",
    "barrier_grid",
    "chase_shared",
    "chase_global",
    "copy_device",
    "peak_fp32",
    "peak_tf32",
    "copy_up_pageable",
    "copy_down_pageable",
    "copy_up_pinned",
    "copy_down_pinned",
}


def test_what_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated device stands in for a GPU; it lacks only the kernels that need a real one."""
    make_small(monkeypatch)

    def lacking(log: ProbeLog, probes: Probes) -> None:
        raise DeviceError("only on a GPU")

    monkeypatch.setattr(gpu, "probe_grid_barrier", lacking)
    monkeypatch.setattr(gpu, "probe_tensor_cores", lacking)
    log = ProbeLog(deadline=time.perf_counter())
    with open_device("emulated") as emulated:
        reports: list[tuple[str, int, int]] = []
        walk(log, gpu.gpu_steps(log, emulated), lambda *words: reports.append(words))
    count = reports[0][2]
    assert [done for _, done, _ in reports] == list(range(count))
    assert {row["probe"] for row in log.rows} == ASKED
    missing = {row["probe"] for row in log.rows if row["status"] != "ok"}
    assert missing == {"barrier_grid", "peak_tf32"}
    good = [row for row in log.rows if row["status"] == "ok"]
    # A chain that exceeds the shared memory of a block is not tried.
    assert {row["size_bytes"] for row in good if row["probe"] == "chase_shared"} == {2**10}
    for row in good:
        if row["unit"] == "GB/s":
            moved = row["size_bytes"] * (2 if row["probe"] == "copy_device" else 1)
            assert row["rate"] == pytest.approx(moved / row["seconds"] / 1e9)


@pytest.mark.gpu
def test_a_gpu_answers_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    rows = measure_limits(toy_config(sweep={"device": "cuda"}))
    of_gpu = [row for row in rows if row["device_kind"] == "cuda"]
    assert {row["probe"] for row in of_gpu} == ASKED
    assert {row["status"] for row in of_gpu} == {"ok"}


def test_what_fails_is_unavailable_and_the_rest_goes_on() -> None:
    log = ProbeLog()
    with log.probing("one", "two"):
        raise DeviceError("no")
    with log.probing("three"):
        log.repeat("three", lambda: 0.5, "GB/s", 2.0, 8)
    assert [(row["probe"], row["status"]) for row in log.rows][:3] == [
        ("one", "unavailable"),
        ("two", "unavailable"),
        ("three", "ok"),
    ]
    assert {row["rate"] for row in log.rows[2:]} == {4.0}
    assert len(log.rows) == 2 + logs.REPEATS


def test_a_gpu_without_tensor_cores_for_tf32_says_so(device: Device) -> None:
    probes, log = Probes(device), ProbeLog()
    probes.device = NullDevice(T4.limits)
    with pytest.raises(DeviceError, match="of compute capability 7.5 has no tensor-core products"):
        gpu.probe_tensor_cores(log, probes)
    assert not log.rows


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
@pytest.mark.parametrize("architecture", KNOWN, ids=lambda each: each.sm)
def test_a_gpu_compiles_them(architecture: Architecture, tmp_path: Path) -> None:
    source = tmp_path / "probes.cu"
    source.write_text('#include "probes.cuh"\n')
    target = tmp_path / "probes.cubin"
    command = [
        "nvcc",
        f"-arch={architecture.sm}",
        "-cubin",
        f"-I{KERNELS}",
        "-o",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = target.read_bytes()
    for kernel in (*chase.KERNELS, *chase.CUDA_KERNELS):
        assert f"probe_{kernel}".encode() in names


THREADS = """
from types import SimpleNamespace
from threadpoolctl import threadpool_info
from cnnlib.probes.cpu import probe_blas

def repeat(probe, *_):
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    print(probe, *{library["num_threads"] for library in blas})

probe_blas(SimpleNamespace(repeat=repeat))
"""


def test_all_cores_are_probed_whatever_the_caller_has_set() -> None:
    """Snakemake gives a job's threads to every library that reads OMP_NUM_THREADS."""
    limits = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        cwd=KERNELS.parent,
        env=os.environ | limits,
        text=True,
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines() == ["blas_one 1", f"blas_all {usable_cores()}"]
