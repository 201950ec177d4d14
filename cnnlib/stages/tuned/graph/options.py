"""What variants of plan `graph` can choose without operators of their own."""

from dataclasses import dataclass
from typing import Literal

from cnnlib.engine.gpu_operator import GpuOptions
from cnnlib.engine.stage import Stage

Arithmetic = Literal["ffma", "tf32x3", "bf16x6", "f16x3"]
"""How products are made with float32 accuracy; kernels/tuned/graph/planes.cuh explains each."""

VECTOR_BYTES: dict[Arithmetic, int] = {"ffma": 32, "tf32x3": 32, "bf16x6": 48, "f16x3": 32}
"""Shared memory that eight numbers take, in all their planes."""


@dataclass(frozen=True)
class ProductOptions(GpuOptions):
    """The choices of plan `graph`'s operators."""

    arithmetic: Arithmetic = "f16x3"
    small_tiles: bool = False
    """Whether products have the smallest of their tiles, and as many blocks for each as can be, as
    small batches have them.
    """
    head: int = 65536
    """Most weights of the last fully connected layers that are one launch together, with the loss
    and with their errors back: see head.py. 0: a launch for each.
    """
    head_batch: int = 256
    """Largest batch for which there is such a launch."""
    gathers_ahead: bool = True
    """Whether the update, where there is a head, also gathers the images of the next step."""


def product_options(stage: Stage) -> ProductOptions:
    """The options of a stage; the defaults for a stage whose options are others."""
    return stage.options if isinstance(stage.options, ProductOptions) else ProductOptions()
