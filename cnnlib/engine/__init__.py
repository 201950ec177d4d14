"""The stage record, the plan and the engines that carry it out."""

from cnnlib.engine.base import (
    Bytes,
    Engine,
    KernelTime,
    Order,
    Part,
    Planned,
    Setup,
    Stage,
    batch_arithmetic,
    name_of,
    plan,
    profile_operators,
)

__all__ = [
    "Bytes",
    "Engine",
    "KernelTime",
    "Order",
    "Part",
    "Planned",
    "Setup",
    "Stage",
    "batch_arithmetic",
    "name_of",
    "plan",
    "profile_operators",
]
