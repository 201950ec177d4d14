"""Stage 3: convolution, bias, activation and subsampling in one kernel; errors are pushed back.

The full-size map never reaches device memory: forward keeps each window's value and winner, and the
backward pass rebuilds one image's full-size error map in shared memory. Weight gradients are left as
one partial sum a group of images, which the update adds up. Dense layers take bias and activation
along.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cnnlib.device import Device
from cnnlib.engine import Stage
from cnnlib.engine.gpu import THREADS, GpuEngine, GpuOperator, Launch
from cnnlib.layers import Activation, Conv, Dense, Layer, Subsample
from cnnlib.stages.gemm_cuda import GemmActivation, GemmSubsample, tile

SHARED_BYTES = 48 * 1024
"""Shared memory that every CUDA device gives a block without being asked for more."""
MOST_OWNED = 4
"""Rows of the weight gradient a thread keeps in registers."""
BLOCKS_PER_MULTIPROCESSOR = 2
"""Blocks that sum weight gradients: each leaves a partial sum to be read again."""


def function_of(layers: tuple[Layer, ...]) -> str:
    """Enumerator of the activation among `layers`."""
    for layer in layers:
        if isinstance(layer, Activation):
            return layer.function.upper()
    return "IDENTITY"


class FusedConv(GpuOperator):
    file = "fused_conv.cuh"
    kernels = ("forward", "backward")

    def check(self) -> None:
        c = self.constants()
        size = math.prod(self.planned.source_shape)
        weights, maps = self.maps * self.terms, self.maps * self.rows * self.columns
        forward = weights + int(c["IMAGES"]) * size
        again = int(c["RECOMPUTE"])
        gradient = max(
            size + maps + again * weights,
            (not self.planned.is_first) * (size + maps + weights + again * size),
            THREADS * int(c["OWNED"]) * (self.layer.kernel + 1) * (int(c["SPLITS"]) > 1),
        )
        wanted = 4 * max(forward, gradient)
        if wanted > SHARED_BYTES:
            raise self.unsupported(
                f"it keeps a whole image, its map and the weights in shared memory, which takes "
                f"{wanted} of {SHARED_BYTES} bytes; stage 'ring' needs only a window of rows"
            )

    def constants(self) -> Mapping[str, int | str]:
        channels, height, width = self.planned.source_shape
        conv = self.layer
        self.maps, self.rows, self.columns = conv.output_shape(self.planned.source_shape)
        self.terms = conv.fan_in(self.planned.source_shape)
        subsample = next((x for x in self.planned.layers if isinstance(x, Subsample)), None)
        window = subsample.size if subsample else 1
        function = function_of(self.planned.layers)
        self.keeps_winners = subsample is not None and subsample.method == "max" and window > 1
        out_area = (self.rows // window) * (self.columns // window)
        each = next(
            (n for n in (4, 3, 2) if self.maps % n == 0 and self.maps // n * out_area >= 128), 1
        )
        items = self.maps // each * out_area
        fits = SHARED_BYTES // 4 - self.maps * self.terms
        images = max(1, min(THREADS // items, fits // (channels * height * width)))
        gradient_rows = self.maps * channels * conv.kernel
        splits = 1
        while gradient_rows * splits * 2 <= THREADS and splits * 2 <= self.rows:
            splits *= 2
        owned = min(MOST_OWNED, math.ceil(gradient_rows * splits / THREADS))
        self.chunks = math.ceil(gradient_rows / (owned * THREADS // splits))
        recompute = bool(
            subsample and subsample.method == "mean" and window > 1 and function != "IDENTITY"
        )
        return {
            "CHANNELS": channels, "HEIGHT": height, "WIDTH": width,
            "MAPS": self.maps, "KERNEL": conv.kernel, "STRIDE": conv.stride,
            "ROWS": self.rows, "COLUMNS": self.columns, "FUNCTION": function, "WINDOW": window,
            "METHOD": subsample.method.upper() if subsample else "MAX",
            "FIRST": int(self.planned.is_first), "EACH": each, "IMAGES": images,
            "RECOMPUTE": int(recompute), "PUSH": int(self.stage.options["errors"] == "push"),
            "OWNED": owned, "SPLITS": splits,
        }  # fmt: skip

    def partial_groups(self, device: Device, batch_size: int) -> int:
        self.groups = max(
            1, min(batch_size, device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR // self.chunks)
        )
        return self.groups

    def allocate(self, batch_size: int) -> None:
        # One byte where there are no winners: kernels take the argument all the same.
        shape = self.planned.target_shape if self.keeps_winners else ()
        self.winners = self.array((batch_size, *shape), np.uint8)

    def forward(self, count: int) -> list[Launch]:
        b, views = self.buffers, self.buffers.parameters[0]
        args = (b.source, views["weight"], views["bias"], b.target, self.winners, count)
        return [self.launch_blocks("forward", count, *args)]

    def backward(self, count: int) -> list[Launch]:
        return [self.backward_launch(count, self.groups)]

    def backward_launch(self, count: int, groups: int) -> Launch:
        """The backward kernel; with no groups it sends errors back and sums no gradient."""
        b, views = self.buffers, self.buffers.parameters[0]
        jobs = groups * self.chunks + (0 if b.source_errors is None else count)
        # Any array will do where there is nobody to send errors to: the kernel never touches it.
        errors = b.target_errors if b.source_errors is None else b.source_errors
        return self.launch_blocks(
            "backward", jobs, b.source, views["weight"], views["bias"], b.target, self.winners,
            b.target_errors, errors, b.partials, count, groups,
        )  # fmt: skip


class FusedDense(GpuOperator):
    file = "fused_dense.cuh"
    kernels = ("forward", "backward")

    def constants(self) -> Mapping[str, int | str]:
        self.inputs, self.units = math.prod(self.planned.source_shape), self.layer.units
        return {
            "INPUTS": self.inputs, "UNITS": self.units,
            "FUNCTION": function_of(self.planned.layers), "FIRST": int(self.planned.is_first),
        }  # fmt: skip

    def forward(self, count: int) -> list[Launch]:
        b, views = self.buffers, self.buffers.parameters[0]
        args = (b.source, views["weight"], views["bias"], b.target, count)
        return [self.launch_blocks("forward", tiles(count, self.units), *args)]

    def backward(self, count: int) -> list[Launch]:
        b, weight, gradients = self.buffers, self.buffers.parameters[0], self.buffers.gradients[0]
        blocks = tiles(self.units, self.inputs + 1)
        if b.source_errors is not None:
            blocks += tiles(count, self.inputs)
        errors = b.target_errors if b.source_errors is None else b.source_errors
        return [
            self.launch_blocks(
                "backward", blocks, b.source, weight["weight"], b.target, b.target_errors, errors,
                gradients["weight"], gradients["bias"], count,
            )
        ]  # fmt: skip


def tiles(rows: int, columns: int) -> int:
    """Blocks that cover a product of rows x columns by the small tiles of fused_dense.cuh."""
    height, width = tile(16)
    return math.ceil(rows / height) * math.ceil(columns / width)


STAGE = Stage(
    name="fused",
    title="3 fused",
    change="convolution, bias, activation and subsampling in one kernel; errors pushed back",
    runs_on="gpu",
    engine=GpuEngine,
    operators={
        (Conv, Activation, Subsample): FusedConv,
        (Conv, Subsample): FusedConv,
        (Conv, Activation): FusedConv,
        (Conv,): FusedConv,
        (Dense, Activation): FusedDense,
        (Dense,): FusedDense,
        (Activation,): GemmActivation,
        (Subsample,): GemmSubsample,
    },
    options={"errors": "push"},
)

PULL = replace(
    STAGE,
    name="fused_pull",
    title="3 fused, pull",
    change="stage fused with errors gathered (pulled) by the lower units",
    options={"errors": "pull"},
)
