"""What kernels and plans assume of a GPU: one record for each kind that this project knows.

Sources: CUDA C++ Programming Guide 13.0, section "Compute Capabilities" (table "Technical
Specifications per Compute Capability" for shared memory; table "Feature Support per Compute
Capability" and PTX ISA 9.0 for what instructions need), and what each record names, for the number
of multiprocessors.
"""

from dataclasses import dataclass
from typing import NamedTuple

from cnnlib.device.api import Capability, DeviceLimits, Limits

LANES = 32
"""Threads of a warp, on every GPU so far."""
SECTOR_FLOATS = 8
"""Floats that device memory moves at once, on every GPU so far: 32 bytes."""


class Feature(NamedTuple):
    """Something that only newer GPUs can do, and what kernels do instead on the others."""

    name: str
    since: Capability
    """The first compute capability that has it."""
    instead: str


TENSOR_CORES = Feature(
    "tensor-core products in TF32 and BF16",
    (8, 0),
    "float32 multiply-adds or, in plan graph of tuned, tensor-core products in FP16",
)
"""mma.sync of kernels/tensor.cuh. Turing's tensor cores take FP16 alone, whose range is too small
for gradients as they are: kernels/tuned/graph/planes.cuh has factors for it.
"""
ASYNCHRONOUS_COPIES = Feature("asynchronous copies", (8, 0), "loads through registers")
"""cp.async of kernels/async.cuh."""
BULK_COPIES = Feature("bulk copies with an mbarrier", (9, 0), "copies by all threads of a block")
"""cp.async.bulk of kernels/async.cuh."""
PROGRAMMATIC_LAUNCHES = Feature("programmatic launches", (9, 0), "launches one after another")
"""griddepcontrol of kernels/portable.cuh."""

FEATURES = (TENSOR_CORES, ASYNCHRONOUS_COPIES, BULK_COPIES, PROGRAMMATIC_LAUNCHES)


@dataclass(frozen=True)
class Architecture:
    """Sizes of one kind of GPU. Counts are of one multiprocessor unless said otherwise."""

    name: str
    capability: Capability
    multiprocessors: int
    """On the whole device."""
    shared_bytes: int
    """Shared memory that a block may have."""
    product_latency: int
    """Cycles that a warp waits in one product of tiles for what it has loaded.

    An estimate, not a measurement: a load from shared memory (some 30 cycles), then three products
    of tensor cores that wait for each other (some 30 each) or, without them, eight multiply-adds
    (four each).
    """
    schedulers: int = 4
    """Each issues one instruction of a warp a cycle."""

    @property
    def sm(self) -> str:
        """What nvcc calls it, e.g. sm_90."""
        return "sm_{}{}".format(*self.capability)

    @property
    def limits(self) -> DeviceLimits:
        """What an open GPU of this kind would say of itself."""
        return DeviceLimits("cuda", self.multiprocessors, self.shared_bytes, self.capability)

    def has(self, feature: Feature) -> bool:
        """Whether such a GPU can do it."""
        return self.capability >= feature.since


T4 = Architecture(
    name="T4", capability=(7, 5), multiprocessors=40, shared_bytes=64 * 1024, product_latency=62
)
"""NVIDIA T4 Tensor Core GPU (datasheet, 2019): 2560 cores, 64 a multiprocessor as in the NVIDIA
Turing GPU Architecture paper (2018).
"""

A100 = Architecture(
    name="A100",
    capability=(8, 0),
    multiprocessors=108,
    shared_bytes=163 * 1024,
    product_latency=120,
)
"""NVIDIA A100 Tensor Core GPU Architecture (2020)."""

RTX_4090 = Architecture(
    name="RTX 4090",
    capability=(8, 9),
    multiprocessors=128,
    shared_bytes=99 * 1024,
    product_latency=120,
)
"""NVIDIA Ada GPU Architecture (2022)."""

H100 = Architecture(
    name="H100",
    capability=(9, 0),
    multiprocessors=132,
    shared_bytes=227 * 1024,
    product_latency=120,
)
"""The H100 SXM: NVIDIA H100 Tensor Core GPU Architecture (2022)."""

B200 = Architecture(
    name="B200",
    capability=(10, 0),
    multiprocessors=148,
    shared_bytes=227 * 1024,
    product_latency=120,
)
"""74 multiprocessors of each of two dies: C. Lam, "Nvidia's B200: Keeping the CUDA Juggernaut
Rolling", Chips and Cheese (2025), since NVIDIA's own brief on Blackwell (2024) does not say.
"""

KNOWN = (T4, A100, RTX_4090, H100, B200)
"""From the oldest to the newest."""

ARCHITECTURES = {each.name.lower().replace(" ", ""): each for each in KNOWN}
"""Known architectures by the name that --gpu accepts."""


def architecture_of(limits: Limits) -> Architecture:
    """The record of a device's compute capability, or else of the newest that is older.

    A device older than every record has the oldest. Multiprocessors and shared memory are the
    device's own, whatever its record says.
    """
    return next((each for each in reversed(KNOWN) if each.capability <= limits.capability), T4)
