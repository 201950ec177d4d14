"""A device that has no memory and computes nothing, but counts what is launched on it.

An engine that is made on it shows what a step takes on a GPU that is not here. Numbers that come
back from it are zeros.
"""

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.device.api import Argument, DeviceArray, Event, Extent, Limits, shape_tuple


class NullArray:
    """The shape and the kind of an array (see api.DeviceArray)."""

    def __init__(self, shape: int | Sequence[int], dtype: DTypeLike) -> None:
        self.shape = shape_tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.size = prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def set(self, source: np.ndarray) -> None:
        pass

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        result = np.zeros(self.shape, self.dtype) if out is None else out
        result[...] = 0
        return result

    def part(self, start: int, shape: int | Sequence[int]) -> DeviceArray:
        return NullArray(shape, self.dtype)

    def viewed(self, dtype: DTypeLike) -> DeviceArray:
        return NullArray(self.shape, dtype)

    def fill_bytes(self, value: int = 0xFF) -> None:
        pass

    def free(self) -> None:
        pass


class NullKernel:
    """A kernel whose launches alone are known (see api.Kernel)."""

    def __init__(self, device: "NullDevice", name: str) -> None:
        self.name = name
        self._device = device

    def __call__(self, grid: Extent, block: Extent, *args: Argument) -> None:
        self._device.launches += 1

    def bind(
        self,
        grid: Extent,
        block: Extent,
        *args: Argument,
        shared_bytes: int = 0,
        programmatic: bool = False,
    ) -> Callable[[], None]:
        return lambda: self(grid, block, *args)

    def resources(self) -> None:
        return None


class NullModule:
    """Kernels of any name (see api.Module)."""

    def __init__(self, device: "NullDevice", name: str) -> None:
        self.name = name
        self._device = device

    def kernel(self, name: str) -> NullKernel:
        return NullKernel(self._device, name)


class NullGraph:
    """So many launches at once (see api.Graph)."""

    def __init__(self, device: "NullDevice", launches: int) -> None:
        self.launches = launches
        self._device = device

    def launch(self) -> None:
        self._device.launches += self.launches


class NullEvent:
    """A moment in no time (see api.Event)."""

    def record(self) -> None:
        pass

    def seconds_since(self, earlier: Event) -> float:
        return 0.0


class NullDevice:
    """See api.Device; `limits` are those of the device whose part it takes."""

    name = "no device"
    built = "not built"
    pci_bus_id: str | None = None

    def __init__(self, limits: Limits) -> None:
        self.kind = limits.kind
        self.multiprocessors = limits.multiprocessors
        self.shared_bytes = limits.shared_bytes
        self.capability = limits.capability
        self.launches = 0
        """Kernels launched so far."""

    def array(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> NullArray:
        return NullArray(shape, dtype)

    def pinned(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> np.ndarray:
        return np.empty(shape_tuple(shape), dtype)

    def compile(
        self, source: str, name: str, kernels: Sequence[str], flags: Sequence[str] = ()
    ) -> NullModule:
        return NullModule(self, name)

    def precompile(self, sources: Sequence[str], name: str, kernels: Sequence[str]) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def event(self) -> NullEvent:
        return NullEvent()

    def capture_problem(self) -> str:
        return ""

    def capture(self, work: Callable[[], None]) -> NullGraph:
        before = self.launches
        work()
        captured, self.launches = self.launches - before, before
        return NullGraph(self, captured)

    def free_bytes(self) -> int:
        return sys.maxsize

    def used_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
