"""The machine's own limits, with which the times of the stages can be compared.

They are the latencies of launches, events, barriers, copies and of every level of memory, the
bandwidth of copies, and peak arithmetic. Memory latency is measured by one thread that follows a
chain of addresses in random order, so that each load waits for the one before (as lmbench's
lat_mem_rd does). All arithmetic results are checked, since the rate of wrong sums means nothing.
"""

from collections.abc import Callable

from cnnlib.config import Config
from cnnlib.device import open_device
from cnnlib.device.cuda import missing_parts
from cnnlib.measuring.schema import Row
from cnnlib.probes.cpu import cpu_steps
from cnnlib.probes.gpu import gpu_steps
from cnnlib.probes.log import ProbeLog, Step
from cnnlib.system.machine import cpu_description

Report = Callable[[str, int, int], None]
"""Called with what is measured next, the number of steps done and the number of all steps."""


def measure_limits(config: Config, report: Report = lambda *_: None) -> list[Row]:
    """Rows of the table `probes` for the CPU and, where sweep.device allows one, the GPU.

    Raises DeviceError when sweep.device is cuda and there is none.
    """
    log = ProbeLog()
    share = config.measuring.probe_seconds / 2
    wanted = config.sweep.device
    if wanted == "cuda" or (wanted == "auto" and not missing_parts()):
        with open_device("cuda") as device:
            log.begin(device.name, device.kind, share)
            walk(log, gpu_steps(log, device), report)
    log.begin(cpu_description(None), "cpu", share)
    walk(log, cpu_steps(log), report)
    return log.rows


def walk(log: ProbeLog, steps: list[Step], report: Report) -> None:
    """Take all steps; a step that fails leaves rows `unavailable` and does not stop the others."""
    for done, (probes, step) in enumerate(steps):
        report(f"{log.device_kind}: {probes[0]}", done, len(steps))
        with log.probing(*probes):
            step()


__all__ = ["ProbeLog", "Report", "measure_limits", "walk"]
