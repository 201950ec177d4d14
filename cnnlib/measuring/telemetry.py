"""Memory, power, clocks and temperature while a run is measured, read by a process of its own.

The reader is forked before anything else happens, so that it shares neither Python's lock nor a
CUDA context with the run; its readings are fetched when the run is over. Both processes use
time.perf_counter, which is the same clock for all processes of a machine.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cnnlib.measuring.gpu_processes import ListedProcess, Presence, ProcessTracker, Span, others
from cnnlib.measuring.schema import Row
from cnnlib.system.supervisor import note

MIB = 2**20
UNHURRIED = 0.05
"""Least number of seconds between two readings where there is no GPU and all cores are busy."""
PATIENCE = 10.0
"""Seconds to wait for the reader's answer; a driver that hangs makes the reader hang too."""
STEADY = "train"
"""The phase all of whose readings are kept, up to about STEADY_ROWS."""
STEADY_ROWS = 400
KEEP = 5
"""Every KEEP-th reading is kept, except in the phase that keeps all."""


class Reading(NamedTuple):
    """One look. Names and units are those of schema.TABLES["samples"]; nan means unknown."""

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


DECIMALS = {"time_seconds": 4, "energy_joules": 3}
"""Decimals that are kept; of all other columns one."""


class Gpu:
    """One GPU's sensors, by NVML; whatever cannot be read is nan.

    `listed` are the compute processes that the last look saw, or None where NVML did not list any.
    On a card that MIG divides, a user may not be allowed to query the card's memory and processes.
    Then the instance is queried on which the process runs; its memory is all that the process can
    use.
    """

    def __init__(self, bus_id: str, process: int) -> None:
        import pynvml

        self._nvml: Any = pynvml  # which has no types
        self._process, self._seen = process, False
        self.listed: list[ListedProcess] | None = None
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        self._instances = self._find_instances()
        self._own_instance: object = None

    def read(self) -> list[float]:
        """The values of a Reading from device_memory_mib to temperature_celsius."""
        nvml, handle = self._nvml, self._handle
        process_memory = or_nan(self._process_memory)
        used, total = self._memory()
        return [
            used,
            total,
            process_memory,
            or_nan(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            or_nan(self._power),
            or_nan(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3),
            or_nan(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            or_nan(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ]

    def _find_instances(self) -> list[object]:
        """The parts into which MIG has divided the card; none where it has not."""
        found = []
        with contextlib.suppress(Exception):
            for index in range(self._nvml.nvmlDeviceGetMaxMigDeviceCount(self._handle)):
                with contextlib.suppress(Exception):  # there may be fewer instances than that
                    found.append(
                        self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(self._handle, index)
                    )
        return found

    def _memory(self) -> tuple[float, float]:
        """MiB in use and in total, of the card or of the process's instance of a divided card."""
        with contextlib.suppress(Exception):
            handle = self._own_instance if self._instances else self._handle
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            return memory.used / MIB, memory.total / MIB
        return math.nan, math.nan

    def _power(self) -> float:
        """Watts now; on new GPUs nvmlDeviceGetPowerUsage returns a mean over a second."""
        nvml = self._nvml
        with contextlib.suppress(Exception):
            fields = [nvml.NVML_FI_DEV_POWER_INSTANT]
            (field,) = nvml.nvmlDeviceGetFieldValues(self._handle, fields)
            if field.nvmlReturn == nvml.NVML_SUCCESS:
                return float(field.value.uiVal) / 1e3
        return float(nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3

    def name_of(self, process: int) -> str:
        """The program of a process, or "" where NVML does not say."""
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
            own = processes  # in a container its number may differ from NVML's
        memory = own[0].usedGpuMemory if own else None
        return math.nan if memory is None else memory / MIB

    def _processes(self) -> list[ListedProcess]:
        """The compute processes of the card, or of the process's instance if those are denied.

        Raises NVML's exception when both are denied.
        """
        query = self._nvml.nvmlDeviceGetComputeRunningProcesses
        if self._own_instance is None:
            for instance in self._instances:
                with contextlib.suppress(Exception):
                    listed = query(instance)
                    # In a container with one instance the process may have another number.
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


def or_nan(query: Callable[[], float]) -> float:
    """The value of `query`, or nan: a sensor that fails must not end a measurement."""
    try:
        return float(query())
    except Exception:
        return math.nan


def host_memory(process: int) -> float:
    """MiB of memory in which a process and its children are resident; nan where it is unknown.

    Pages that they share count in each of them. The calling process is left out.
    """
    total = math.nan
    with contextlib.suppress(OSError, ValueError, IndexError):
        total = resident(process)
        children = Path(f"/proc/{process}/task/{process}/children").read_text()
        for child in map(int, children.split()):
            if child != os.getpid():
                total += or_nan(lambda child=child: resident(child))  # type: ignore[misc]
    return total


def resident(process: int) -> float:
    """MiB of memory in which one process is resident."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def read_sensors(connection: Connection, process: int, interval: float, sweep: int | None) -> None:
    """Run the reader: look every `interval` seconds, and at the end send everything seen.

    A bus id that arrives says which GPU to look at, a number how many seconds are between two looks
    at least, and True that everything seen is to be sent, and that another run begins. None ends
    the reader, and so does the death of its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gpu: Gpu | None = None
    pace = 0.0
    tracker = ProcessTracker(process, sweep)
    # One reading at once, for runs that end before NVML has been initialised.
    readings = [Reading(at=time.perf_counter(), host_memory_mib=host_memory(process))]
    with contextlib.suppress(Exception):  # slow, so it is done before a GPU is to be read
        import pynvml

        pynvml.nvmlInit()
    due = time.perf_counter()
    while os.getppid() == process:
        try:
            if connection.poll(max(0.0, due - time.perf_counter())):
                message = connection.recv()
                if message is None or message is True:
                    seen = np.array(readings, np.float64).reshape(-1, len(Reading._fields))
                    connection.send((seen, tracker.presences))
                    if message is None:
                        return
                    gpu, tracker = None, ProcessTracker(process, sweep)
                    readings = [Reading(time.perf_counter(), host_memory_mib=host_memory(process))]
                elif isinstance(message, float):
                    pace, due = message, time.perf_counter()
                else:
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
            tracker.look(now, gpu.listed, gpu.name_of)
        readings.append(Reading._make([now, *values, host_memory(process)]))
        pause = max(interval, pace, 0.0 if gpu else UNHURRIED)
        due = max(due + pause, time.perf_counter())


@dataclass
class TelemetryRecord:
    """What was read during a run, and when each phase of the run began."""

    phases: list[tuple[float, str]] = field(default_factory=list)
    """Beginning by time.perf_counter, and name; the last entry, without a name, is the end."""
    readings: NDArray[np.float64] = field(
        default_factory=lambda: np.empty((0, len(Reading._fields)))
    )
    """(readings, fields of Reading)."""
    presences: list[Presence] = field(default_factory=list)

    def rows(self) -> list[Row]:
        """Rows of the table `samples` without identity, with their status.

        They are the readings of the steady phase (at most about STEADY_ROWS), every KEEP-th of the
        others, and those at which memory was highest.
        """
        readings = self.readings
        if not len(readings):
            return []
        times = self.column("at")
        began = self.phases[0][0]
        names = np.array([name for _, name in self.phases])
        starts = np.array([at for at, _ in self.phases])
        phases = names[np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)]
        numbers = np.arange(len(readings))
        steady = phases == STEADY
        keep = np.where(
            steady, numbers % (steady.sum() // STEADY_ROWS + 1) == 0, numbers % KEEP == 0
        )
        for column in ("device_memory_mib", "process_memory_mib", "host_memory_mib"):
            highs = self.column(column)
            if np.isfinite(highs).any():
                keep[np.nanargmax(highs)] = True
        rows: list[Row] = []
        for i in np.flatnonzero(keep):
            values: dict[str, float] = dict(zip(Reading._fields, readings[i].tolist(), strict=True))
            row = {"time_seconds": values.pop("at") - began} | values
            rounded = {name: round(value, DECIMALS.get(name, 1)) for name, value in row.items()}
            memory = (values["device_memory_mib"], values["process_memory_mib"])
            status = "ok" if any(map(math.isfinite, memory)) else "unavailable"
            rows.append(
                {"sample": len(rows) + 1, "phase": str(phases[i]), **rounded, "status": status}
            )
        return rows

    @property
    def saw_processes(self) -> bool:
        """Whether NVML listed any process at all, if only the run's own."""
        return bool(self.presences)

    def others(self, phase: str | None = None) -> list[Presence]:
        """Other processes that were on the GPU in a phase, or at any time.

        cnnlib.measuring.gpu_processes describes how that is known.
        """
        return others(self.presences, self.spans(phase))

    def column(self, name: str) -> NDArray[np.float64]:
        """One field of all readings, (readings,)."""
        column: NDArray[np.float64] = self.readings[:, Reading._fields.index(name)]
        return column

    def spans(self, name: str | None) -> list[Span]:
        """Beginnings and ends of the phases of this name; None stands for all phases."""
        return [
            (began, ended)
            for (began, phase), (ended, _) in zip(self.phases, self.phases[1:], strict=False)
            if name in (phase, None)
        ]


class Sensors:
    """The process that reads sensors, for one run after another of the process that makes it.

    It must be made before a CUDA context exists: a process that has one must not be forked.
    """

    def __init__(self, interval: float, sweep: int | None = None) -> None:
        """`sweep` is the process that runs descend from which take turns with this one."""
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._reader = context.Process(
            target=self._read, args=(theirs, os.getpid(), interval, sweep), daemon=True
        )
        self._reader.start()
        self._unanswered = 0
        theirs.close()

    def _read(self, theirs: Connection, process: int, interval: float, sweep: int | None) -> None:
        self._connection.close()  # or else the reader would not see that the run has closed it
        read_sensors(theirs, process, interval, sweep)

    @property
    def pid(self) -> int | None:
        """The process id of the reader."""
        return self._reader.pid

    def say(self, message: str | float) -> None:
        """Send the reader a bus id or a pace; the run goes on even if the reader has died."""
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def seen(self, *, last: bool) -> tuple[NDArray[np.float64], list[Presence]] | None:
        """What was read since this was called before; None if the reader does not answer."""
        seen: tuple[NDArray[np.float64], list[Presence]] | None = None
        with contextlib.suppress(OSError, EOFError):
            self._connection.send(None if last else True)
            self._unanswered += 1
            ends = time.monotonic() + PATIENCE
            # An answer that came too late for the run before belongs to that run.
            while self._unanswered and self._connection.poll(max(0.0, ends - time.monotonic())):
                seen = self._connection.recv()
                self._unanswered -= 1
        return None if self._unanswered else seen

    def close(self) -> None:
        """End the reader."""
        self._connection.close()
        self._reader.join(PATIENCE)
        if self._reader.is_alive():
            self._reader.kill()
            self._reader.join(PATIENCE)


class Telemetry:
    """Reads sensors from `__enter__` to `__exit__`; afterwards `record` is complete."""

    def __init__(
        self, interval: float, sweep: int | None = None, sensors: Sensors | None = None
    ) -> None:
        """Without `sensors` there will be some for this run alone, made as Sensors describes."""
        self._interval, self._sweep, self._given = interval, sweep, sensors
        self.record = TelemetryRecord()

    def __enter__(self) -> Self:
        self.phase("open")
        if self._given is not None:
            self._given.seen(last=False)  # what was read between two runs
        self._sensors = self._given or Sensors(self._interval, self._sweep)
        return self

    def __exit__(self, *exception: object) -> None:
        self.record.phases.append((time.perf_counter(), ""))
        last = self._given is None
        if (seen := self._sensors.seen(last=last)) is not None:
            self.record.readings, self.record.presences = seen
        if last:
            self._sensors.close()

    @property
    def pid(self) -> int | None:
        """The process id of the reader."""
        return self._sensors.pid

    def attach(self, bus_id: str | None) -> None:
        """Read the GPU with this PCI bus id too from now on; None: there is no GPU."""
        if bus_id is not None:
            self._sensors.say(bus_id)

    def pace(self, seconds: float) -> None:
        """Look at once, and then no more often than once in so many seconds."""
        self._sensors.say(seconds)

    def phase(self, name: str) -> None:
        """Begin a phase of the run; the one before ends."""
        note(phase=name)
        self.record.phases.append((time.perf_counter(), name))
