"""Asks the NVIDIA driver about its GPU, without PyCUDA or the CUDA toolkit."""

import ctypes
from functools import cache

from cnnlib.errors import DeviceError

LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def gpu_present() -> bool:
    """Whether the driver is there and sees a GPU; needs neither PyCUDA nor the toolkit."""
    return not driver_problem()


@cache
def gpu_identity() -> tuple[str, str]:
    """Name and PCI bus id of the first GPU that this process sees; needs only the driver."""
    driver = ctypes.CDLL(LIBRARY)
    handle, name, bus = (
        ctypes.c_int(0),
        ctypes.create_string_buffer(256),
        (ctypes.create_string_buffer(64)),
    )
    code = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(handle), 0)
        or driver.cuDeviceGetName(name, len(name), handle)
        or driver.cuDeviceGetPCIBusId(bus, len(bus), handle)
    )
    if code:
        raise DeviceError(f"the NVIDIA driver does not name its GPU (CUDA error {code})")
    return name.value.decode(), bus.value.decode()


@cache
def gpu_architecture() -> str:
    """The architecture of the first GPU that this process sees, e.g. sm_90; needs only a driver."""
    driver = ctypes.CDLL(LIBRARY)
    handle, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    code = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(handle), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle)
    )
    if code:
        raise DeviceError(f"the NVIDIA driver does not describe its GPU (CUDA error {code})")
    return f"sm_{major.value}{minor.value}"


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA release, such as (13, 0), whose code the driver takes; None if unknown."""
    version = ctypes.c_int(0)
    try:
        code = ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if code else (version.value // 1000, version.value % 1000 // 10)


def driver_problem() -> str:
    """Why the driver does not show a GPU; empty when it does."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return "no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"the NVIDIA driver sees no GPU (CUDA error {code})"
    return "" if count.value else "the NVIDIA driver sees no GPU"
