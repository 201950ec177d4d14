"""What the operators of stage tuned have in common: numbers for a struct of C++."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Protocol

from cnnlib.arithmetic import ceil_div
from cnnlib.engine import Planned, Stage
from cnnlib.engine.source import Constant
from cnnlib.errors import Unsupported
from cnnlib.layers import Layer, Subsample
from cnnlib.stages.tuned.layout import Needs, SharedBuffer, SharedLayout, Threads


class Method(IntEnum):
    """enum Method of kernels/layers.cuh."""

    MAX = 0
    MEAN = 1


@dataclass(frozen=True)
class Position:
    """Where an operator comes in a plan."""

    index: int
    """Among the operators."""
    trace: int
    """Where its part of an image's trace begins, in floats."""
    partial: int
    """Where its part of a block's partial sums begins, in floats."""


class TunedOperator(ABC):
    """Serves a run of layers within a step, by a template of kernels/tuned/.

    A subclass says how much shared memory it needs and gives the numbers of its struct. Up to the
    first operator that takes all images of a block together, each takes one image at a time.
    """

    template: ClassVar[str]
    """The class template, in namespace tuned."""
    takes_bytes: ClassVar[bool] = False
    """Whether it takes the image's bytes, as words of two neighbours, where it is the first."""
    takes_planes: ClassVar[bool] = False
    """Whether these are FP16 instead of BF16."""
    border: tuple[int, int] = (0, 0)
    """Rows of zeros above and below its source, and columns beside it, that lie there with it."""
    may_leave_planes: bool = False
    """Whether it can split its target into planes of FP16 where it makes it."""
    leaves_planes: bool = False
    """Whether it does."""
    trace: int = 0
    """Floats that it leaves of each image for the second phase."""
    partials: int = 0
    """Floats of the sum of its gradient that every block leaves for the second phase."""
    needs: Needs

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        """`images`: how many a block takes together."""
        self.planned, self.stage, self.threads, self.images = planned, stage, threads, images
        self.label = planned.network.layer_names[planned.start]
        own = [p for p in planned.network.parameters if planned.start <= p.layer < planned.stop]
        self.parameters = sum(p.size for p in own)
        self.offset = own[0].offset if own else 0
        """Where they begin in the flat vector."""
        self.source_size = math.prod(planned.source_shape)
        """Floats of its source where it lies in shared memory."""
        self.target_size = math.prod(planned.target_shape)

    def follow(self, before: "TunedOperator") -> None:
        """Agrees with the operator before it on how the map between them lies."""

    def copied_by_one_warp(self, layout: SharedLayout) -> bool:
        """Whether one warp can copy the weights of a layer that takes a block's images together:
        they lie in shared memory as they do in device memory. True where there are none.
        """
        return True

    @abstractmethod
    def config(self, layout: SharedLayout, position: Position) -> Mapping[str, Constant]:
        """Name -> value of each constant of its struct; strings are enumerators."""

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        """Name -> array of each buffer of its struct; None: it has none."""
        i = position.index
        return {
            "Source": layout.maps[i],
            "Target": layout.maps[i + 1],
            "TargetErrors": layout.errors[i + 1],
            "SourceErrors": layout.errors[i],
        }

    def may_read_l2(self, layout: SharedLayout) -> bool:
        """Whether its weights stay in device memory and threads can multiply the images by them."""
        return False

    def unsupported(self, reason: str) -> Unsupported:
        return Unsupported(
            f"stage '{self.stage.name}' cannot take {self.planned.name} of network "
            f"'{self.planned.network.name}': {reason}"
        )


def images_together(layout: SharedLayout, position: Position, images: int) -> int:
    """The images that an operator without products takes together: those of a block, behind a dense
    layer, and otherwise 0, since each team takes one at a time.
    """
    source = layout.maps[position.index]
    # behind a dense layer, the images of a block have rows of their own
    return images if source.pitch > 0 and not source.slots else 0


def window_of(layers: tuple[Layer, ...]) -> tuple[int, Method]:
    """Size and method of the subsampling among `layers`; a window of 1 where there is none."""
    for layer in layers:
        if isinstance(layer, Subsample):
            return layer.size[0], Method[layer.method.upper()]
    return 1, Method.MAX


def winners(window: int, method: Method, values: int) -> Mapping[str, int]:
    """Floats for the winners of `values` windows, a byte each, where they are needed."""
    return {"winners": ceil_div(values, 4) if window > 1 and method is Method.MAX else 0}


class TunedFactory(Protocol):
    """What the stage's record holds for a run of layers: a class of TunedOperators, or a choice."""

    def __call__(
        self, planned: Planned, stage: Stage, threads: Threads, images: int, /
    ) -> TunedOperator: ...
