"""What PyCUDA raises, as errors of ours, with a driver that is none: a GPU that is lost, no memory.

So are the failures of cuda-bindings. Here calls of both only take note of what they are given;
tests/device/test_device.py and test_graphs.py have a GPU do them.
"""

import ctypes
import struct
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cnnlib.device import KernelError, cuda, cuda_graphs
from cnnlib.errors import DeviceError, DoesNotFit

LOST = "GPU is lost"


class Driver(ModuleType):
    """Replaces pycuda.driver; every call named in `broken` raises the error given there."""

    class Error(Exception):
        pass

    # as in PyCUDA, both are Errors, and neither is Python's
    class MemoryError(Error):
        pass

    class LogicError(Error):
        pass

    device_attribute = SimpleNamespace(MULTIPROCESSOR_COUNT=0, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=1)
    function_attribute = SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES=2)

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.broken: dict[str, Exception] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.do(name)

    def do(self, name: str) -> Any:
        self.calls.append(name)
        if error := self.broken.get(name, self.broken.get("*")):
            raise error
        return {"mem_get_info": (1000, 2000), "mem_alloc": Allocation(self)}.get(
            name, Thing(self, name)
        )


class Thing:
    """Whatever a call gave, with methods that are calls again: `Stream.synchronize`."""

    arg_format = "P"
    handle = 7

    def __init__(self, driver: Driver, name: str) -> None:
        self._driver, self._name = driver, name

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self._driver.do(f"{self._name}.{method}")

    def compute_capability(self) -> tuple[int, int]:
        return 9, 0

    def __float__(self) -> float:
        return 1.0


class Allocation(Thing):
    def __init__(self, driver: Driver) -> None:
        super().__init__(driver, "allocation")

    def __int__(self) -> int:
        return 4096


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    packing = ModuleType("pycuda._pvt_struct")
    packing.pack, packing.error = struct.pack, struct.error  # type: ignore[attr-defined]
    for name, module in (("driver", made), ("_pvt_struct", packing)):
        monkeypatch.setitem(sys.modules, f"pycuda.{name}", module)
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
    monkeypatch.setattr(cuda, "missing_parts", list)
    monkeypatch.setattr(cuda, "compile_cubin", lambda *arguments: b"")
    return made


@pytest.fixture
def device(driver: Driver) -> Iterator[cuda.CudaDevice]:
    with cuda.CudaDevice() as opened:
        yield opened


def kernel(device: cuda.CudaDevice) -> cuda.CudaKernel:
    return device.compile("", "some.cu", ["k"]).kernel("k")


# What is done, and the call of PyCUDA in which it fails.
CALLS: dict[str, tuple[Callable[[cuda.CudaDevice], Any], str]] = {
    "allocate": (lambda d: d.array(3), "mem_alloc"),
    "fill": (lambda d: d.array(3), "memset_d8_async"),
    "to the GPU": (lambda d: d.array(3).set(np.zeros(3, np.float32)), "memcpy_htod_async"),
    "from the GPU": (lambda d: d.array(3).get(), "memcpy_dtoh_async"),
    "wait for a copy": (lambda d: d.array(3).get(), "Stream.synchronize"),
    "wait": (lambda d: d.synchronize(), "Stream.synchronize"),
    "pinned": (lambda d: d.pinned(3), "pagelocked_empty"),
    "free memory": (lambda d: d.free_bytes(), "mem_get_info"),
    "launch": (
        lambda d: kernel(d)(1, 1, d.array(3)),
        "module_from_buffer.get_function.prepared_async_call",
    ),
    "bind": (
        lambda d: kernel(d).bind(1, 1, d.array(3), shared_bytes=2**17),
        "module_from_buffer.get_function.set_attribute",
    ),
    "bound launch": (
        lambda d: kernel(d).bind(1, 1, d.array(3))(),
        "module_from_buffer.get_function._launch_kernel",
    ),
    "event": (lambda d: d.event(), "Event"),
    "record": (lambda d: d.event().record(), "Event.record"),
    "time": (lambda d: elapsed(d), "Event.time_since"),
}


def forget(device: cuda.CudaDevice) -> None:
    """What would be taken from before, so that PyCUDA would not be called."""
    device._pool.clear()
    device._modules.clear()


def elapsed(device: cuda.CudaDevice) -> float:
    first, second = device.event(), device.event()
    first.record()
    second.record()
    return second.seconds_since(first)


@pytest.mark.parametrize("what", CALLS)
def test_a_gpu_that_disappears_is_an_error_of_ours(
    driver: Driver, device: cuda.CudaDevice, what: str
) -> None:
    do, call = CALLS[what]
    do(device)
    driver.broken[call] = driver.LogicError(f"{call} failed: {LOST}")
    forget(device)
    with pytest.raises(KernelError, match=f"^device cuda: .*: .* failed: {LOST}"):
        do(device)
    assert driver.calls[-1] == call


@pytest.mark.parametrize("what", CALLS)
def test_memory_that_runs_out_in_the_middle_does_not_fit(
    driver: Driver, device: cuda.CudaDevice, what: str
) -> None:
    do, call = CALLS[what]
    do(device)
    driver.broken[call] = driver.MemoryError(f"{call} failed: out of memory")
    forget(device)
    with pytest.raises(DoesNotFit, match="^device cuda: .*(out of memory|wanted, 1000 free on)"):
        do(device)


def test_only_what_changes_is_packed_anew(
    driver: Driver, device: cuda.CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def launch_kernel(grid: object, block: object, packed: bytes, *rest: object) -> None:
        sent.append(struct.unpack("PifPi", packed))

    monkeypatch.setattr(Thing, "arg_format", "PifPi")
    monkeypatch.setattr(Thing, "_launch_kernel", staticmethod(launch_kernel), raising=False)
    first, last = cuda.Changing(1), cuda.Changing()
    launch = kernel(device).bind(1, 1, device.array(3), first, 0.5, device.array(3), last)
    launch()
    first.value, last.value = -2, 7
    launch()
    assert sent == [(4096, 1, 0.5, 4096, 0), (4096, -2, 0.5, 4096, 7)]


def test_memory_kept_for_later_is_given_back_first(driver: Driver, device: cuda.CudaDevice) -> None:
    device.array(3).free()
    driver.broken["mem_alloc"] = driver.MemoryError("out of memory")
    with pytest.raises(DoesNotFit, match="bytes wanted"):
        device.array(3000)
    assert driver.calls.count("allocation.free") == 1


def test_a_gpu_that_is_lost_while_memory_is_given_back(
    driver: Driver, device: cuda.CudaDevice
) -> None:
    device.array(3).free()
    driver.broken["mem_alloc"] = driver.MemoryError("out of memory")
    driver.broken["allocation.free"] = driver.LogicError(LOST)
    with pytest.raises(KernelError, match=LOST):
        device.array(3000)


def test_a_lost_gpu_can_be_closed(driver: Driver) -> None:
    device = cuda.CudaDevice()
    kept, freed = device.array(3), device.array(4)
    freed.free()
    driver.broken["*"] = driver.LogicError(LOST)
    device.close()
    assert not device.is_open
    kept.free()


def test_a_gpu_that_cannot_be_opened(driver: Driver) -> None:
    driver.broken["Device.retain_primary_context"] = driver.LogicError(LOST)
    with pytest.raises(DeviceError, match=f"the GPU cannot be used: {LOST}"):
        cuda.CudaDevice()


def test_code_that_the_driver_refuses(
    driver: Driver, device: cuda.CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "newer_toolkit", lambda: "; nvcc is newer than the driver")
    driver.broken["module_from_buffer"] = driver.LogicError("invalid image")
    with pytest.raises(
        DeviceError, match="some.cu does not load on .*: invalid image; nvcc is newer"
    ):
        kernel(device)


class Bindings(ModuleType):
    """Replaces cuda.bindings.driver: a call gives a status and what it makes, and is recorded."""

    CUlaunchConfig = CUlaunchAttribute = staticmethod(
        lambda: SimpleNamespace(value=SimpleNamespace())
    )
    CUstream = int
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.broken: dict[str, str] = {}
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            error = self.broken.get(name, "")
            return SimpleNamespace(value=len(error), name=error or "CUDA_SUCCESS"), f"from {name}"

        return call


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    made = Bindings()
    monkeypatch.setattr(cuda_graphs, "bindings_problem", str)
    for name, module in (("cuda", ModuleType("cuda")), ("cuda.bindings", ModuleType("bindings"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    return made


def programmatic(device: cuda.CudaDevice) -> Callable[[], None]:
    return kernel(device).bind(5, (8, 4), device.array(3), shared_bytes=2**17, programmatic=True)


# Every call that making and launching a graph of a programmatic launch takes.
GRAPH_CALLS = (
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuStreamBeginCapture",
    "cuLaunchKernelEx",
    "cuStreamEndCapture",
    "cuGraphInstantiate",
    "cuGraphDestroy",
    "cuGraphUpload",
    "cuGraphLaunch",
)


def test_a_graph_of_a_programmatic_launch(device: cuda.CudaDevice, bindings: Bindings) -> None:
    launch = programmatic(device)
    device.capture(launch).launch()
    assert tuple(name for name, *_ in bindings.calls[:10]) == GRAPH_CALLS
    given = {name: arguments for name, *arguments in bindings.calls}
    assert given["cuStreamBeginCapture"][0] == given["cuGraphLaunch"][1] == 7
    assert given["cuGraphInstantiate"][0] == given["cuGraphDestroy"][0] == "from cuStreamEndCapture"
    assert given["cuGraphLaunch"][0] == "from cuGraphInstantiate"
    config, function, pointers, _ = given["cuLaunchKernelEx"]
    assert function == "from cuModuleGetFunction"
    assert (config.gridDimX, config.blockDimX, config.blockDimY, config.hStream) == (5, 8, 4, 7)
    assert config.sharedMemBytes == given["cuFuncSetAttribute"][2] == 2**17
    assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    address = ctypes.c_void_p.from_address(pointers).value
    assert address
    assert ctypes.c_uint64.from_address(address).value == 4096
    assert bindings.calls[10:] == [("cuGraphExecDestroy", "from cuGraphInstantiate")]


@pytest.mark.parametrize("call", GRAPH_CALLS)
def test_a_graph_that_fails_leaves_the_device_as_it_was(
    device: cuda.CudaDevice, bindings: Bindings, call: str
) -> None:
    bindings.broken[call] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(DoesNotFit, match=f"^device cuda: {call} failed: CUDA_ERROR_OUT_OF_MEMORY"):
        device.capture(programmatic(device)).launch()
    names = [name for name, *_ in bindings.calls]
    captured = names.count("cuStreamBeginCapture") - (call == "cuStreamBeginCapture")
    assert names.count("cuStreamEndCapture") == captured
    bindings.broken.clear()
    device.array(3).get()
    device.capture(programmatic(device)).launch()


def test_a_gpu_before_compute_capability_9_launches_as_ever(
    driver: Driver, bindings: Bindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Thing, "compute_capability", lambda self: (8, 0))
    with cuda.CudaDevice() as device:
        programmatic(device)()
    assert not bindings.calls
    assert "module_from_buffer.get_function._launch_kernel" in driver.calls


def test_a_graph_without_cuda_bindings(
    device: cuda.CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    missing = r"no cuda-bindings \(pip install cuda-bindings\)"
    with pytest.raises(DeviceError, match=missing):
        device.capture(lambda: None)
    with pytest.raises(DeviceError, match=missing):
        programmatic(device)
    assert device.capture_problem() == "no cuda-bindings (pip install cuda-bindings)"
