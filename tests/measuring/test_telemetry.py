"""Sensors read during a run: the rows of the readings, and a reader that disturbs nothing."""

import math
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from cnnlib.measuring import telemetry
from cnnlib.measuring.energy import energy_row
from cnnlib.measuring.telemetry import (
    Gpu,
    Reading,
    Sensors,
    Telemetry,
    TelemetryRecord,
    host_memory,
)
from tests.support.nvml import Changing, Divided, Nvml


def read(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    values = Gpu("0000:01:00.0", process=77).read()
    return dict(zip(Reading._fields[1:9], values, strict=True))


def test_every_sensor_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(Nvml(processes=(5, 77)), monkeypatch) == {
        "device_memory_mib": 2048,
        "device_memory_total_mib": 81920,
        "process_memory_mib": 1024,
        "utilization_percent": 70,
        "power_watts": 250,
        "energy_joules": 5,
        "sm_clock_mhz": 1980,
        "temperature_celsius": 40,
    }


@pytest.mark.parametrize(
    ("query", "column"),
    [
        ("nvmlDeviceGetMemoryInfo", "device_memory_mib"),
        ("nvmlDeviceGetUtilizationRates", "utilization_percent"),
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_joules"),
        ("nvmlDeviceGetClockInfo", "sm_clock_mhz"),
        ("nvmlDeviceGetTemperature", "temperature_celsius"),
        ("nvmlDeviceGetComputeRunningProcesses", "process_memory_mib"),
    ],
)
def test_a_sensor_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, query: str, column: str
) -> None:
    values = read(Nvml(query, processes=(77,)), monkeypatch)
    missing = {name for name, value in values.items() if math.isnan(value)}
    assert column in missing
    assert missing <= {column, "device_memory_total_mib"}


def test_power_of_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(Nvml("nvmlDeviceGetFieldValues"), monkeypatch)["power_watts"] == 100


def test_a_container_knows_its_process_by_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(Nvml(processes=(5,)), monkeypatch)["process_memory_mib"] == 1024
    assert math.isnan(read(Nvml(processes=(5, 6)), monkeypatch)["process_memory_mib"])
    nvml, other = Nvml(processes=(77,)), Nvml(processes=(5,))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpu = Gpu("0000:01:00.0", process=77)
    gpu.read()
    # When it is gone again, another process must not be taken for it.
    query = "nvmlDeviceGetComputeRunningProcesses"
    setattr(nvml, query, getattr(other, query))
    assert math.isnan(gpu.read()[2])


@pytest.mark.parametrize("denied", [(), ("memory",), ("memory", "processes")])
def test_a_card_shared_out_by_mig(monkeypatch: pytest.MonkeyPatch, denied: tuple[str, ...]) -> None:
    """The memory is that of the process's instance, whichever query the card denies."""
    nvml = Divided({"one": (5, 6), "two": (77,)}, denied)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpu = Gpu("0000:01:00.0", process=77)
    for _ in range(2):
        values = dict(zip(Reading._fields[1:9], gpu.read(), strict=True))
        assert values["device_memory_mib"] == 3 * 1024
        assert values["device_memory_total_mib"] == 10 * 1024
        assert values["process_memory_mib"] == 1024
        assert gpu.listed is not None
        listed = [process.pid for process in gpu.listed]
        assert listed == ([77] if "processes" in denied else [5, 6, 77])


def test_an_instance_of_mig_in_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container sees one instance, and its process by another number."""
    monkeypatch.setitem(sys.modules, "pynvml", Divided({"one": (5,)}, ("memory", "processes")))
    values = Gpu("0000:01:00.0", process=77).read()
    assert values[:3] == [3 * 1024, 10 * 1024, 1024]


def test_a_card_that_denies_all_but_the_memory_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows are complete, since the process's own memory is what matters."""
    nvml = Changing(visitor=os.getppid())
    nvml.nvmlDeviceGetMemoryInfo = nvml._fail
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Telemetry(0.001) as sensors:
        sensors.attach("0000:01:00.0")
        nvml.looked_at(1)
        sensors.phase("train")
        nvml.looked_at(20)
    trained = [row for row in sensors.record.rows() if row["phase"] == "train"]
    assert {row["status"] for row in trained} == {"ok"}
    assert {row["process_memory_mib"] for row in trained} == {1024}
    assert all(math.isnan(row["device_memory_mib"]) for row in trained)


def test_nvml_vanishes_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(processes=(77,))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpu = Gpu("0000:01:00.0", process=77)
    assert not any(map(math.isnan, gpu.read()))
    assert gpu.listed
    for name in [name for name in vars(nvml) if name.startswith("nvml")]:
        setattr(nvml, name, nvml._fail)
    assert all(map(math.isnan, gpu.read()))
    assert gpu.listed is None


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Changing:
    changing = Changing(visitor=os.getppid())
    monkeypatch.setitem(sys.modules, "pynvml", changing)
    return changing


def spanned(rows: list[dict[str, Any]]) -> int:
    """The number of looks from the first to the last of these rows."""
    return round(rows[-1]["energy_joules"] - rows[0]["energy_joules"]) + 1


def test_readings_by_phase(nvml: Changing) -> None:
    with Telemetry(0.002) as sensors:
        began = time.perf_counter()
        sensors.attach("0000:01:00.0")
        nvml.looked_at(30)
        before_training = time.perf_counter() - began
        sensors.phase("train")
        nvml.looked_at(100)
        sensors.phase("evaluate")
        nvml.looked_at(30)
    rows = sensors.record.rows()
    assert [row["sample"] for row in rows] == list(range(1, len(rows) + 1))
    phases = [row["phase"] for row in rows]
    assert sorted(set(phases), key=phases.index) == ["open", "train", "evaluate"]
    assert phases == sorted(phases, key=["open", "train", "evaluate"].index)
    trained = [row for row in rows if row["phase"] == "train"]
    evaluated = [row for row in rows if row["phase"] == "evaluate"]
    # All of the steady phase unless there are very many; of the others some, and the highest.
    looked = [spanned(part) for part in (trained, evaluated)]
    assert len(trained) >= looked[0] // (looked[0] // telemetry.STEADY_ROWS + 1) >= 98
    assert 5 <= len(evaluated) <= looked[1] / telemetry.KEEP + 2
    assert all(row["status"] == "ok" for row in trained)
    assert all(row["device_memory_mib"] == 2048 for row in trained)
    assert trained[0]["time_seconds"] >= before_training - 1e-4
    assert all(row["host_memory_mib"] > 1 for row in trained)


def test_a_gpu_that_is_lost_in_the_middle(nvml: Changing) -> None:
    """The reader goes on; what it saw before is kept, and the rest is unavailable."""
    with Telemetry(0.001) as sensors:
        sensors.attach("0000:01:00.0")
        nvml.looked_at(1)
        sensors.phase("train")
        nvml.looked_at(20)
        nvml.lost.value = 1
        nvml.looked_at(20)
        sensors.phase("sustain")
        nvml.looked_at(20)
    rows = [row for row in sensors.record.rows() if row["phase"] == "train"]
    status = [row["status"] for row in rows]
    assert {status[0], status[-1]} == {"ok", "unavailable"}
    assert status == sorted(status)
    lost = rows[-1]
    assert lost["host_memory_mib"] > 1
    assert all(math.isnan(lost[name]) for name in ("power_watts", "process_memory_mib"))
    assert energy_row(sensors.record, 100)["status"] == "unavailable"
    assert sensors.record.others("train") == []


@pytest.mark.parametrize("phase", ["open", "train", "profile"])
def test_another_process_is_noticed_in_the_phase_in_which_it_comes(
    nvml: Changing, phase: str
) -> None:
    phases = ("open", "train", "profile")
    with Telemetry(0.001) as sensors:
        sensors.attach("0000:01:00.0")
        for name in phases:
            sensors.phase(name)
            nvml.looked_at()
            nvml.visited.value = int(name == phase)
            nvml.looked_at()
            nvml.visited.value = 0
            nvml.looked_at()
    assert sensors.record.saw_processes
    noticed = {name: [other.process for other in sensors.record.others(name)] for name in phases}
    assert noticed == {name: [os.getppid()] if name == phase else [] for name in phases}
    (other,) = sensors.record.others()
    assert (other.name, other.memory_mib) == ("/usr/bin/other", 3 * 1024)


def test_the_highest_memory_is_always_kept() -> None:
    record = TelemetryRecord([(0.0, "open"), (1.0, "train"), (2.0, "")])
    memory = np.full(2 * 10_000, 600.0)
    memory[3] = 900.0  # every fifth is kept here, and one in 26 of the training
    record.readings = np.array(
        [
            Reading(i / 10_000, device_memory_mib=mib, process_memory_mib=600, host_memory_mib=50)
            for i, mib in enumerate(memory)
        ]
    )
    rows = record.rows()
    assert max(row["device_memory_mib"] for row in rows) == 900
    assert [row["sample"] for row in rows] == list(range(1, len(rows) + 1))
    trained = sum(row["phase"] == "train" for row in rows)
    assert 300 < trained < 500


def test_without_nvml_the_host_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("nvmlInit"))
    with Telemetry(0.01) as sensors:
        sensors.attach("0000:01:00.0")
        sensors.phase("train")
        time.sleep(0.3)
    rows = sensors.record.rows()
    assert rows
    assert {row["status"] for row in rows} == {"unavailable"}
    assert all(math.isnan(row["power_watts"]) for row in rows)
    assert energy_row(sensors.record, 100)["status"] == "unavailable"


def test_the_reader_ends_with_the_run() -> None:
    with Telemetry(0.01) as sensors:
        pid = sensors.pid
        assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_reader_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "PATIENCE", 0.2)
    began = time.monotonic()
    with Telemetry(0.01) as sensors:
        pid = sensors.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
    assert time.monotonic() - began < 30
    assert sensors.record.rows() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sensors = Sensors(0.01)
    with Telemetry(0.01, sensors=sensors) as first:
        os.kill(sensors.pid or 0, signal.SIGSTOP)
        monkeypatch.setattr(telemetry, "PATIENCE", 0.2)
    monkeypatch.undo()
    os.kill(sensors.pid or 0, signal.SIGCONT)
    began = time.perf_counter()
    with Telemetry(0.01, sensors=sensors) as second:
        second.phase("train")
    assert first.record.rows() == []
    assert second.record.readings[:, 0].min() > began
    sensors.close()


def test_a_reader_that_dies_is_no_error() -> None:
    with Telemetry(0.01) as sensors:
        assert sensors.pid is not None
        os.kill(sensors.pid, signal.SIGKILL)
        time.sleep(0.05)
        sensors.attach("0000:01:00.0")
        sensors.phase("train")
    assert sensors.record.rows() == []
    assert energy_row(sensors.record, 1)["status"] == "unavailable"


def test_a_killed_run_leaves_no_reader() -> None:
    program = (
        "import time\nfrom cnnlib.measuring.telemetry import Telemetry\n"
        "with Telemetry(0.01) as sensors:\n    print(sensors.pid, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        reader = int(run.stdout.readline())
        run.kill()
        run.wait()
        for _ in range(600):
            if not alive(reader):
                return
            time.sleep(0.05)
    raise AssertionError("the reader outlives the run")


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_memory_of_this_process_and_its_children() -> None:
    alone = host_memory(os.getpid())
    assert 5 < alone < 1e6
    child = subprocess.Popen(
        [sys.executable, "-c", "x = bytearray(10**8); input()"], stdin=subprocess.PIPE
    )
    try:
        for _ in range(600):
            if host_memory(os.getpid()) > alone + 90:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the child's memory is not seen")
    finally:
        child.communicate(b"\n")
    assert math.isnan(host_memory(2**22 + 1))
