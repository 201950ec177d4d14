"""What plans of kernels assume of a GPU beyond the limits that it says of itself."""

from dataclasses import dataclass

from cnnlib.device.api import DeviceLimits


@dataclass(frozen=True)
class Architecture:
    """Sizes of one kind of GPU. Counts are of one multiprocessor unless said otherwise."""

    name: str
    multiprocessors: int
    """On the whole device."""
    shared_bytes: int
    """Shared memory that a block may have."""
    schedulers: int
    """Each issues one instruction of a warp a cycle."""
    lanes: int
    """Threads of a warp."""
    sector_floats: int
    """Floats that device memory moves at once."""
    product_latency: int
    """Cycles that a warp waits in one product of tiles for what it has loaded.

    An estimate, not a measurement: a load from shared memory (some 30 cycles), then three products
    of tensor cores that wait for each other (some 30 each).
    """

    @property
    def limits(self) -> DeviceLimits:
        """What an open GPU of this kind would say of itself."""
        return DeviceLimits("cuda", self.multiprocessors, self.shared_bytes)


H100 = Architecture(
    name="H100",
    multiprocessors=132,
    shared_bytes=227 * 1024,
    schedulers=4,
    lanes=32,
    sector_floats=8,
    product_latency=120,
)
"""The H100 SXM: NVIDIA H100 Tensor Core GPU Architecture (2022), CUDA C++ Programming Guide,
tables of compute capability 9.0.
"""

ARCHITECTURES = {architecture.name.lower(): architecture for architecture in (H100,)}
"""Known architectures by the name that --gpu accepts."""
