"""What a device is: the promises that `cuda` and `emulated` both keep."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.errors import DeviceError

Extent = int | Sequence[int]
"""A grid (in blocks) or a block (in threads): an int, or up to three, x first."""


class KernelError(DeviceError):
    """A kernel does not compile, was launched wrongly, or went wrong: divergent barrier, lost
    shuffle partner, a GPU that is gone.
    """


class Resources(NamedTuple):
    """What the compiler gave a kernel."""

    registers: int  # per thread
    shared_bytes: int  # per block, arrays of fixed size
    local_bytes: int  # per thread, spills included


class DeviceArray(Protocol):
    """A C-contiguous array in the device's memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def size(self) -> int:
        """Number of elements."""

    @property
    def nbytes(self) -> int: ...

    def set(self, source: np.ndarray) -> None:
        """Copy `source` (same shape and dtype, else DeviceError) to the device.

        Asynchronous if `source` came from `Device.pinned`: it must then stay as it is until the
        device is synchronised.
        """

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        """Copy to `out` (same shape and dtype, C-contiguous) or to a new array, and wait for it."""

    def part(self, start: int, shape: int | Sequence[int]) -> "DeviceArray":
        """The elements from flat element `start` on, as an array of `shape` in the same memory."""

    def viewed(self, dtype: DTypeLike) -> "DeviceArray":
        """The same memory as elements of another kind of the same size (else DeviceError)."""

    def fill_bytes(self, value: int = 0xFF) -> None:
        """Set every byte; 0xFF makes floats NaN and integers -1 (or the largest unsigned)."""

    def free(self) -> None:
        """Give the memory back now. Any later use, of a part too, is a DeviceError."""


class Changing:
    """An int argument of a bound launch that is read anew each time the launch is made."""

    __slots__ = ("value",)

    def __init__(self, value: int = 0) -> None:
        self.value = value


Argument = DeviceArray | int | float | Changing


class Kernel(Protocol):
    """A compiled kernel, to be launched on the device's one in-order stream."""

    name: str

    def __call__(self, grid: Extent, block: Extent, *args: Argument) -> None:
        """Launch. An array is passed as a pointer, an int as a C int, a float as a C float.

        Raises KernelError for a wrong number or kind of arguments or an impossible grid or block.
        """

    def bind(
        self,
        grid: Extent,
        block: Extent,
        *args: Argument,
        shared_bytes: int = 0,
        programmatic: bool = False,
    ) -> Callable[[], None]:
        """A launch with everything checked and packed beforehand, to be made many times.

        `shared_bytes` is the size of the kernel's SHARED_LARGE array, if it has one. The arrays
        are kept for as long as the launch is. What is Changing can be given another value between
        two launches; such a launch can neither be captured nor be programmatic (DeviceError). A
        `programmatic` launch may begin before the launch before it has ended, on a GPU that can do
        so; its kernel waits by itself (wait_for_previous_kernel of kernels/portable.cuh).
        """

    def resources(self) -> Resources | None:
        """Registers and memory it uses; None where the device has no such notion (emulated)."""


class Module(Protocol):
    """Kernels compiled from one source."""

    name: str

    def kernel(self, name: str) -> Kernel: ...


class Graph(Protocol):
    """Launches that a device has captured, to be made together many times."""

    launches: int
    """How many kernels one `launch` launches."""

    def launch(self) -> None:
        """Launch all of them in the order in which they were captured, with the same arguments."""


class Event(Protocol):
    """A moment on the device's stream."""

    def record(self) -> None: ...

    def seconds_since(self, earlier: "Event") -> float:
        """Seconds between two recorded events; waits until the device has passed both."""


Capability = tuple[int, int]
"""A compute capability, major and minor: (9, 0) of an H100."""


class Limits(Protocol):
    """The sizes of a device that decide how a network is laid out on it, and whether it fits.

    A Device has them, and DeviceLimits are those of one that is not open.
    """

    @property
    def kind(self) -> str:
        """'cuda' or 'emulated'."""

    @property
    def multiprocessors(self) -> int:
        """Blocks that run side by side, at least; OS threads where they are emulated."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block may have, SHARED_LARGE included."""

    @property
    def capability(self) -> Capability:
        """The compute capability by which plans estimate what products cost."""

    def capture_problem(self) -> str:
        """What keeps Device.capture from working, in words; "" when nothing does."""


class DeviceLimits(NamedTuple):
    """The limits of a device that is not open, or those that an open one is to keep to."""

    kind: str
    multiprocessors: int
    shared_bytes: int
    capability: Capability

    def capture_problem(self) -> str:
        """Nothing: what an open device of these limits would lack is not known."""
        return ""


class Device(Limits, Protocol):
    """One device with one in-order stream."""

    name: str
    built: str  # by which compiler, and how, its kernels are built: for provenance
    pci_bus_id: str | None  # where NVML finds it; None: it is no GPU

    def array(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> DeviceArray:
        """A new array, every byte 0xFF. Raises DoesNotFit naming the bytes wanted and free."""

    def pinned(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> np.ndarray:
        """A host array that the device can copy from asynchronously (page-locked on cuda)."""

    def compile(
        self, source: str, name: str, kernels: Sequence[str], flags: Sequence[str] = ()
    ) -> Module:
        """Compile a translation unit that #includes files of kernels/; `name` is for messages.

        Cached by content, in memory and on disk. Raises DeviceError with the compiler's first
        error.
        """

    def precompile(self, sources: Sequence[str], name: str, kernels: Sequence[str]) -> None:
        """Compile side by side what `compile` will be asked for."""

    def synchronize(self) -> None:
        """Wait until everything asked for so far is done."""

    def event(self) -> Event: ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Call `work` and keep what it launches, which does not run now, as a graph.

        Raises DeviceError, and forgets what was captured, where `work` does anything else with the
        device: copies, fills, makes an array, records an event, waits or captures. Raises it too
        where `capture_problem` says why.
        """

    def free_bytes(self) -> int:
        """Bytes that arrays may still take."""

    def used_bytes(self) -> int:
        """Bytes held by this device's arrays."""

    def close(self) -> None:
        """Free everything. Arrays, modules and events of this device are of no use afterwards."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...


def extent(value: Extent, what: str) -> tuple[int, int, int]:
    """`value` as three positive ints."""
    sizes = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
    if not 1 <= len(sizes) <= 3 or any(int(size) < 1 for size in sizes):
        raise KernelError(f"{what} {value!r}: expected one to three positive ints")
    x, y, z = (*(int(size) for size in sizes), 1, 1)[:3]
    return x, y, z


def check_not_capturing(capturing: object, what: str) -> None:
    """Raise DeviceError if a device's launches are being captured, which `what` cannot be."""
    if capturing is not None:
        raise DeviceError(f"{what} while launches are captured: a graph holds launches alone")


class _Addressed(Protocol):
    """What `plain_arguments` asks of a device's arrays."""

    @property
    def address(self) -> int: ...
    @property
    def letter(self) -> str:
        """The device's name for a pointer to such an array."""

    def check_alive(self) -> None:
        """Raise DeviceError if the memory has been freed."""


def plain_arguments(
    kernel: str, arguments: Sequence[Argument], arrays: type[_Addressed]
) -> tuple[str, list[int | float]]:
    """A letter for the kind of each argument of a launch, and the arguments as plain numbers.

    An array, of the device's class `arrays`, has its own letter and is passed by its address; i is
    an int and f a float. Raises KernelError for anything else, DeviceError for a freed array.
    """
    letters = ""
    values: list[int | float] = []
    for argument in arguments:
        if isinstance(argument, arrays):
            argument.check_alive()
            letters += argument.letter
            values.append(argument.address)
        elif isinstance(argument, (int, np.integer)):
            letters += "i"
            values.append(int(argument))
        elif isinstance(argument, (float, np.floating)):
            letters += "f"
            values.append(float(argument))
        elif isinstance(argument, Changing):
            letters += "i"
            values.append(argument.value)
        else:
            raise KernelError(
                f"kernel {kernel}: argument {len(letters)} is a {type(argument).__name__}; "
                "expected an array of this device, an int or a float"
            )
    return letters, values


def shape_tuple(shape: int | Sequence[int]) -> tuple[int, ...]:
    """`shape` as a tuple of non-negative ints."""
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    result = tuple(int(size) for size in sizes)
    if any(size < 0 for size in result):
        raise DeviceError(f"array of shape {result}: a size is negative")
    return result


def check_copy(where: str, shape: tuple[int, ...], dtype: np.dtype[Any], array: np.ndarray) -> None:
    """Raise DeviceError unless `array` can be copied bit by bit from or to a device array."""
    if array.shape != shape or array.dtype != dtype:
        raise DeviceError(
            f"{where}: device array is {dtype}{list(shape)}, host array is "
            f"{array.dtype}{list(array.shape)}"
        )


def check_view(kind: np.dtype[Any], other: np.dtype[Any]) -> None:
    """Raise DeviceError unless elements of both kinds have the same size."""
    if kind.itemsize != other.itemsize:
        raise DeviceError(f"an array of {kind} cannot be viewed as {other}: the sizes differ")


def check_part(shape: tuple[int, ...], start: int, size: int, whole: int) -> None:
    """Raise DeviceError unless elements start..start+size lie within `whole` elements."""
    if start < 0 or start + size > whole:
        raise DeviceError(
            f"part of shape {list(shape)} from element {start}: the array has {whole} elements"
        )
