"""The machine's own limits: what the stages' times have to be seen against.

Latency of launches, events, barriers, copies and of every level of memory; bandwidth of copies;
peak arithmetic. Memory latency is that of one thread following a chain of addresses in random
order, each load waiting for the one before (as lmbench's lat_mem_rd does). Every result of
arithmetic is checked: a rate of wrong sums is none.
"""

from collections.abc import Callable

from cnnlib.config import Config
from cnnlib.device import open_device
from cnnlib.device.cuda import missing_parts
from cnnlib.probes.book import Book, Row, Step
from cnnlib.probes.cpu import cpu_steps
from cnnlib.probes.gpu import gpu_steps
from cnnlib.system.machine import cpu_description

Report = Callable[[str, int, int], None]
"""Told what is measured next, how many steps are done and of how many."""


def measure_limits(config: Config, report: Report = lambda *_: None) -> list[Row]:
    """Rows of the table `probes` for the CPU and, where sweep.device allows one, the GPU.

    Raises DeviceError when sweep.device is cuda and there is none.
    """
    book = Book()
    share = config.measuring.probe_seconds / 2
    wanted = config.sweep.device
    if wanted == "cuda" or (wanted == "auto" and not missing_parts()):
        with open_device("cuda") as device:
            book.begin(device.name, device.kind, share)
            walk(book, gpu_steps(book, device), report)
    book.begin(cpu_description(None), "cpu", share)
    walk(book, cpu_steps(book), report)
    return book.rows


def walk(book: Book, steps: list[Step], report: Report) -> None:
    """Take the steps; one that fails leaves rows `unavailable`, and the others go on."""
    for done, (probes, step) in enumerate(steps):
        report(f"{book.device_kind}: {probes[0]}", done, len(steps))
        with book.probing(*probes):
            step()


__all__ = ["Book", "Report", "measure_limits", "walk"]
