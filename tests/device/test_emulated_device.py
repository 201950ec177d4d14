"""The emulated device alone: what it reports, its order of fibers, its threads and its settings."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cnnlib.device import Kernel, KernelError, open_device
from cnnlib.device.compiler import find_compiler
from cnnlib.device.emulated import EmulatedDevice
from cnnlib.errors import DeviceError, DoesNotFit
from cnnlib.system.machine import usable_cores

pytestmark = pytest.mark.quick

KernelsIn = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def emulated() -> EmulatedDevice:
    return EmulatedDevice(fiber_order="forward", threads=2)


@pytest.fixture(scope="module")
def wrong(
    emulated: EmulatedDevice, wrong_source: str, kernels_in: KernelsIn
) -> Callable[[str], Kernel]:
    module = emulated.compile(wrong_source, "wrong.cu", kernels_in(wrong_source))
    return lambda name: module.kernel(f"wrong_{name}")


def line_of(source: str, text: str, number: int = 0) -> int:
    lines = [i for i, line in enumerate(source.splitlines(), 1) if text in line]
    return lines[number]


def test_auto_takes_what_works() -> None:
    with open_device("auto") as device:
        assert device.kind in ("cuda", "emulated")


def test_name_says_how_kernels_were_built(emulated: EmulatedDevice) -> None:
    assert re.search(r"\(kernels built by \S+ \d+[\d.]*\)$", emulated.name)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (
            "some_end",
            "divergent barrier: of 64 threads 5 wait at the barrier wrong.cu:{0}, 59 have",
        ),
        ("one_round_less", "divergent barrier: of 64 threads 1 wait at the barrier wrong.cu:{2}"),
        ("lane_missing", "warp operation at wrong.cu:{3} waits for lanes that do not come"),
        ("lane_at_barrier", "1 wait at the barrier"),
        ("not_in_mask", "lane 16 is not in its own mask 0000ffff"),
        ("too_much_shared", "shared array second of 16388 bytes beside 32768 others"),
    ],
)
def test_reports(
    emulated: EmulatedDevice,
    wrong: Callable[[str], Kernel],
    wrong_source: str,
    kernel: str,
    said: str,
) -> None:
    lines = [line_of(wrong_source, "__syncthreads", i) for i in range(5)]
    said = said.format(*lines[:2], lines[4], line_of(wrong_source, "__shfl_down"))
    out = emulated.array(64)
    with pytest.raises(KernelError) as caught:
        wrong(kernel)((3, 2), 64, out)
    message = str(caught.value)
    assert re.match(rf"kernel wrong_{kernel}, block \(\d,\d,0\): ", message)
    assert said in message
    assert "\n" not in message
    # and the device continues to work
    wrong("well_behaved")(5, 64, out)
    assert (out.get() == 2).all()


def test_threads_of_a_programmatic_launch_wait_once(
    emulated: EmulatedDevice, wrong: Callable[[str], Kernel]
) -> None:
    out = emulated.array(64)
    for kernel, times in (("some_do_not_wait", 63 * 3), ("well_behaved", 0)):
        with pytest.raises(KernelError, match=f"each of its 192 threads .* waited {times} times"):
            wrong(kernel).bind(3, 64, out, programmatic=True)()
    wrong("some_do_not_wait").bind(3, 64, out)()  # what waited before is not counted


def test_barriers_at_different_lines(
    emulated: EmulatedDevice, wrong: Callable[[str], Kernel], wrong_source: str
) -> None:
    first, second = (line_of(wrong_source, "__syncthreads", i) for i in (1, 2))
    with pytest.raises(KernelError) as caught:
        wrong("two_barriers")(1, 64, emulated.array(64))
    assert f"wrong.cu:{first}" in str(caught.value)
    assert f"wrong.cu:{second}" in str(caught.value)


def test_barriers_of_two_instances_of_a_template(
    emulated: EmulatedDevice, wrong: Callable[[str], Kernel], wrong_source: str
) -> None:
    """They are as far apart as those of two lines: each layer of stage tuned has its own."""
    line = line_of(wrong_source, "__syncthreads", 3)
    with pytest.raises(KernelError) as caught:
        wrong("two_instances")(1, 64, emulated.array(64))
    assert f"comes to wrong.cu:{line} of another instance of the template" in str(caught.value)


def test_shared_memory_starts_poisoned(
    emulated: EmulatedDevice, wrong: Callable[[str], Kernel]
) -> None:
    for blocks in (1, 9):  # a block does not see what the last one left
        out = emulated.array(64)
        wrong("reads_unwritten")(blocks, 64, out)
        np.testing.assert_array_equal(np.isnan(out.get()), np.arange(64) % 2 == 0)


def results_of(device: EmulatedDevice, probe_source: str, kernels: list[str]) -> list[bytes]:
    module = device.compile(probe_source, "probe.cu", kernels)
    source, results = device.array(5003), []
    source.set(np.random.default_rng(7).standard_normal(5003, np.float32))
    for name in ("sum_tree", "sum_shuffle"):
        out = device.array(7)
        module.kernel(f"probe_{name}")(7, 96 if name == "sum_shuffle" else 128, source, out, 5003)
        results.append(out.get().tobytes())
    for grid in (1, 5):
        out = device.array((37, 37))
        module.kernel("probe_multiply_tiles")(grid, (16, 16), source, source, out, 37)
        results.append(out.get().tobytes())
    out = device.array((9, 64), np.int32)
    module.kernel("probe_warp_operations")(1, 64, out)
    results.append(out.get().tobytes())
    out = device.array(6 * 90)
    module.kernel("probe_phases")(6, 90, out, 30)
    results.append(out.get().tobytes())
    out = device.array((2, 3, 4, 3, 2, 15), np.int32)
    module.kernel("probe_write_indices")((4, 3, 2), (15, 2, 3), out)
    results.append(out.get().tobytes())
    return results


def test_neither_order_nor_threads_change_a_bit(probe_source: str, kernels_in: KernelsIn) -> None:
    kernels = kernels_in(probe_source)
    expected = results_of(EmulatedDevice("forward", threads=1), probe_source, kernels)
    for order, threads in (("reverse", 1), ("forward", 3), ("reverse", 5)):
        device = EmulatedDevice(order, threads)
        assert results_of(device, probe_source, kernels) == expected


PROGRAM = """
import hashlib, sys
import numpy as np
from pathlib import Path
from cnnlib.device.compiler import find_compiler
from cnnlib.device.emulated import EmulatedDevice

device = EmulatedDevice()
names = ["probe_multiply_tiles", "probe_warp_operations", "probe_phases"]
module = device.compile(Path(sys.argv[1]).read_text(), "probe.cu", names)
source = device.array((37, 37))
source.set(np.arange(37 * 37, dtype=np.float32).reshape(37, 37) % 11)
digest = hashlib.sha256()
for name, shape, block, rest in (
    (names[0], (37, 37), (16, 16), (37,)), (names[1], (9, 64), 64, ()), (names[2], (90,), 90, (30,))
):
    out = device.array(shape, np.int32 if name == names[1] else np.float32)
    module.kernel(name)(1, block, *([source, source] if name == names[0] else []), out, *rest)
    digest.update(out.get().tobytes())
print(digest.hexdigest())
"""


def test_stacks_switched_by_the_library_give_the_same() -> None:
    # in a process each: the first runtime that is loaded serves all
    source = Path(__file__).with_name("probe.cu")
    printed = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(source)],
            env={**os.environ, "CXX": f"{find_compiler().command[0]}{extra}"},
            cwd=source.parents[2],
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        ).stdout
        for extra in ("", " -DEMULATED_UCONTEXT=1")
    ]
    assert len(printed[0].strip()) == 64
    assert printed[0] == printed[1]


def test_reverse_order_betrays_a_missing_barrier(wrong_source: str, kernels_in: KernelsIn) -> None:
    results = []
    for order in ("forward", "reverse"):
        device = EmulatedDevice(order)
        out = device.array(64)
        module = device.compile(wrong_source, "wrong.cu", kernels_in(wrong_source))
        module.kernel("wrong_no_barrier")(1, 64, out)
        results.append(out.get().tobytes())
    assert results[0] != results[1]


def test_order_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNLIB_FIBER_ORDER", "reverse")
    assert EmulatedDevice().fiber_order == "reverse"
    monkeypatch.setenv("CNNLIB_FIBER_ORDER", "backward")
    with pytest.raises(DeviceError, match=r"'backward'.*known: forward, reverse"):
        EmulatedDevice()


def test_threads_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CNNLIB_EMULATED_THREADS", raising=False)
    assert EmulatedDevice().multiprocessors == usable_cores()
    monkeypatch.setenv("CNNLIB_EMULATED_THREADS", "3")
    assert EmulatedDevice().multiprocessors == 3
    monkeypatch.setenv("CNNLIB_EMULATED_THREADS", "many")
    with pytest.raises(DeviceError, match="CNNLIB_EMULATED_THREADS=many"):
        EmulatedDevice()
    monkeypatch.delenv("CNNLIB_EMULATED_THREADS")
    monkeypatch.setenv("CNNLIB_HOST_THREADS", "5")  # the name in earlier versions
    assert EmulatedDevice().multiprocessors == 5


def test_memory_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNLIB_EMULATED_MEMORY", "1000")
    device = EmulatedDevice()
    held = device.array(200)
    assert (device.used_bytes(), device.free_bytes()) == (800, 200)
    with pytest.raises(DoesNotFit, match="204 bytes wanted, 200 of 1000 free"):
        device.array(51)
    assert device.array(50).nbytes == 200
    del held


def test_kinds_of_arguments_are_checked(emulated: EmulatedDevice, probe_source: str) -> None:
    module = emulated.compile(probe_source, "probe.cu", ["probe_visit_range", "probe_sum_tree"])
    kernel, ints, floats = (
        module.kernel("probe_visit_range"),
        emulated.array(4, np.int32),
        emulated.array(4),
    )
    for arguments, said in (
        ((ints,), "takes 2 arguments, 1 were given"),
        ((ints, 4, 5), "takes 2 arguments, 3 were given"),
        ((floats, 4), "argument 0 is an int32 array, given a float32 array"),
        ((ints, 4.0), "argument 1 is an int, given a float"),
        ((ints, ints), "argument 1 is an int, given an int32 array"),
        ((4, 4), "argument 0 is an int32 array, given an int"),
    ):
        with pytest.raises(KernelError, match=re.escape(said)):
            kernel(1, 1, *arguments)  # type: ignore[arg-type]


def test_bytes_of_large_shared_memory_are_checked(
    emulated: EmulatedDevice, probe_source: str
) -> None:
    kernel = emulated.compile(probe_source, "probe.cu", ["probe_sum_large"]).kernel(
        "probe_sum_large"
    )
    out = emulated.array(1)
    with pytest.raises(KernelError, match="many of 100000 bytes: the launch named 99999"):
        kernel.bind(1, 32, out, shared_bytes=99_999)()
    bound = kernel.bind(1, 32, out, shared_bytes=100_000)
    out.free()
    with pytest.raises(DeviceError, match="freed"):
        bound()


def test_launches_from_several_threads(emulated: EmulatedDevice, probe_source: str) -> None:
    kernel = emulated.compile(probe_source, "probe.cu", ["probe_phases"]).kernel("probe_phases")
    expected = emulated.array(4 * 64)
    kernel(4, 64, expected, 9)
    wrong_results = []

    def work() -> None:
        out = emulated.array(4 * 64)
        for _ in range(30):
            out.fill_bytes()
            kernel(4, 64, out, 9)
            if out.get().tobytes() != expected.get().tobytes():
                wrong_results.append(out.get())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong_results


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_launches_after_a_fork(emulated: EmulatedDevice, wrong: Callable[[str], Kernel]) -> None:
    out = emulated.array(64)
    wrong("well_behaved")(40, 64, out)  # helpers exist now, and will not in the child
    out.fill_bytes()
    child = os.fork()
    if child == 0:
        try:
            wrong("well_behaved")(40, 64, out)
            os._exit(0 if (out.get() == 2).all() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert np.isnan(out.get()).all()


def test_large_frames(emulated: EmulatedDevice) -> None:
    source = """#include "portable.cuh"
ENTRY_POINT(frames, fill)(float* out) {
    volatile float mine[16384];
    for (int i = 0; i < 16384; ++i) mine[i] = i + threadIdx.x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < 16384; i += 4096) sum += mine[i];
    out[threadIdx.x] = sum;
}
"""
    out = emulated.array(64)
    emulated.compile(source, "frames.cu", ["frames_fill"]).kernel("frames_fill")(1, 64, out)
    np.testing.assert_array_equal(out.get(), 4096 * 6 + 4 * np.arange(64))


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (0, "bulk copies are waited for that are not expected"),
        (2, "bulk copies are expected twice before they are waited for"),
    ],
)
def test_rounds_of_bulk_copies(emulated: EmulatedDevice, expected: int, said: str) -> None:
    """Either would hang a GPU, whose barrier of bulk copies counts phases."""
    source = """
#include "async.cuh"
ENTRY_POINT(rounds, copy)(int expected) {
  BulkCopyBarrier copies = {nullptr, 0, true};
  for (int i = 0; i < expected; i++) expect_bytes(copies, 16);
  wait_for_bulk_copies(copies);
}
"""
    copy = emulated.compile(source, "rounds.cu", ["rounds_copy"]).kernel("rounds_copy")
    copy(1, 32, 1)
    with pytest.raises(KernelError, match=said):
        copy(1, 32, expected)


def test_plain_shared_is_refused(emulated: EmulatedDevice) -> None:
    source = '#include "portable.cuh"\n__global__ void k() { __shared__ float x[3]; x[0] = 0; }\n'
    with pytest.raises(DeviceError, match=r"write SHARED\(type, name, n\)"):
        emulated.compile(source, "plain.cu", [])


def test_float_atomics_are_refused(emulated: EmulatedDevice) -> None:
    source = '#include "portable.cuh"\n__global__ void k(float* x) { atomicAdd(x, 1.0f); }\n'
    with pytest.raises(DeviceError, match=r"atomicAdd"):
        emulated.compile(source, "floats.cu", [])
