"""Stand-ins for NVML: a GPU with sensors, one that is lost, and one with other processes."""

import multiprocessing
import os
import time
from types import SimpleNamespace
from typing import Any

GB = 2**30


class Nvml(SimpleNamespace):
    """A replacement of pynvml in which the functions named in `broken` raise."""

    NVML_FI_DEV_POWER_INSTANT, NVML_SUCCESS = 186, 0
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self, *broken: str, processes: tuple[int, ...] = ()) -> None:
        super().__init__()
        watts = SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=250_000))
        answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByPciBusId": "handle",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2 * GB, total=80 * GB),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=70),
            "nvmlDeviceGetFieldValues": [watts],
            "nvmlDeviceGetPowerUsage": 100_000,
            "nvmlDeviceGetTotalEnergyConsumption": 5_000,
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetTemperature": 40,
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=pid, usedGpuMemory=GB) for pid in processes
            ],
        }
        for name, answer in answers.items():
            setattr(self, name, self._fail if name in broken else lambda *_, a=answer: a)

    def _fail(self, *_: object) -> None:
        raise RuntimeError("NVML error")


class Divided(Nvml):
    """A card that MIG divides into `instances`, each with its processes.

    Queries that are `denied` for the card itself, "memory" or "processes", work for its instances.
    """

    def __init__(self, instances: dict[str, tuple[int, ...]], denied: tuple[str, ...]) -> None:
        super().__init__("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTotalEnergyConsumption")
        memory, names = self.nvmlDeviceGetMemoryInfo, list(instances)
        own = SimpleNamespace(used=3 * GB, total=10 * GB)

        def processes(handle: str) -> list[Any]:
            if handle == "handle" and "processes" in denied:
                self._fail()
            numbers = instances.get(handle) or [pid for pids in instances.values() for pid in pids]
            return [SimpleNamespace(pid=pid, usedGpuMemory=GB) for pid in numbers]

        def memory_of(handle: str) -> Any:
            if handle == "handle" and "memory" in denied:
                self._fail()
            return own if handle in instances else memory(handle)

        def instance(handle: str, index: int) -> str:
            # NVML counts possible instances, and their numbers may have gaps.
            return names[index - 1] if 1 <= index <= len(names) else str(self._fail())

        self.nvmlDeviceGetMaxMigDeviceCount = lambda handle: 7
        self.nvmlDeviceGetMigDeviceHandleByIndex = instance
        self.nvmlDeviceGetMemoryInfo = memory_of
        self.nvmlDeviceGetComputeRunningProcesses = processes


class Changing(Nvml):
    """A GPU that the reader watches while the test changes it, each in a process of its own.

    While `visited` is 1 the process `visitor` is there too; once `lost` is 1, nothing answers.
    """

    def __init__(self, visitor: int) -> None:
        super().__init__(processes=(os.getpid(),))
        # Shared with the reader, which is forked from this process.
        shared = multiprocessing.get_context("fork").Value
        self.looks, self.visited, self.lost = shared("l"), shared("l"), shared("l")
        own = self.nvmlDeviceGetComputeRunningProcesses("handle")
        another = SimpleNamespace(pid=visitor, usedGpuMemory=3 * GB)
        self.nvmlDeviceGetComputeRunningProcesses = lambda *_: own + [another] * self.visited.value
        self.nvmlSystemGetProcessName = lambda process: b"/usr/bin/other"
        self.nvmlDeviceGetTotalEnergyConsumption = lambda *_: 1000 * self.looks.value
        for name in [name for name in vars(self) if name.startswith("nvmlDeviceGet")]:
            setattr(self, name, self._unless_lost(getattr(self, name)))
        self._last = self.nvmlDeviceGetTemperature
        self.nvmlDeviceGetTemperature = self._counted

    def _unless_lost(self, answer: Any) -> Any:
        return lambda *arguments: self._fail() if self.lost.value else answer(*arguments)

    def _counted(self, *arguments: object) -> Any:
        self.looks.value += 1
        return self._last(*arguments)

    def looked_at(self, times: int = 3) -> None:
        """Wait for so many further looks, the first of which may have begun before."""
        wanted, deadline = self.looks.value + times, time.monotonic() + 60
        while self.looks.value < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
