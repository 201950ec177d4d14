"""The stage record, the plan and the engines that carry it out."""

from cnnlib.engine.base import Bytes, Engine, KernelTime, Order, Planned, Setup, Stage, plan

__all__ = ["Bytes", "Engine", "KernelTime", "Order", "Planned", "Setup", "Stage", "plan"]
