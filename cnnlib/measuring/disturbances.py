"""Rows that were timed while other processes were on the run's GPU."""

from cnnlib.measuring import energy
from cnnlib.measuring.gpu_processes import Presence
from cnnlib.measuring.record import OtherProcess, RunFacts
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.telemetry import TelemetryRecord

TIMED_IN = {
    "train": ("epochs", "steps"),
    "profile": ("kernels",),
    "learn": ("learning", "predictions"),
    energy.PHASE: ("energy",),
}
"""Phases of a run in which other processes on its GPU disturb it, and the tables timed there."""


def mark_disturbed(rows: RunRows, telemetry: TelemetryRecord) -> RunFacts:
    """Mark the disturbed rows; returns which processes disturbed them, for run.json."""
    if rows.device_kind != "cuda":
        return RunFacts()
    if not telemetry.saw_processes:
        why = "NVML lists no process of this GPU; others would not be noticed"
        return RunFacts(unwatched=why)
    found: dict[int, Presence] = {}
    timed_in: list[tuple[str | None, tuple[str, ...]]] = list(TIMED_IN.items())
    if rows["epochs"][-1]["status"] == "does_not_fit":
        # Others may have taken the memory at any time.
        timed_in = [(None, ("epochs", "steps"))]
    for phase, tables in timed_in:
        if others := telemetry.others(phase):
            rows.disturb(*tables)
            found |= {other.process: other for other in others}
    disturbed = [
        OtherProcess(process=other.process, name=other.name, memory_mib=round(other.memory_mib, 1))
        for other in found.values()
    ]
    return RunFacts(disturbed=disturbed) if disturbed else RunFacts()
