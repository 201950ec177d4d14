"""The operators of GPU stages: kernels that serve a run of layers, and the launches of a pass."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Argument, Device, DeviceArray, Limits, Module
from cnnlib.engine.source import Constant, KernelSource
from cnnlib.engine.stage import Options, Planned, Stage, options_of
from cnnlib.engine.upload import device_array
from cnnlib.errors import Unsupported
from cnnlib.layers import Dropout

THREADS = 256
"""Threads of a block, in every kernel."""
BLOCKS_PER_MULTIPROCESSOR = 8
"""Upper bound of a grid: 2048 resident threads fill a multiprocessor; kernels stride over more."""
SUM_THREADS = 8
"""Threads that add up one weight's partial sums, where there are many."""


class Launch(NamedTuple):
    """A kernel launch with all its arguments, made by a call of `run`."""

    layer: str
    kernel: str
    grid: int
    run: Callable[[], None]


@dataclass(frozen=True)
class GpuOptions(Options):
    """What variants of a GPU stage can choose without operators of their own."""

    errors: Literal["push", "pull"] = "push"
    """How errors go back through a fused convolution: each error of the target is added to all
    elements of the source that it came from, or each element of the source collects its errors.
    """
    error_slots: int | None = None
    """Buffers of error maps, used in turn, each as large as its largest map. None: as many as
    there are operators.
    """
    launch: Literal["each", "graph", "programmatic"] = "each"
    """How the kernels of a step are launched: each by a call of the host's; many steps by one call,
    captured as a CUDA graph; or such a graph whose kernels may begin before the one before has
    ended (programmatic dependent launch), where they wait for it themselves.
    """
    gather: Literal["host", "device"] = "host"
    """Who brings the images of a batch together: the host, before they are copied; or a kernel, out
    of the training set that lies on the device as a whole, if it fits.
    """

    @property
    def counted(self) -> bool:
        """Whether a step finds its images and its rate by a counter on the device, and not by its
        launches' arguments.
        """
        return self.launch != "each" or self.gather == "device"


class Draws(NamedTuple):
    """What dropout's masks are drawn by, as a kernel's arguments: Moment of kernels/dropout.cuh."""

    seed_low: int
    seed_high: int
    moment: DeviceArray
    """(2,) int32: the number of the step, and 1 where images are trained on, 0 elsewhere."""


@dataclass
class Buffers:
    """The arrays on the device that one operator reads and writes.

    source (batch, *source_shape), target (batch, *target_shape) and their errors of the same sizes;
    `source_errors` is None for the first operator. `parameters` and `gradients` map the operator's
    parameters ("weight", "bias", by layer index) to parts of the two flat vectors.
    """

    source: DeviceArray
    target: DeviceArray
    source_errors: DeviceArray | None
    target_errors: DeviceArray
    parameters: list[dict[str, DeviceArray]]
    gradients: list[dict[str, DeviceArray]]
    partials: DeviceArray | None
    """(groups, parameters) for an operator that leaves its gradient as partial sums, else None."""
    draws: Draws
    """For operators that serve a layer with dropout."""

    @property
    def partial_sums(self) -> DeviceArray:
        """`partials` of an operator that leaves some; TypeError for others."""
        if self.partials is None:
            raise TypeError("an operator whose partial_groups are 0 leaves no partial sums")
        return self.partials


class GpuOperator(ABC):
    """Serves a run of layers by the kernels of one file, beside its module or in kernels/.

    A subclass names its `file`, the `kernels` in it and the constants the file needs, and says
    which launches make a forward and a backward pass over `count` images.
    """

    file: ClassVar[str]
    kernels: ClassVar[tuple[str, ...]]
    waits: ClassVar[bool] = False
    """Whether each of the kernels calls wait_for_previous_kernel (kernels/portable.cuh), so that it
    can be launched programmatically.
    """

    device: Device
    """Where the operator's kernels run, once it is bound."""

    def __init__(self, planned: Planned, stage: Stage, limits: Limits) -> None:
        self.planned = planned
        self.stage = stage
        self.limits = limits
        self.label = planned.network.layer_names[planned.start]
        self.check()

    def check(self) -> None:
        """Raise Unsupported, naming layer and limit, for sizes this operator cannot take."""

    def prepare(self, batch_size: int, before: "GpuOperator | None") -> None:
        """Choose what depends on the size of batches, and on the operator before this one.

        Called once, before `constants`, for all operators in the order of their layers.
        """

    @abstractmethod
    def constants(self) -> Mapping[str, Constant]:
        """Name -> value of each constant of the kernel file; strings are enumerators."""

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """A new array on the operator's device."""
        return device_array(self.device, shape, dtype)

    def partial_groups(self, batch_size: int) -> int:
        """Partial sums of the gradient that `backward` leaves; 0: it writes the gradient itself."""
        return 0

    def allocate(self, batch_size: int) -> None:
        """Make the operator's own scratch arrays on the device."""

    @abstractmethod
    def forward(self, count: int) -> list[Launch]:
        """Launches that compute the target of `count` images from their source."""

    @abstractmethod
    def backward(self, count: int) -> list[Launch]:
        """Launches that compute the parameters' gradient and, but for the first operator, the
        source's errors from the target's.
        """

    def bind(self, device: Device, module: Module, buffers: Buffers, batch_size: int) -> None:
        """Take the compiled kernels and the buffers; called once, before any launch is made."""
        self.device, self.module, self.buffers = device, module, buffers
        self.allocate(batch_size)

    def source(self) -> KernelSource:
        """The operator's part of the generated translation unit."""
        return KernelSource(self.label, self._found_file(), self.constants())

    def _found_file(self) -> str:
        """`file`, with its whole path where it lies beside the module of the class that names it.

        So a stage from outside the repository brings kernels that include those of kernels/.
        """
        for kind in type(self).__mro__:
            if "file" in vars(kind):
                module = getattr(sys.modules.get(kind.__module__), "__file__", None)
                beside = Path(module or "").absolute().parent / self.file
                return str(beside) if module and beside.is_file() else self.file
        return self.file

    def entry_points(self) -> list[str]:
        """Names of the operator's kernels in the compiled module."""
        return [f"{self.label}_{kernel}" for kernel in self.kernels]

    def launch(self, kernel: str, elements: int, *args: Argument) -> Launch:
        """Launch of `kernel` with enough blocks for one thread per element, up to a full device."""
        return self.launch_blocks(kernel, ceil_div(elements, THREADS), *args)

    def launch_blocks(
        self, kernel: str, blocks: int, *args: Argument, shared_bytes: int = 0
    ) -> Launch:
        """Launch of `kernel` with `blocks` blocks, or a full device: kernels stride over more."""
        programmatic = self.waits and options_of(self.stage, GpuOptions).launch == "programmatic"
        return bound_launch(
            self.device, self.module, self.label, kernel, blocks, args, shared_bytes, programmatic
        )

    def compared(self, count: int) -> list[Launch]:
        """Launches that no step makes, which `profile` times to compare them with a step's."""
        return []

    def unsupported(self, reason: str) -> Unsupported:
        """The error to raise for layers that this operator cannot take."""
        return Unsupported(
            f"stage '{self.stage.name}' cannot take {self.planned.name} of network "
            f"'{self.planned.network.name}': {reason}"
        )


class GpuFactory(Protocol):
    """What a stage's record holds for a run of layers: mostly a class of GpuOperators."""

    def __call__(self, planned: Planned, stage: Stage, limits: Limits, /) -> GpuOperator: ...


def mask_constants(planned: Planned) -> dict[str, Constant]:
    """The constants that Mask of kernels/dropout.cuh needs, for the dropout among the layers."""
    layer = planned.layer(Dropout)
    return {
        "LAYER": planned.start + planned.layers.index(layer),
        "THRESHOLD": signed_word(layer.threshold),
        "SCALE": layer.scale,
    }


def signed_word(word: int) -> int:
    """The C int that has the bits of an unsigned number below 2^32; higher bits are lost."""
    return (word + 2**31) % 2**32 - 2**31


def bound_launch(
    device: Device,
    module: Module,
    layer: str,
    kernel: str,
    blocks: int,
    args: Sequence[Argument],
    shared_bytes: int = 0,
    programmatic: bool = False,
) -> Launch:
    """A launch of up to `blocks` blocks of THREADS threads, never more than fill the device."""
    grid = max(1, min(blocks, device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR))
    bound = module.kernel(f"{layer}_{kernel}").bind(
        grid, THREADS, *args, shared_bytes=shared_bytes, programmatic=programmatic
    )
    return Launch(layer, kernel, grid, bound)
