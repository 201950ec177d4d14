"""The GPU, through PyCUDA. The only file that imports pycuda, and only when a device is opened."""

import atexit
import contextlib
import importlib
import importlib.util
import re
import struct
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.arithmetic import ceil_div
from cnnlib.device.api import (
    Argument,
    Capability,
    Changing,
    DeviceLimits,
    Event,
    Extent,
    KernelError,
    Resources,
    check_copy,
    check_not_capturing,
    check_part,
    check_view,
    extent,
    plain_arguments,
    shape_tuple,
)
from cnnlib.device.architecture import PROGRAMMATIC_LAUNCHES
from cnnlib.device.cache import cached, content_key, content_of, included_files, kernels_folder
from cnnlib.device.compiler import run_compiler
from cnnlib.device.cuda_graphs import CudaGraph, DriverCalls, bindings_problem
from cnnlib.device.driver import driver_cuda_version, driver_problem, gpu_architecture
from cnnlib.device.toolkit import find_toolkit, nvcc_version, toolkit_problem
from cnnlib.errors import DeviceError, DoesNotFit
from cnnlib.system.machine import usable_cores

_ALIGNMENT = 512  # of the driver's own allocations; sizes are rounded up to it


def missing_parts() -> list[str]:
    """What keeps the cuda device from working here, in words; empty when nothing does."""
    parts = []
    driver, toolkit = driver_problem(), toolkit_problem()
    if driver:
        parts.append(driver)
    if not driver and not toolkit:
        # an nvcc that starts may still lack a C++ compiler, or know nothing of so new a GPU
        toolkit = _trial_problem(find_nvcc(), gpu_architecture())
    if toolkit:
        parts.append(toolkit)
    if importlib.util.find_spec("pycuda") is None:
        parts.append("no PyCUDA (pip install pycuda)")
    return parts


def find_nvcc() -> str | None:
    """The nvcc of the toolkit that is found; cnnlib.device.toolkit documents where."""
    toolkit = find_toolkit()
    return toolkit and toolkit.nvcc


@cache
def _trial_problem(nvcc: str | None, architecture: str) -> str:
    """Why nvcc cannot build a kernel for this GPU; empty when it can."""
    try:
        compile_cubin("__global__ void nothing() {}\n", "trial.cu", architecture)
    except DeviceError as error:
        return f"{nvcc} cannot build for this GPU ({architecture}): {error}"
    return ""


def compile_cubin(source: str, name: str, architecture: str, flags: Sequence[str] = ()) -> bytes:
    """Machine code of `source` for `architecture` (e.g. 'sm_90'); needs nvcc, but no GPU.

    Cached on disk by the content of the source and of what it includes, the flags and nvcc's
    version.
    Raises DeviceError with the compiler's first error.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise DeviceError(f"device cuda: {toolkit_problem()}")
    label = name.replace("\\", "/").replace('"', "'").replace("\n", " ")
    text = f'#line 1 "{label}"\n{source}'
    options = [
        "-cubin",
        f"-arch={architecture}",
        "-O3",
        "-std=c++17",
        "-lineinfo",
        *flags,
    ]
    key = content_key([text, nvcc_version(nvcc), *options], included_files(text))

    def build(path: Path) -> None:
        unit = path.with_suffix(".cu")
        try:
            unit.write_text(text, encoding="utf-8")
            command = [nvcc, *options, "-I", str(kernels_folder()), "-o", path.name, unit.name]
            run_compiler(command, f"module {name}", path.parent)
        finally:
            unit.unlink(missing_ok=True)

    return content_of(cached(key, ".cubin", build))


class CudaArray:
    """An array in the GPU's memory (see api.DeviceArray)."""

    __slots__ = ("_memory", "address", "dtype", "nbytes", "shape", "size")

    letter: ClassVar[str] = "P"
    """The format character of a pointer in PyCUDA's `Function.prepare`."""

    def __init__(
        self,
        memory: "_Memory",
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self._memory = memory
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self.size = prod(shape)
        self.nbytes = self.size * dtype.itemsize

    def check_alive(self) -> None:
        self._device()

    def _device(self, doing: str = "") -> "CudaDevice":
        """The array's device, which must not be capturing where something is done by it."""
        device = self._memory.device
        if device is None:
            raise DeviceError(f"use of a freed device array {self.dtype}{list(self.shape)}")
        if not device.is_open:
            raise DeviceError(f"device array {self.dtype}{list(self.shape)}: its device is closed")
        if doing:
            check_not_capturing(device.captured, doing)
        return device

    def set(self, source: np.ndarray) -> None:
        device = self._device("a copy to the device")
        check_copy("set", self.shape, self.dtype, source)
        if self.nbytes:
            # pageable memory is staged by the driver before the call returns
            contiguous = np.ascontiguousarray(source)
            try:
                device.driver.memcpy_htod_async(self.address, contiguous, device.stream)
            except device.driver.Error as error:
                raise device.failure(f"copying {self.nbytes} bytes to the GPU", error) from error

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        device = self._device("a copy from the device")
        if out is None:
            out = np.empty(self.shape, self.dtype)
        check_copy("get", self.shape, self.dtype, out)
        target = out if out.flags.c_contiguous else np.empty(self.shape, self.dtype)
        if self.nbytes:
            try:
                device.driver.memcpy_dtoh_async(target, self.address, device.stream)
            except device.driver.Error as error:
                raise device.failure(f"copying {self.nbytes} bytes from the GPU", error) from error
        device.synchronize()
        if target is not out:
            np.copyto(out, target)
        return out

    def part(self, start: int, shape: int | Sequence[int]) -> "CudaArray":
        self._device()
        sizes = shape_tuple(shape)
        check_part(sizes, start, prod(sizes), self.size)
        return CudaArray(
            self._memory, self.address + start * self.dtype.itemsize, sizes, self.dtype
        )

    def viewed(self, dtype: DTypeLike) -> "CudaArray":
        self._device()
        kind = np.dtype(dtype)
        check_view(self.dtype, kind)
        return CudaArray(self._memory, self.address, self.shape, kind)

    def fill_bytes(self, value: int = 0xFF) -> None:
        device = self._device("a fill")
        if self.nbytes:
            try:
                device.driver.memset_d8_async(self.address, value, self.nbytes, device.stream)
            except device.driver.Error as error:
                raise device.failure(f"filling {self.nbytes} bytes on the GPU", error) from error

    def free(self) -> None:
        self._memory.free()


class _Memory:
    """One allocation, given back to its device's pool when the last array in it goes."""

    def __init__(self, device: "CudaDevice", nbytes: int) -> None:
        self.device: CudaDevice | None = None
        self.nbytes = max(1, ceil_div(nbytes, _ALIGNMENT)) * _ALIGNMENT
        self.allocation = device.allocate(self.nbytes)
        self.address = int(self.allocation)
        self.device = device

    def free(self) -> None:
        device, self.device = self.device, None
        if device is not None:
            device.recycle(self)

    __del__ = free


class CudaKernel:
    """A kernel on the GPU (see api.Kernel). The first launch decides the kinds of its arguments."""

    def __init__(
        self, device: "CudaDevice", name: str, function: Any, module: "CudaModule"
    ) -> None:
        self.name = name
        self._device = device
        self._function = function
        self._module = module
        self._kinds: str | None = None
        self._sizes: tuple[Extent, Extent] | None = None
        self._grid: tuple[int, int, int] = (1, 1, 1)
        self._block: tuple[int, int, int] = (1, 1, 1)
        # Every kernel may have this much without an attribute that asks for more.
        self._shared_bytes = 48 * 1024

    def __call__(self, grid: Extent, block: Extent, *args: Argument) -> None:
        if self._sizes != (grid, block):
            self._grid = extent(grid, f"kernel {self.name}: grid")
            self._block = extent(block, f"kernel {self.name}: block")
            self._sizes = (grid, block)
        values = self._values(args)
        driver = self._device.driver
        try:
            self._function.prepared_async_call(
                self._grid, self._block, self._device.stream, *values
            )
            self._device.note_launch(args)
        except (driver.Error, self._device.packing_error) as error:
            what = f"kernel {self.name}, grid {self._grid}, block {self._block}"
            raise self._device.failure(what, error) from error

    def bind(
        self,
        grid: Extent,
        block: Extent,
        *args: Argument,
        shared_bytes: int = 0,
        programmatic: bool = False,
    ) -> Callable[[], None]:
        blocks = extent(grid, f"kernel {self.name}: grid")
        threads = extent(block, f"kernel {self.name}: block")
        driver, stream, device = self._device.driver, self._device.stream, self._device
        values = self._values(args)
        changing = [(i, each) for i, each in enumerate(args) if isinstance(each, Changing)]
        if programmatic and device.launches_programmatically:
            if changing:
                raise KernelError(f"kernel {self.name}: a programmatic launch cannot change")
            return self._bind_programmatic(blocks, threads, values, args, shared_bytes)
        try:
            packed = self._device.pack(self._function.arg_format, *values)
            if changing:
                packed = bytearray(packed)
            if shared_bytes > self._shared_bytes:
                attribute = driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._function.set_attribute(attribute, shared_bytes)
                self._shared_bytes = shared_bytes
        except (driver.Error, self._device.packing_error) as error:
            what = f"kernel {self.name}, {shared_bytes} bytes of shared memory"
            raise self._device.failure(what, error) from error
        # prepared_async_call ends in this call; with packing the arguments it takes twice as long.
        launch_kernel = self._function._launch_kernel
        places = [(_offset(self._kinds or "", i), each) for i, each in changing]

        def launch(_kept: Sequence[Argument] = args) -> None:  # so the arrays stay allocated
            if places:
                check_not_capturing(device.captured, "a launch whose arguments change")
                for offset, argument in places:
                    struct.pack_into("i", packed, offset, argument.value)
            try:
                launch_kernel(blocks, threads, packed, shared_bytes, stream)
            except driver.Error as error:
                what = f"kernel {self.name}, grid {blocks}, block {threads}"
                raise self._device.failure(what, error) from error
            device.note_launch(_kept)

        return launch

    def _bind_programmatic(
        self,
        blocks: tuple[int, int, int],
        threads: tuple[int, int, int],
        values: Sequence[int | float],
        args: Sequence[Argument],
        shared_bytes: int,
    ) -> Callable[[], None]:
        device, calls = self._device, self._device.driver_calls()
        function = self._module.handle(self.name, shared_bytes)
        launch_kernel = calls.programmatic_launch(
            function,
            blocks,
            threads,
            shared_bytes,
            int(device.stream.handle),
            self._kinds or "",
            values,
        )

        def launch() -> None:
            launch_kernel()
            device.note_launch(args)

        return launch

    def _values(self, args: Sequence[Argument]) -> list[int | float]:
        """Arguments as plain numbers; the first launch fixes their kinds."""
        kinds, values = plain_arguments(self.name, args, CudaArray)
        if kinds != self._kinds:
            if self._kinds is not None:
                raise KernelError(
                    f"kernel {self.name}: arguments of kinds {kinds}, at its first launch "
                    f"{self._kinds} (P array, i int, f float)"
                )
            self._function.prepare(kinds)
            self._kinds = kinds
        return values

    def resources(self) -> Resources | None:
        function = self._function
        return Resources(function.num_regs, function.shared_size_bytes, function.local_size_bytes)


def _offset(kinds: str, argument: int) -> int:
    """Bytes before an argument of a kernel, whose arguments lie as they do in a C struct."""
    return struct.calcsize(kinds[: argument + 1]) - struct.calcsize(kinds[argument])


class CudaModule:
    """A cubin on the GPU (see api.Module)."""

    def __init__(self, device: "CudaDevice", name: str, module: Any, cubin: bytes) -> None:
        self.name = name
        self._device = device
        self._module = module
        self._cubin = cubin
        self._handle: Any = None
        self._kernels: dict[str, CudaKernel] = {}

    def kernel(self, name: str) -> CudaKernel:
        if name not in self._kernels:
            try:
                function = self._module.get_function(name)
            except self._device.driver.Error as error:
                raise DeviceError(f"module {self.name} has no kernel {name}: {error}") from error
            self._kernels[name] = CudaKernel(self._device, name, function, self)
        return self._kernels[name]

    def handle(self, name: str, shared_bytes: int) -> Any:
        """A kernel as cuda-bindings knows it."""
        calls = self._device.driver_calls()
        if self._handle is None:
            self._handle = calls.load_module(self._cubin)
        return calls.function(self._handle, name, shared_bytes)


class CudaEvent:
    """A CUDA event on the device's stream (see api.Event)."""

    def __init__(self, device: "CudaDevice") -> None:
        self._device = device
        try:
            self._event = device.driver.Event()
        except device.driver.Error as error:
            raise device.failure("making an event", error) from error
        self._recorded = False

    def record(self) -> None:
        check_not_capturing(self._device.captured, "an event")
        try:
            self._event.record(self._device.stream)
        except self._device.driver.Error as error:
            raise self._device.failure("recording an event", error) from error
        self._recorded = True

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, CudaEvent):
            raise DeviceError("event: the earlier event is of another device")
        if not (self._recorded and earlier._recorded):
            raise DeviceError("event: seconds_since before record")
        self._device.wait_for(self._event)
        try:
            return float(self._event.time_since(earlier._event)) * 1e-3
        except self._device.driver.Error as error:
            raise self._device.failure("timing by events", error) from error


class CudaDevice:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves (see api.Device).

    Raises DeviceError saying which of driver, toolkit and PyCUDA is missing. Freed memory is kept
    for arrays of the same size, and handed back to the driver when something else does not fit.
    Networks are laid out for `limits`, if given, instead of the GPU's own.
    """

    kind = "cuda"

    def __init__(self, limits: DeviceLimits | None = None) -> None:
        missing = missing_parts()
        if missing:
            raise DeviceError(f"device cuda does not work here: {'; '.join(missing)}")
        try:
            driver: Any = importlib.import_module("pycuda.driver")
        except ImportError as error:
            raise DeviceError(f"device cuda: PyCUDA does not load: {error}") from error
        self.driver = driver
        packing: Any = importlib.import_module("pycuda._pvt_struct")
        self.pack, self.packing_error = packing.pack, packing.error
        self.is_open = False
        self.captured: list[object] | None = None
        """What the launches need that `capture` has got so far, while it works."""
        self._driver_calls: DriverCalls | None = None
        try:
            driver.init()
            gpu = driver.Device(0)
            self._context: Any = gpu.retain_primary_context()
            self._context.push()
        except driver.Error as error:
            raise DeviceError(f"device cuda: the GPU cannot be used: {error}") from error
        self.is_open = True
        self.name: str = gpu.name()
        self.pci_bus_id: str | None = gpu.pci_bus_id()
        self.multiprocessors: int = gpu.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT)
        self.shared_bytes: int = gpu.get_attribute(
            driver.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        )
        major, minor = gpu.compute_capability()
        self.architecture = f"sm_{major}{minor}"
        self.launches_programmatically = (major, minor) >= PROGRAMMATIC_LAUNCHES.since
        self.capability: Capability = (major, minor)
        if limits is not None:
            _, self.multiprocessors, self.shared_bytes, self.capability = limits
        self.built = f"nvcc -arch={self.architecture}"
        self.stream: Any = driver.Stream()
        self._taken = 0
        self._pool: dict[int, list[Any]] = {}
        self._modules: dict[str, CudaModule] = {}
        # A context left on the stack makes PyCUDA abort the process when it ends.
        reference = weakref.ref(self)

        def close_at_exit() -> None:
            device = reference()
            if device is not None:
                device.close()

        self._at_exit = atexit.register(close_at_exit)

    def array(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> CudaArray:
        check_not_capturing(self.captured, "a new array")
        sizes, kind = shape_tuple(shape), np.dtype(dtype)
        memory = _Memory(self, prod(sizes) * kind.itemsize)
        result = CudaArray(memory, memory.address, sizes, kind)
        result.fill_bytes()
        return result

    def pinned(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> np.ndarray:
        sizes, kind = shape_tuple(shape), np.dtype(dtype)
        if not prod(sizes):
            return np.empty(sizes, kind)
        try:
            result: np.ndarray = self.driver.pagelocked_empty(sizes, kind)
        except (self.driver.Error, MemoryError) as error:
            what = f"{prod(sizes) * kind.itemsize} bytes of page-locked memory wanted"
            raise self.failure(what, error) from error
        return result

    def compile(
        self, source: str, name: str, kernels: Sequence[str], flags: Sequence[str] = ()
    ) -> CudaModule:
        key = content_key([source, *flags], included_files(source))
        if key not in self._modules:
            cubin = compile_cubin(source, name, self.architecture, flags)
            try:
                module = CudaModule(self, name, self.driver.module_from_buffer(cubin), cubin)
            except self.driver.Error as error:
                raise DeviceError(
                    f"module {name} does not load on {self.name}: {error}{newer_toolkit()}"
                ) from error
            self._modules[key] = module
        module = self._modules[key]
        for kernel in kernels:
            module.kernel(kernel)
        return module

    def precompile(self, sources: Sequence[str], name: str, kernels: Sequence[str]) -> None:
        del kernels  # of a loaded module; only this thread can load one
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(lambda text: compile_cubin(text, name, self.architecture), sources))

    def synchronize(self) -> None:
        self.wait_for(self.stream)

    def driver_calls(self) -> DriverCalls:
        """The calls that PyCUDA lacks. Raises DeviceError where cuda-bindings is missing."""
        if self._driver_calls is None:
            self._driver_calls = DriverCalls()
        return self._driver_calls

    def capture_problem(self) -> str:
        return bindings_problem()

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        check_not_capturing(self.captured, "a capture")
        calls, stream = self.driver_calls(), int(self.stream.handle)
        calls.begin_capture(stream)
        captured: list[object] = []
        self.captured = captured
        try:
            work()
        except BaseException:
            with contextlib.suppress(DeviceError):  # the first error says what is wrong
                calls.end_capture(stream)
            raise
        finally:
            self.captured = None
        return CudaGraph(self, calls.instantiate(calls.end_capture(stream)), captured)

    def note_launch(self, needs: object) -> None:
        """Keep what a launch needs for as long as the graph that it is captured in."""
        if self.captured is not None:
            self.captured.append(needs)

    def wait_for(self, thing: Any) -> None:
        """Synchronise with a stream or an event; what failed since is raised as by `failure`."""
        check_not_capturing(self.captured, "waiting for the device")
        try:
            thing.synchronize()
        except self.driver.Error as error:
            raise self.failure("what was launched before has failed", error) from error

    def failure(self, what: str, error: Exception) -> DeviceError:
        """PyCUDA's error as one of ours: DoesNotFit where memory ran out, or else KernelError.

        Calls do not wait for the GPU, so that any later one may report a kernel's fault or a GPU
        that is lost.
        """
        out_of_memory = isinstance(error, (self.driver.MemoryError, MemoryError))
        return (DoesNotFit if out_of_memory else KernelError)(f"device cuda: {what}: {error}")

    def event(self) -> CudaEvent:
        return CudaEvent(self)

    def free_bytes(self) -> int:
        pooled = sum(size * len(blocks) for size, blocks in self._pool.items())
        try:
            return int(self.driver.mem_get_info()[0]) + pooled
        except self.driver.Error as error:
            raise self.failure("asking for free memory", error) from error

    def used_bytes(self) -> int:
        return self._taken

    def allocate(self, nbytes: int) -> Any:
        """`nbytes` of device memory, from the pool or the driver. Raises DoesNotFit."""
        kept = self._pool.get(nbytes)
        allocation = kept.pop() if kept else self._allocate_anew(nbytes)
        self._taken += nbytes
        return allocation

    def _allocate_anew(self, nbytes: int) -> Any:
        try:
            try:
                return self.driver.mem_alloc(nbytes)
            except self.driver.MemoryError:
                self._release_pool()
                return self.driver.mem_alloc(nbytes)
        except self.driver.MemoryError as error:
            raise DoesNotFit(
                f"device cuda: {nbytes} bytes wanted, {self.free_bytes()} free on {self.name}"
            ) from error
        except self.driver.Error as error:
            raise self.failure(f"{nbytes} bytes wanted", error) from error

    def recycle(self, memory: _Memory) -> None:
        """Keep freed memory. Whoever gets it next comes later in the one stream."""
        self._taken -= memory.nbytes
        if self.is_open:
            self._pool.setdefault(memory.nbytes, []).append(memory.allocation)

    def _release_pool(self) -> None:
        self.synchronize()
        for blocks in self._pool.values():
            for allocation in blocks:
                allocation.free()
        self._pool.clear()

    def close(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        atexit.unregister(self._at_exit)
        # after a kernel's fault every call fails, and there is nothing left to save
        with contextlib.suppress(DeviceError, self.driver.Error):
            self._release_pool()
        self._pool.clear()
        self._modules.clear()
        with contextlib.suppress(self.driver.Error):
            self._context.pop()
            # left to its destructor, PyCUDA would take a primary context for one it has made
            self._context.detach()
        self._context = self.stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def newer_toolkit() -> str:
    """'; nvcc ... is newer than the driver ...', which then refuses its code; else nothing."""
    nvcc, newest = find_nvcc(), driver_cuda_version()
    try:
        release = re.search(r"release (\d+)\.(\d+)", nvcc_version(nvcc) if nvcc else "")
    except DeviceError:
        return ""
    if newest is None or release is None or int(release[1]) <= newest[0]:
        return ""
    return (
        f"; {nvcc} is of CUDA {release[1]}.{release[2]}, newer than the driver, which takes code of"
        f" CUDA {newest[0]}.{newest[1]} and older: install a newer driver, or set CUDA_HOME to an "
        "older toolkit"
    )
