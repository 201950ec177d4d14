"""A watched emulated device counts bytes and names races and accesses outside arrays."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cnnlib.paths import ROOT

SOURCE = """
#include "async.cuh"
extern "C" __global__ void sums_right(const float* x, float* sums) {
  SHARED(float, all, 64);
  all[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int i = 0; i < 64; i++) sum += all[i];
    sums[blockIdx.x] = sum;
  }
}
extern "C" __global__ void sums_without_barrier(const float* x, float* sums) {
  SHARED(float, all, 64);
  all[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int i = 0; i < 64; i++) sum += all[i];
    sums[blockIdx.x] = sum;
  }
}
extern "C" __global__ void one_sum_of_blocks(const float* x, float* sums) {
  if (threadIdx.x == 0) sums[0] += x[blockIdx.x * 64];
}
extern "C" __global__ void one_sum_of_threads(const float* x, float* sums) {
  if (blockIdx.x == 0) sums[0] += x[threadIdx.x];
}
extern "C" __global__ void behind_the_end(const float* x, float* sums) {
  if (threadIdx.x == 0) sums[blockIdx.x] = x[blockIdx.x * 64 + 128];
}
extern "C" __global__ void behind_shared(const float* x, float* sums) {
  SHARED(float, all, 64);
  all[threadIdx.x + 1] = x[threadIdx.x];
}
extern "C" __global__ void bytes_side_by_side(const float* x, unsigned char* winners) {
  winners[blockIdx.x * 64 + threadIdx.x] = x[threadIdx.x] > 0.0f;
}
extern "C" __global__ void counters(const float* x, int* count) {
  atomicAdd(count, x[threadIdx.x] > 2.0f);
}
extern "C" __global__ void copies(const float* x, float* sums) {
  SHARED(float, all, 64);
  copy_async(all + threadIdx.x, x + threadIdx.x);
  wait_for_copies();
  sums[blockIdx.x * 64 + threadIdx.x] = all[threadIdx.x];
}
extern "C" __global__ void copies_without_waiting(const float* x, float* sums) {
  SHARED(float, all, 64);
  copy_async(all + threadIdx.x, x + threadIdx.x);
  __syncthreads();
  sums[blockIdx.x * 64 + threadIdx.x] = all[threadIdx.x];
}
extern "C" __global__ void warps(const float* x, float* sums) {
  SHARED(float, all, 64);
  all[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  const float other = all[threadIdx.x ^ 1];
  sums[blockIdx.x * 64 + threadIdx.x] = other;
}
"""

PROGRAM = """
import dataclasses, json, sys
import numpy as np
from cnnlib.device import KernelError
from cnnlib.device.emulated import EmulatedDevice
source, names = sys.stdin.read(), sys.argv[1:]
found = {}
with EmulatedDevice() as device:
    module = device.compile(source, "watched", names)
    x = device.array(128)
    x.set(np.arange(128, dtype=np.float32))
    kinds = {"bytes_side_by_side": np.uint8, "counters": np.int32}
    for name in names:
        out = device.array(128, kinds.get(name, np.float32))
        out.fill_bytes(0)
        error = ""
        try:
            module.kernel(name)(2, 64, x, out)
        except KernelError as failed:
            error = str(failed)
        watched = dataclasses.asdict(device.watched[name])
        found[name] = watched | {"error": error, "first": float(out.get()[0])}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What was found of each kernel; in a process that has no other emulated device."""
    names = [line.split("void ")[1].split("(")[0] for line in SOURCE.splitlines() if "void" in line]
    environment = {**os.environ, "CNNLIB_WATCH": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(
        command, input=SOURCE, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_bytes_of_device_memory_are_counted(found: dict[str, Any]) -> None:
    right = found["sums_right"]
    assert (right["read"], right["written"], right["launches"]) == (2 * 64 * 4, 2 * 4, 1)
    assert found["bytes_side_by_side"]["written"] == 128
    assert found["sums_right"]["first"] == sum(range(64))


@pytest.mark.parametrize(
    "kernel", ["sums_right", "bytes_side_by_side", "counters", "warps", "copies"]
)
def test_what_is_ordered_is_no_race(kernel: str, found: dict[str, Any]) -> None:
    assert found[kernel]["findings"] == {}
    assert found[kernel]["error"] == ""


def test_atomic_operations_are_carried_out(found: dict[str, Any]) -> None:
    assert found["counters"]["first"] == 2 * 61


def test_races_have_names(found: dict[str, Any]) -> None:
    without = found["sums_without_barrier"]["findings"]
    assert list(without) == ["barrier"]
    assert "of shared array all, which thread 0 reads" in without["barrier"]
    blocks = found["one_sum_of_blocks"]["findings"]
    assert list(blocks) == ["blocks"]
    assert "which block 0 writes" in blocks["blocks"]
    assert list(found["one_sum_of_threads"]["findings"]) == ["threads"]
    copies = found["copies_without_waiting"]["findings"]
    assert list(copies) == ["copy"]
    assert "while a copy of thread 0 to it is on its way" in copies["copy"]


def test_accesses_outside_end_the_launch(found: dict[str, Any]) -> None:
    reads, writes = found["behind_the_end"]["error"], found["behind_shared"]["error"]
    assert "block (0,0,0): thread 0 reads 4 bytes outside every array, 0 bytes behind" in reads
    assert "thread 63 writes 4 bytes outside every array" in writes
    assert "behind shared array all, which has 256" in writes
