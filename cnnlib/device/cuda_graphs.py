"""CUDA graphs and programmatic launches, which PyCUDA lacks: through NVIDIA's cuda-bindings.

Both libraries call the one driver of the process, in the context that is current, which is
PyCUDA's. The only file that imports cuda.bindings, and only when a graph or a programmatic launch
is asked for.
"""

import contextlib
import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cnnlib.device.api import KernelError, check_not_capturing
from cnnlib.errors import DeviceError, DoesNotFit

if TYPE_CHECKING:
    from cnnlib.device.cuda import CudaDevice

_KINDS: dict[str, Any] = {"P": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}


def bindings_problem() -> str:
    """What keeps cuda-bindings from being used here, in words; "" when nothing does."""
    try:
        found = importlib.util.find_spec("cuda.bindings.driver")
    except ImportError:
        found = None
    return "" if found else "no cuda-bindings (pip install cuda-bindings)"


class DriverCalls:
    """The calls of the driver that PyCUDA does not make, with errors of ours.

    Raises DeviceError where cuda-bindings is missing or does not load.
    """

    def __init__(self) -> None:
        problem = bindings_problem()
        if problem:
            raise DeviceError(f"device cuda: CUDA graphs need what is missing: {problem}")
        try:
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        except Exception as error:  # a library of the driver's is looked for while it is imported
            raise DeviceError(f"device cuda: cuda-bindings does not load: {error}") from error

    def _call(self, name: str, *arguments: object) -> Any:
        """What the driver's function gives besides its status."""
        try:
            status, *results = getattr(self._driver, name)(*arguments)
        except (AttributeError, RuntimeError) as error:  # an older driver lacks the function
            raise KernelError(f"device cuda: {name}: {error}") from error
        if status.value:
            kind = DoesNotFit if status.name == "CUDA_ERROR_OUT_OF_MEMORY" else KernelError
            raise kind(f"device cuda: {name} failed: {status.name}")
        return results[0] if results else None

    def begin_capture(self, stream: int) -> None:
        # Relaxed: what other libraries of the process do in other streams may go on.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        """The graph of what was captured."""
        return self._call("cuStreamEndCapture", stream)

    def instantiate(self, graph: Any) -> Any:
        """An executable graph; `graph` is no longer needed afterwards and is destroyed."""
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def upload(self, executable: Any, stream: int) -> None:
        """Bring the graph to the GPU, so that its first launch does not."""
        self._call("cuGraphUpload", executable, stream)

    def launch_graph(self, executable: Any, stream: int) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def destroy(self, executable: Any) -> None:
        self._call("cuGraphExecDestroy", executable)

    def load_module(self, cubin: bytes) -> Any:
        """A module of its own: PyCUDA does not say which handles its functions have."""
        return self._call("cuModuleLoadData", cubin)

    def function(self, module: Any, name: str, shared_bytes: int) -> Any:
        """A kernel of a module, which may have so much shared memory of variable size."""
        function = self._call("cuModuleGetFunction", module, name.encode())
        if shared_bytes > 48 * 1024:
            kinds = self._driver.CUfunction_attribute
            attribute = kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, shared_bytes)
        return function

    def programmatic_launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        kinds: str,
        values: Sequence[int | float],
    ) -> Callable[[], None]:
        """A launch that may begin before the launch before it has ended, to be made many times.

        `kinds` has a letter for each of `values`: P a pointer, i an int, f a float.
        """
        driver = self._driver
        config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes, config.hStream = shared_bytes, driver.CUstream(stream)
        kind = driver.CUlaunchAttributeID
        attribute.id = kind.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        packed = [_KINDS[letter](value) for letter, value in zip(kinds, values, strict=True)]
        pointers = (ctypes.c_void_p * max(1, len(packed)))(*map(ctypes.addressof, packed))

        def launch(_kept: object = packed) -> None:  # `pointers` point into it
            self._call("cuLaunchKernelEx", config, function, ctypes.addressof(pointers), 0)

        return launch


class CudaGraph:
    """An executable CUDA graph (see api.Graph); `kept` is what its kernels' arguments need."""

    def __init__(self, device: "CudaDevice", executable: Any, kept: Sequence[object]) -> None:
        self.launches = len(kept)
        self._device, self._executable, self._kept = device, executable, kept
        self._calls, self._stream = device.driver_calls(), int(device.stream.handle)
        self._calls.upload(executable, self._stream)

    def launch(self) -> None:
        if not self._device.is_open:
            raise DeviceError("graph: its device is closed")
        check_not_capturing(self._device.captured, "a graph")
        self._calls.launch_graph(self._executable, self._stream)

    def __del__(self) -> None:
        if self._device.is_open:
            with contextlib.suppress(DeviceError):  # after a kernel's fault every call fails
                self._calls.destroy(self._executable)
