"""Where a stage lies in the roofline (Williams, Waterman and Patterson 2009) of its machine.

A point's horizontal position is the arithmetic that a training step needs for each byte that it
must at least move, if every layer moves its source, its target and its weights once. Its vertical
position is that arithmetic for each second that the stage takes. Both counts are the network's,
the same for every stage: one that fuses layers may pass the slanted limit.
"""

from dataclasses import dataclass

from cnnlib.device import open_device
from cnnlib.engine import Setup, batch_arithmetic
from cnnlib.network import Arithmetic, Network
from cnnlib.probes import ProbeLog
from cnnlib.probes.chase import Probes
from cnnlib.probes.cpu import CPU_COPIES, probe_blas, probe_cpu_copy
from cnnlib.probes.gpu import probe_arithmetic, probe_device_copy
from cnnlib.system.supervisor import supervise

PROBED_SECONDS = 120.0


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, as measured: bytes and operations per second."""

    bandwidth: float
    peak: float
    bandwidth_of: str
    peak_of: str

    def attainable(self, intensity: float) -> float:
        """Operations per second at most at this many operations per byte."""
        return min(self.peak, intensity * self.bandwidth)


@dataclass(frozen=True)
class Point:
    """A stage in the roofline."""

    name: str
    intensity: float
    """Operations per byte."""
    rate: float
    """Operations per second."""


def step_arithmetic(network: Network, setup: Setup) -> Arithmetic:
    """The least that a training step takes, one layer at a time."""
    batch = setup.batch_size
    parts = [batch_arithmetic(setup, part) for part in ("input", "loss", "update")]
    for layer in range(len(network.layers)):
        parts.append(network.forward_arithmetic(layer, layer + 1, batch))
        parts.append(network.backward_arithmetic(layer, layer + 1, batch))
    return Arithmetic(sum(part.flops for part in parts), sum(part.bytes for part in parts))


def point(name: str, network: Network, setup: Setup, seconds_per_image: float) -> Point:
    """The point of a stage that trains on an image in this time."""
    least = step_arithmetic(network, setup)
    rate = least.flops / (setup.batch_size * seconds_per_image)
    return Point(name, least.flops / least.bytes, rate)


def limits(kind: str) -> Limits:
    """Measure the limits of the CPU or the GPU, in a process of its own, which takes seconds."""
    found = supervise(lambda: _measured(kind), limit=PROBED_SECONDS)
    if kind == "cuda":
        return Limits(found[0], found[1], "device memory", "fp32")
    return Limits(found[0], found[1], "memory, one thread", "BLAS, all cores")


def _measured(kind: str) -> tuple[float, float]:
    """(bytes per second, operations per second)."""
    log = ProbeLog()
    if kind == "cuda":
        with open_device("cuda") as device:
            log.begin(device.name, device.kind, PROBED_SECONDS / 4)
            probes = Probes(device)
            probe_device_copy(log, probes)
            probe_arithmetic(log, probes)
        names = "copy_device", "peak_fp32"
    else:
        log.begin("cpu", "cpu", PROBED_SECONDS / 4)
        probe_cpu_copy(log, CPU_COPIES[-1])
        probe_blas(log)
        names = "copy_cpu", "blas_all"
    best = [
        max(float(str(row["rate"])) for row in log.rows if row["probe"] == name) for name in names
    ]
    return 1e9 * best[0], 1e12 * best[1]
