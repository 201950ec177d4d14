"""The stage record, the plan and the engines that carry it out."""

from cnnlib.engine.base import Engine
from cnnlib.engine.image_by_image import ImageByImage
from cnnlib.engine.own_loop import OwnLoop
from cnnlib.engine.profile import KernelTime, profile_operators
from cnnlib.engine.stage import (
    Bytes,
    Options,
    Order,
    Part,
    Planned,
    Setup,
    Stage,
    batch_arithmetic,
    name_of,
    options_of,
    plan,
)

__all__ = [
    "Bytes",
    "Engine",
    "ImageByImage",
    "KernelTime",
    "Options",
    "Order",
    "OwnLoop",
    "Part",
    "Planned",
    "Setup",
    "Stage",
    "batch_arithmetic",
    "name_of",
    "options_of",
    "plan",
    "profile_operators",
]
