"""Devices that run kernels: a GPU through PyCUDA, or one that is emulated on the CPU."""

import warnings

from cnnlib.device.api import (
    Argument,
    Device,
    DeviceArray,
    Event,
    Extent,
    Kernel,
    KernelError,
    Limits,
    Module,
    Resources,
    Sizes,
)
from cnnlib.device.compiler import sanitizer_environment
from cnnlib.errors import DeviceError

__all__ = [
    "CHOICES",
    "Argument",
    "Device",
    "DeviceArray",
    "Event",
    "Extent",
    "Kernel",
    "KernelError",
    "Limits",
    "Module",
    "Resources",
    "Sizes",
    "limits_of",
    "open_device",
    "sanitizer_environment",
]

CHOICES = ("auto", "cuda", "emulated")


def open_device(choice: str = "auto") -> Device:
    """Open the device of that name; 'auto' takes cuda when it works, else emulated.

    Raises DeviceError saying what is missing: driver, toolkit or PyCUDA for cuda, a C++ compiler
    for emulated.
    """
    if choice not in CHOICES:
        raise DeviceError(f"unknown device '{choice}'; known: {', '.join(CHOICES)}")
    if choice in ("auto", "cuda"):
        from cnnlib.device import cuda

        if choice == "cuda":
            return cuda.CudaDevice()
        missing = cuda.missing_parts()
        if not missing:
            return cuda.CudaDevice()
        if cuda.gpu_present():
            warnings.warn(
                f"there is a GPU but {'; '.join(missing)}: kernels are emulated on the CPU instead",
                stacklevel=2,
            )
    from cnnlib.device import emulated

    return emulated.EmulatedDevice()


def limits_of(choice: str = "auto") -> Limits | None:
    """The limits of the device that open_device would open, or None for a GPU that is not here."""
    if choice in ("auto", "cuda"):
        from cnnlib.device import cuda

        if not cuda.missing_parts():
            with cuda.CudaDevice() as gpu:
                return Sizes(gpu.kind, gpu.multiprocessors, gpu.shared_bytes)
        if choice == "cuda":
            return None
    from cnnlib.device import emulated

    return emulated.emulated_limits()
