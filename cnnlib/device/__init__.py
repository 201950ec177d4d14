"""Devices that run kernels: a GPU through PyCUDA, or one that is emulated on the CPU."""

import warnings

from cnnlib.device.api import (
    Argument,
    Changing,
    Device,
    DeviceArray,
    DeviceLimits,
    Event,
    Extent,
    Graph,
    Kernel,
    KernelError,
    Limits,
    Module,
    Resources,
)
from cnnlib.device.compiler import sanitizer_environment
from cnnlib.errors import DeviceError

__all__ = [
    "CHOICES",
    "Argument",
    "Changing",
    "Device",
    "DeviceArray",
    "DeviceLimits",
    "Event",
    "Extent",
    "Graph",
    "Kernel",
    "KernelError",
    "Limits",
    "Module",
    "Resources",
    "limits_from",
    "limits_of",
    "open_device",
    "sanitizer_environment",
]

CHOICES = ("auto", "cuda", "emulated")


def open_device(choice: str = "auto", limits: DeviceLimits | None = None) -> Device:
    """Open the device of that name; 'auto' takes cuda when it works, else emulated.

    With `limits`, networks are laid out as if for a device of these sizes.

    Raises DeviceError saying what is missing: driver, toolkit or PyCUDA for cuda, a C++ compiler
    for emulated.
    """
    if choice not in CHOICES:
        raise DeviceError(f"unknown device '{choice}'; known: {', '.join(CHOICES)}")
    if choice in ("auto", "cuda"):
        from cnnlib.device import cuda, driver

        if choice == "cuda":
            return cuda.CudaDevice(limits)
        missing = cuda.missing_parts()
        if not missing:
            return cuda.CudaDevice(limits)
        if driver.gpu_present():
            warnings.warn(
                f"there is a GPU but {'; '.join(missing)}: kernels are emulated on the CPU instead",
                stacklevel=2,
            )
    from cnnlib.device import emulated

    return emulated.EmulatedDevice(limits=limits)


def limits_from(device: Limits) -> DeviceLimits:
    """A device's limits, which may outlive it."""
    return DeviceLimits(device.kind, device.multiprocessors, device.shared_bytes, device.capability)


def limits_of(choice: str = "auto") -> DeviceLimits | None:
    """The limits of the device that open_device would open, or None for a GPU that is not here."""
    if choice in ("auto", "cuda"):
        from cnnlib.device import cuda

        if not cuda.missing_parts():
            with cuda.CudaDevice() as gpu:
                return limits_from(gpu)
        if choice == "cuda":
            return None
    from cnnlib.device import emulated

    return emulated.emulated_limits()
