"""Memory, power, clocks and temperature while a run is measured, read by a process of its own.

The reader is forked before anything else happens, so that it shares neither Python's lock nor a
CUDA context with the run; what it read comes back when the run is over. Both clocks are
time.perf_counter, which is the same for all processes of a machine.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cnnlib.engine import Engine
from cnnlib.engine.shuffle import Shuffle
from cnnlib.measuring.gpu_processes import Presence, Span, Watch, others
from cnnlib.system.supervisor import note
from cnnlib.training.loop import epoch_order

Row = dict[str, Any]

MIB = 2**20
UNHURRIED = 0.05
"""Seconds between two readings at the least where there is no GPU: all cores are at work."""
PATIENCE = 2.0
"""Seconds to wait for the reader's answer; it may hang in a driver that hangs."""
STEADY = "train"
"""The phase of which all readings are kept; of the others every KEEP-th."""
KEEP = 5
MOST = 400
"""Readings kept of the steady phase, about: a run of hours needs no more."""


class Reading(NamedTuple):
    """One look. Names and units are those of records.TABLES["samples"]; nan: nobody knows."""

    at: float
    device_memory_mib: float = math.nan
    device_memory_total_mib: float = math.nan
    process_memory_mib: float = math.nan
    utilization_percent: float = math.nan
    power_watts: float = math.nan
    energy_joules: float = math.nan
    sm_clock_mhz: float = math.nan
    temperature_celsius: float = math.nan
    host_memory_mib: float = math.nan


DIGITS = {"time_seconds": 4, "energy_joules": 3}
"""Decimals worth keeping, where it is not one."""


class Gpu:
    """One GPU's sensors, by NVML; whatever cannot be read is nan.

    `listed` are the compute processes that the last look saw; None: NVML did not tell. On a card
    that MIG shares out, a user may not be allowed to ask for the card's memory and processes: then
    the instance is asked on which the process runs, whose memory is also all that it can have.
    """

    def __init__(self, bus_id: str, process: int) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._process, self._seen = process, False
        self.listed: list[Any] | None = None
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        self._instances = self._find_instances()
        self._own_instance: Any = None

    def read(self) -> list[float]:
        """The values of a Reading from device_memory_mib to temperature_celsius."""
        nvml, handle = self._nvml, self._handle
        process_memory = known(self._process_memory)
        used, total = self._memory()
        return [
            used,
            total,
            process_memory,
            known(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            known(self._power),
            known(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3),
            known(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            known(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ]

    def _find_instances(self) -> list[Any]:
        """The parts into which MIG has divided the card; none where it has not."""
        found = []
        with contextlib.suppress(Exception):
            for index in range(self._nvml.nvmlDeviceGetMaxMigDeviceCount(self._handle)):
                with contextlib.suppress(Exception):  # that many there can be, fewer there are
                    found.append(
                        self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(self._handle, index)
                    )
        return found

    def _memory(self) -> tuple[float, float]:
        """MiB in use and in all: of the card, or of the process's instance where MIG divides it."""
        with contextlib.suppress(Exception):
            handle = self._own_instance if self._instances else self._handle
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            return memory.used / MIB, memory.total / MIB
        return math.nan, math.nan

    def _power(self) -> float:
        """Watts at this moment; nvmlDeviceGetPowerUsage is a mean over a second on new GPUs."""
        nvml = self._nvml
        with contextlib.suppress(Exception):
            fields = [nvml.NVML_FI_DEV_POWER_INSTANT]
            (field,) = nvml.nvmlDeviceGetFieldValues(self._handle, fields)
            if field.nvmlReturn == nvml.NVML_SUCCESS:
                return float(field.value.uiVal) / 1e3
        return float(nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3

    def name_of(self, process: int) -> str:
        """A process's program, or nothing where nobody tells."""
        with contextlib.suppress(Exception):
            name = self._nvml.nvmlSystemGetProcessName(process)
            return str(name.decode(errors="replace") if isinstance(name, bytes) else name)
        return ""

    def _process_memory(self) -> float:
        self.listed = None
        processes = self._processes()
        self.listed = processes
        own = [process for process in processes if process.pid == self._process]
        self._seen = self._seen or bool(own)
        if not self._seen and len(processes) == 1:
            own = processes  # a container may know its processes by other numbers than NVML
        return own[0].usedGpuMemory / MIB if own else math.nan

    def _processes(self) -> list[Any]:
        """The card's compute processes, or those of the process's instance if the card denies its.

        Raises what NVML does when both are denied.
        """
        query = self._nvml.nvmlDeviceGetComputeRunningProcesses
        if self._own_instance is None:
            for instance in self._instances:
                with contextlib.suppress(Exception):
                    listed = query(instance)
                    # in a container with one instance the process may have another number
                    if listed and (
                        len(self._instances) == 1 or self._process in [one.pid for one in listed]
                    ):
                        self._own_instance = instance
        try:
            return list(query(self._handle))
        except Exception:
            if self._own_instance is None:
                raise
            return list(query(self._own_instance))


def known(query: Callable[[], float]) -> float:
    """What `query` says, or nan: a sensor that fails must not end a measurement."""
    try:
        return float(query())
    except Exception:
        return math.nan


def host_memory(process: int) -> float:
    """MiB that a process and its children have in memory; nan where the system does not tell.

    Pages that they share count in each of them. The calling process is left out.
    """
    total = math.nan
    with contextlib.suppress(OSError, ValueError, IndexError):
        total = resident(process)
        children = Path(f"/proc/{process}/task/{process}/children").read_text()
        for child in map(int, children.split()):
            if child != os.getpid():
                total += known(lambda child=child: resident(child))  # type: ignore[misc]
    return total


def resident(process: int) -> float:
    """MiB of one process in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def read_until_told(connection: Connection, process: int, interval: float) -> None:
    """The reader's whole life: look every `interval` seconds, answer with everything seen.

    A bus id that arrives says which GPU to look at; None ends it, and so does a parent that is
    gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gpu: Gpu | None = None
    watch = Watch(process)
    # a look at what costs nothing, for runs that are over before NVML has begun
    readings = [Reading(at=time.perf_counter(), host_memory_mib=host_memory(process))]
    with contextlib.suppress(Exception):  # takes a while: before there is a GPU to look at
        import pynvml

        pynvml.nvmlInit()
    due = time.perf_counter()
    while os.getppid() == process:
        try:
            if connection.poll(max(0.0, due - time.perf_counter())):
                message = connection.recv()
                if message is None:
                    seen = np.array(readings, np.float64).reshape(-1, len(Reading._fields))
                    connection.send((seen, watch.presences))
                    return
                with contextlib.suppress(Exception):  # no NVML, no driver, no such GPU
                    gpu = Gpu(message, process)
        except (EOFError, OSError):
            return
        now = time.perf_counter()
        if now < due:
            continue
        values = [math.nan] * 8
        if gpu is not None:
            values = gpu.read()
            watch.look(now, gpu.listed, gpu.name_of)
        readings.append(Reading._make([now, *values, host_memory(process)]))
        due = max(due + (interval if gpu else max(interval, UNHURRIED)), time.perf_counter())


class Sampler:
    """Reads sensors from its beginning to its end; then `rows` and `energy` say what they were, and
    `others` who else was there.

    To be entered before a CUDA context exists: a process that has one must not be forked.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._phases: list[tuple[float, str]] = []
        self._readings = np.empty((0, len(Reading._fields)))
        self._presences: list[Presence] = []

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._reader = context.Process(
            target=read_until_told, args=(theirs, os.getpid(), self._interval), daemon=True
        )
        self.phase("open")
        self._reader.start()
        theirs.close()
        return self

    def __exit__(self, *exception: object) -> None:
        self._phases.append((time.perf_counter(), ""))
        with contextlib.suppress(OSError, EOFError):
            self._connection.send(None)
            if self._connection.poll(PATIENCE):
                self._readings, self._presences = self._connection.recv()
        self._connection.close()
        self._reader.join(PATIENCE)
        if self._reader.is_alive():
            self._reader.kill()
            self._reader.join(PATIENCE)

    @property
    def pid(self) -> int | None:
        """The reader's process."""
        return self._reader.pid

    def attach(self, bus_id: str | None) -> None:
        """From now on look at the GPU with this PCI bus id too; None: there is none."""
        if bus_id is not None:
            with contextlib.suppress(OSError):  # a reader that has died is no reason to stop
                self._connection.send(bus_id)

    def phase(self, name: str) -> None:
        """What the run does from now on."""
        note(phase=name)
        self._phases.append((time.perf_counter(), name))

    def rows(self) -> list[Row]:
        """Rows of the table `samples` without identity, with their status.

        All readings of the steady phase (at most about MOST), every KEEP-th of the others, and
        those at which memory was highest.
        """
        readings = self._readings
        if not len(readings):
            return []
        times = self._column("at")
        began = self._phases[0][0]
        names = np.array([name for _, name in self._phases])
        starts = np.array([at for at, _ in self._phases])
        phases = names[np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)]
        numbers = np.arange(len(readings))
        steady = phases == STEADY
        keep = np.where(steady, numbers % (steady.sum() // MOST + 1) == 0, numbers % KEEP == 0)
        for column in ("device_memory_mib", "process_memory_mib", "host_memory_mib"):
            highs = self._column(column)
            if np.isfinite(highs).any():
                keep[np.nanargmax(highs)] = True
        rows: list[Row] = []
        for i in np.flatnonzero(keep):
            values: dict[str, float] = dict(zip(Reading._fields, readings[i].tolist(), strict=True))
            row = {"time_seconds": values.pop("at") - began} | values
            rounded = {name: round(value, DIGITS.get(name, 1)) for name, value in row.items()}
            memory = (values["device_memory_mib"], values["process_memory_mib"])
            status = "ok" if any(map(math.isfinite, memory)) else "unavailable"
            rows.append(
                {"sample": len(rows) + 1, "phase": str(phases[i]), **rounded, "status": status}
            )
        return rows

    def energy(self, images: int) -> Row:
        """The row of the table `energy` without identity: phase "sustain" trained on `images`."""
        row: Row = {
            "images": images, "window_seconds": 0.0, "energy_joules": math.nan,
            "idle_watts": math.nan, "status": "unavailable",
        }  # fmt: skip
        spans = self._spans("sustain")
        if not spans or not len(self._readings):
            return row
        span = spans[0]
        times = self._column("at")
        joules = window_energy(times, self._column("energy_joules"), *span)
        row |= {"window_seconds": span[1] - span[0], "energy_joules": joules}
        watts = self._column("power_watts")
        watts = watts[np.isfinite(watts)]
        if len(watts):
            row["idle_watts"] = float(watts[0])  # looked at first when nothing was computed yet
        if math.isfinite(joules):
            row["status"] = "ok"
        return row

    @property
    def saw_processes(self) -> bool:
        """Whether NVML listed any process at all, if only the run's own."""
        return bool(self._presences)

    def others(self, phase: str | None = None) -> list[Presence]:
        """Other processes that were on the GPU in a phase, or ever (cnnlib.measuring.gpu_processes
        says how that is known).
        """
        return others(self._presences, self._spans(phase))

    def _column(self, name: str) -> NDArray[np.float64]:
        column: NDArray[np.float64] = self._readings[:, Reading._fields.index(name)]
        return column

    def _spans(self, name: str | None) -> list[Span]:
        """When the phases of this name (None: all) began and ended."""
        return [
            (began, ended)
            for (began, phase), (ended, _) in zip(self._phases, self._phases[1:], strict=False)
            if name in (phase, None)
        ]


def window_energy(
    times: NDArray[np.float64], counter: NDArray[np.float64], began: float, ended: float
) -> float:
    """Joules between `began` and `ended`, from a counter that moves in jumps.

    The counter (joules, read at `times`) is brought up to date some ten to fifty times a second, so
    its difference between the ends of a short window could miss or double a jump. Between the first
    and the last jump inside the window it is right at both: that difference is scaled to the
    window. nan with fewer than three jumps.
    """
    inside = (times >= began) & (times <= ended) & np.isfinite(counter)
    at, joules = times[inside], counter[inside]
    jumps = np.flatnonzero(np.diff(joules) > 0) + 1
    if len(jumps) < 3:
        return math.nan
    first, last = jumps[0], jumps[-1]
    rate = (joules[last] - joules[first]) / (at[last] - at[first])
    return float(rate * (ended - began))


def sustain(engine: Engine, count: int, seed: int, seconds: float) -> int:
    """Train on the `count` images loaded, epoch after epoch, for `seconds`; images trained on.

    Where an epoch takes longer than that it is trained in parts of about a tenth of the time. The
    order is drawn each time, as it is in an epoch that is measured.
    """
    size = engine.setup.batch_size
    steps = count // size
    ends = time.perf_counter() + seconds
    images, part, epoch = 0, 1, 0
    while (began := time.perf_counter()) < ends:
        if part == steps:
            engine.train_epoch(Shuffle(count, seed, epoch))
        else:
            engine.train(epoch_order(count, seed, epoch)[: part * size])
        images, epoch = images + part * size, epoch + 1
        if time.perf_counter() - began < seconds / 10:
            part = min(steps, 2 * part)
    return images
