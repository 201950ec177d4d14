"""A GPU emulated on the CPU: kernels built by a C++ compiler, one fiber for each CUDA thread.

Settings, all from the environment:
  CXX                      the compiler (default: g++, clang++ or c++ from PATH)
  CNNLIB_CACHE             folder of compiled code (default: .cache/cnnlib in the home folder, or a
                           temporary one where that cannot be used)
  CNNLIB_KERNELS           folder of kernel sources (default: kernels/ of the checkout)
  CNNLIB_EMULATED_THREADS  OS threads that share a launch's blocks (default: the usable cores)
  CNNLIB_EMULATED_MEMORY   bytes that arrays may take (default: what is free when it is opened)
  CNNLIB_FIBER_ORDER       forward or reverse: the order in which blocks and their threads run
  CNNLIB_OPTIMIZE          0 to 3: the compiler's level of optimisation (default: 3)
  CNNLIB_SANITIZE          address,undefined: see `compiler.sanitizer_environment`
  CNNLIB_WATCH             1: count the bytes that kernels read and write, and look for accesses
                           outside arrays and for races, on one OS thread

Earlier versions called the second pair CNNLIB_HOST_THREADS and CNNLIB_HOST_MEMORY; both still work.
"""

import ctypes
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.device.api import (
    Argument,
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
from cnnlib.device.architecture import H100
from cnnlib.device.cache import cached, content_key, included_files, kernels_folder
from cnnlib.device.cache_folder import REMEDY, cache_folder, check_executable
from cnnlib.device.compiler import (
    Compiler,
    compile_flags,
    find_compiler,
    native_target,
    run_compiler,
    sanitizers,
)
from cnnlib.device.source import with_launchers
from cnnlib.device.watched import Watched, link_flags, note_launch
from cnnlib.errors import DeviceError, DoesNotFit
from cnnlib.system.cgroups import memory_left
from cnnlib.system.machine import cpu_name, usable_cores

FIBER_ORDERS = ("forward", "reverse")

# Kinds of kernel arguments, one letter each, as kernels/emulated/threads.hpp knows them.
_ARRAY_LETTERS = {
    "float32": "F",
    "float64": "D",
    "int32": "I",
    "uint32": "U",
    "int8": "b",
    "uint8": "B",
    "int16": "h",
    "uint16": "H",
    "int64": "L",
    "uint64": "Q",
}
_MESSAGE_BYTES = 512
# LARGE_LIMIT of kernels/emulated/runtime.cpp
_SHARED_BYTES = H100.shared_bytes


class _Launch(ctypes.Structure):
    """EmulatedLaunch of kernels/emulated/threads.hpp."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("body", ctypes.c_void_p),
        ("arguments", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("reverse", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("message", ctypes.c_void_p),
        ("shared_bytes", ctypes.c_size_t),
        ("programmatic", ctypes.c_int),
    )


class _Memory:
    """One block of memory, given back when the last array in it goes."""

    def __init__(self, device: "EmulatedDevice", nbytes: int) -> None:
        self.device: EmulatedDevice | None = None
        address = device.runtime.emulated_allocate(max(nbytes, 1))
        if not address:
            raise DoesNotFit(
                f"device emulated: {nbytes} bytes wanted, {device.free_bytes()} free: "
                "the machine gave none"
            )
        self.address: int = address
        self.nbytes = nbytes
        self.device = device
        device.taken += nbytes

    def free(self) -> None:
        device, self.device = self.device, None
        if device is not None:
            device.taken -= self.nbytes
            device.runtime.emulated_free(self.address)

    __del__ = free


class EmulatedArray:
    """An array in main memory (see api.DeviceArray)."""

    __slots__ = (
        "_memory",
        "_values",
        "address",
        "dtype",
        "letter",
        "nbytes",
        "shape",
        "size",
    )

    def __init__(
        self,
        memory: _Memory,
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
        self.letter = _ARRAY_LETTERS.get(dtype.name, "*")
        # `memory` outlives this view, which is never handed out
        buffer = (ctypes.c_char * self.nbytes).from_address(address)
        self._values: np.ndarray = np.ndarray(shape, dtype, buffer=memoryview(buffer))

    def check_alive(self) -> None:
        self._device()

    def _device(self, doing: str = "") -> "EmulatedDevice":
        """The array's device, which must not be capturing where something is done by it."""
        device = self._memory.device
        if device is None:
            raise DeviceError(f"use of a freed device array {self.dtype}{list(self.shape)}")
        if doing:
            check_not_capturing(device.captured, doing)
        return device

    def set(self, source: np.ndarray) -> None:
        self._device("a copy to the device")
        check_copy("set", self.shape, self.dtype, source)
        np.copyto(self._values, source)

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        self._device("a copy from the device")
        if out is None:
            return self._values.copy()
        check_copy("get", self.shape, self.dtype, out)
        np.copyto(out, self._values)
        return out

    def part(self, start: int, shape: int | Sequence[int]) -> "EmulatedArray":
        self.check_alive()
        sizes = shape_tuple(shape)
        check_part(sizes, start, prod(sizes), self.size)
        return EmulatedArray(
            self._memory, self.address + start * self.dtype.itemsize, sizes, self.dtype
        )

    def viewed(self, dtype: DTypeLike) -> "EmulatedArray":
        self.check_alive()
        kind = np.dtype(dtype)
        check_view(self.dtype, kind)
        return EmulatedArray(self._memory, self.address, self.shape, kind)

    def fill_bytes(self, value: int = 0xFF) -> None:
        self._device("a fill")
        ctypes.memset(self.address, value, self.nbytes)

    def free(self) -> None:
        self._memory.free()


class EmulatedKernel:
    """A kernel of a shared library (see api.Kernel). A launch returns when it is done."""

    def __init__(self, device: "EmulatedDevice", name: str, function: Any) -> None:
        self.name = name
        self._device = device
        self._function = function
        self._lock = threading.Lock()
        self._message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        self._launch = self._new_launch()
        self._pointer = ctypes.byref(self._launch)
        self._sizes: tuple[Extent, Extent] | None = None
        self._packers: dict[str, tuple[struct.Struct, bytes]] = {}

    def __call__(self, grid: Extent, block: Extent, *args: Argument) -> None:
        if self._device.captured is not None:
            self.bind(grid, block, *args)()
            return
        packed, letters = self._pack(args)
        with self._lock:  # the launch gives the interpreter free, and another thread may come
            if self._sizes != (grid, block):
                self._launch.grid = extent(grid, f"kernel {self.name}: grid")
                self._launch.block = extent(block, f"kernel {self.name}: block")
                self._sizes = (grid, block)
            self._launch.arguments = packed
            self._call(self._pointer, letters)

    def _call(self, pointer: Any, letters: bytes) -> None:
        failed = self._function(pointer, letters)
        if self._device.watches:
            note_launch(self._device.runtime, self._device.watched, self.name)
        if failed:
            raise KernelError(self._message.value.decode(errors="replace"))

    def bind(
        self,
        grid: Extent,
        block: Extent,
        *args: Argument,
        shared_bytes: int = 0,
        programmatic: bool = False,
    ) -> Callable[[], None]:
        packed, letters = self._pack(args)
        launch = self._new_launch()
        launch.grid = extent(grid, f"kernel {self.name}: grid")
        launch.block = extent(block, f"kernel {self.name}: block")
        launch.shared_bytes = shared_bytes
        launch.programmatic = programmatic
        launch.arguments = packed
        arrays = [argument for argument in args if isinstance(argument, EmulatedArray)]
        call, pointer, lock = self._call, ctypes.byref(launch), self._lock
        device = self._device
        changes = any(isinstance(argument, Changing) for argument in args)
        if changes and programmatic:
            raise KernelError(f"kernel {self.name}: a programmatic launch cannot change")

        def run() -> None:
            for array in arrays:
                array.check_alive()
            with lock:
                if changes:
                    launch.arguments, _ = self._pack(args)
                call(pointer, letters)

        def run_or_capture() -> None:
            if changes:
                check_not_capturing(device.captured, "a launch whose arguments change")
            if device.captured is None:
                run()
            else:
                device.captured.append(run)

        return run_or_capture

    def _new_launch(self) -> _Launch:
        return _Launch(
            kernel=self.name.encode(),
            message=ctypes.addressof(self._message),
            reverse=self._device.fiber_order == "reverse",
            workers=self._device.multiprocessors,
        )

    def _pack(self, args: Sequence[Argument]) -> tuple[bytes, bytes]:
        """The arguments in slots of 8 bytes, and a letter for each one's kind."""
        letters, values = plain_arguments(self.name, args, EmulatedArray)
        packer = self._packers.get(letters)
        if packer is None:
            slots = {"i": "i4x", "f": "f4x"}
            layout = "<" + "".join(slots.get(letter, "Q") for letter in letters)
            packer = self._packers[letters] = (struct.Struct(layout), letters.encode())
        try:
            return packer[0].pack(*values), packer[1]
        except (struct.error, OverflowError) as error:
            raise KernelError(f"kernel {self.name}: arguments {values}: {error}") from error

    def resources(self) -> Resources | None:
        return None


class EmulatedModule:
    """A shared library of kernels (see api.Module)."""

    def __init__(self, device: "EmulatedDevice", name: str, library: ctypes.CDLL) -> None:
        self.name = name
        self._device = device
        self._library = library
        self._kernels: dict[str, EmulatedKernel] = {}

    def kernel(self, name: str) -> EmulatedKernel:
        if name not in self._kernels:
            try:
                function = getattr(self._library, f"launch_{name}")
            except AttributeError:
                raise DeviceError(
                    f"module {self.name} was compiled without kernel {name}"
                ) from None
            function.restype = ctypes.c_int
            function.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
            self._kernels[name] = EmulatedKernel(self._device, name, function)
        return self._kernels[name]


class EmulatedGraph:
    """Bound launches, made again one after another (see api.Graph)."""

    def __init__(self, device: "EmulatedDevice", launches: Sequence[Callable[[], None]]) -> None:
        self.launches = len(launches)
        self._device, self._launches = device, tuple(launches)

    def launch(self) -> None:
        check_not_capturing(self._device.captured, "a graph")
        for launch in self._launches:
            launch()


class EmulatedEvent:
    """A moment of the monotonic clock (see api.Event)."""

    def __init__(self, device: "EmulatedDevice") -> None:
        self._device = device
        self._nanoseconds: int | None = None

    def record(self) -> None:
        check_not_capturing(self._device.captured, "an event")
        self._nanoseconds = time.perf_counter_ns()

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, EmulatedEvent):
            raise DeviceError("event: the earlier event is of another device")
        if self._nanoseconds is None or earlier._nanoseconds is None:
            raise DeviceError("event: seconds_since before record")
        return (self._nanoseconds - earlier._nanoseconds) * 1e-9


def emulated_threads() -> int:
    """OS threads that share a launch's blocks, where nothing else is asked for."""
    return _positive("CNNLIB_EMULATED_THREADS") or usable_cores()


def emulated_limits() -> DeviceLimits:
    """The limits of an EmulatedDevice, known without a compiler."""
    return DeviceLimits("emulated", emulated_threads(), _SHARED_BYTES, H100.capability)


class EmulatedDevice:
    """The machine's processor (see api.Device). Raises DeviceError when there is no compiler.

    fiber_order: 'forward' or 'reverse' (default: $CNNLIB_FIBER_ORDER, else forward)
    threads: OS threads that share a launch's blocks (default: $CNNLIB_EMULATED_THREADS, else the
        cores)
    memory: bytes that arrays may take (default: $CNNLIB_EMULATED_MEMORY, else what is free now)
    limits: the sizes that networks are laid out for (default: `threads`, and what an H100 has)
    """

    kind = "emulated"

    def __init__(
        self,
        fiber_order: str | None = None,
        threads: int | None = None,
        memory: int | None = None,
        limits: DeviceLimits | None = None,
    ) -> None:
        order = fiber_order or os.environ.get("CNNLIB_FIBER_ORDER") or "forward"
        if order not in FIBER_ORDERS:
            raise DeviceError(
                f"unknown fiber order '{order}' (CNNLIB_FIBER_ORDER); "
                f"known: {', '.join(FIBER_ORDERS)}"
            )
        self.fiber_order = order
        self.pci_bus_id: str | None = None
        self.shared_bytes = limits.shared_bytes if limits else _SHARED_BYTES
        self.multiprocessors = limits.multiprocessors if limits else threads or emulated_threads()
        self.capability = limits.capability if limits else H100.capability
        self.memory = memory or _positive("CNNLIB_EMULATED_MEMORY") or available_memory()
        self.watches = os.environ.get("CNNLIB_WATCH", "") == "1"
        self.watched: dict[str, Watched] = {}
        """What each kernel has read and written, where that is watched."""
        self._sanitize = sanitizers()
        self._compiler = find_compiler()
        self._flags = compile_flags(self._compiler, self._sanitize)
        _check_sanitizer_loaded(self._sanitize)
        self.built = " ".join([self._compiler.label, *self._flags])
        self.taken = 0
        self.captured: list[Callable[[], None]] | None = None
        """What `capture` has got so far, while it works."""
        self.name = f"{cpu_name()} (kernels built by {self._compiler.label})"
        self._modules: dict[str, EmulatedModule] = {}
        self.runtime = self._load_runtime()

    def array(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> EmulatedArray:
        check_not_capturing(self.captured, "a new array")
        sizes, kind = shape_tuple(shape), np.dtype(dtype)
        nbytes = prod(sizes) * kind.itemsize
        if nbytes > self.free_bytes():
            raise DoesNotFit(
                f"device emulated: {nbytes} bytes wanted, {self.free_bytes()} of {self.memory} free"
            )
        memory = _Memory(self, nbytes)
        result = EmulatedArray(memory, memory.address, sizes, kind)
        result.fill_bytes()
        return result

    def pinned(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> np.ndarray:
        return np.empty(shape_tuple(shape), dtype)

    def compile(
        self, source: str, name: str, kernels: Sequence[str], flags: Sequence[str] = ()
    ) -> EmulatedModule:
        text = with_launchers(source, name, kernels)
        if self.watches:
            flags = (*flags, *link_flags(self._compiler.is_clang))
        flags = (*self._flags, *flags)
        key = self._key(text, flags)
        if key not in self._modules:

            def build(path: Path) -> None:
                self._build(text, f"module {name}", path, flags)

            library = _load(cached(key, ".so", build), ctypes.RTLD_LOCAL)
            self._modules[key] = EmulatedModule(self, name, library)
        return self._modules[key]

    def precompile(self, sources: Sequence[str], name: str, kernels: Sequence[str]) -> None:
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(lambda source: self.compile(source, name, kernels), sources))

    def synchronize(self) -> None:
        check_not_capturing(self.captured, "waiting for the device")

    def event(self) -> EmulatedEvent:
        return EmulatedEvent(self)

    def capture_problem(self) -> str:
        return ""

    def capture(self, work: Callable[[], None]) -> EmulatedGraph:
        check_not_capturing(self.captured, "a capture")
        captured: list[Callable[[], None]] = []
        self.captured = captured
        try:
            work()
        finally:
            self.captured = None
        return EmulatedGraph(self, captured)

    def free_bytes(self) -> int:
        return max(0, self.memory - self.taken)

    def used_bytes(self) -> int:
        return self.taken

    def close(self) -> None:
        self._modules.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _key(self, text: str, flags: Sequence[str]) -> str:
        compiler: Compiler = self._compiler
        parts = [
            text,
            *compiler.command,
            compiler.version,
            *flags,
            native_target(),
        ]
        return content_key(parts, included_files(text))

    def _build(self, text: str, what: str, path: Path, flags: Sequence[str]) -> None:
        command = [*self._compiler.command, *flags, "-I", str(kernels_folder())]
        source = path.with_suffix(".cpp")
        try:
            source.write_text(text, encoding="utf-8")
            run_compiler([*command, source.name, "-o", path.name], what, path.parent)
        finally:
            source.unlink(missing_ok=True)

    def _load_runtime(self) -> ctypes.CDLL:
        check_executable(cache_folder())
        text = '#include "emulated/runtime.cpp"\n'
        # All modules of a process call one runtime, so that those of level 0 have that of level 1.
        flags = compile_flags(self._compiler, self._sanitize, least=1)
        flags += ["-DEMULATED_WATCH=1"] * self.watches
        key = self._key(text, flags)

        def build(path: Path) -> None:
            self._build(text, "the emulated device's runtime", path, flags)

        # its functions and the thread-local context are what every module links to
        runtime = _load(cached(key, ".so", build), ctypes.RTLD_GLOBAL)
        runtime.emulated_allocate.restype = ctypes.c_void_p
        runtime.emulated_allocate.argtypes = (ctypes.c_size_t,)
        runtime.emulated_free.restype = None
        runtime.emulated_free.argtypes = (ctypes.c_void_p,)
        if self.watches:
            runtime.emulated_watched.restype = ctypes.c_char_p
        return runtime


def available_memory() -> int:
    """Bytes that this process can still get without swapping or exceeding its container's limit."""
    limit = memory_left()
    free = _free_memory()
    return free if limit is None else min(free, limit)


def _free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _positive(variable: str) -> int | None:
    """The number in an environment variable, which may also have its old name, CNNLIB_HOST_..."""
    for name in (variable, variable.replace("_EMULATED_", "_HOST_")):
        value = os.environ.get(name, "").strip()
        if value:
            if not value.isdigit() or int(value) < 1:
                raise DeviceError(f"{name}={value}: expected a positive whole number")
            return int(value)
    return None


def _load(path: Path, mode: int) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        raise DeviceError(
            f"device emulated: cannot load compiled code: {error}; {REMEDY}"
        ) from error


def _check_sanitizer_loaded(sanitize: tuple[str, ...]) -> None:
    # Loaded late, the library ends the process at once: better to say what is missing.
    if "address" not in sanitize:
        return
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    if "asan" not in maps:
        raise DeviceError(
            "CNNLIB_SANITIZE=address needs AddressSanitizer loaded before Python: run "
            "env $(python -m cnnlib.device) python ..."
        )
