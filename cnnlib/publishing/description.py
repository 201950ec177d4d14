"""What a machine is, and what was measured on it, from rows and provenance alone."""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from cnnlib.measuring.record import RunFacts
from cnnlib.publishing.contents import Table

KEYS = ("cpu", "cores", "cpu_quota", "system", "driver", "python", "commit")
"""Keys of run.json that describe the machine and its software."""


def describe(
    name: str, note: str, tables: Iterable[Table], facts: list[RunFacts]
) -> dict[str, Any]:
    """The contents of machine.json; what is not known is left out."""
    by_name = {table.name: table.columns for table in tables}
    epochs, samples = by_name["epochs"], by_name["samples"]
    devices: dict[str, list[str]] = {}
    stages: dict[str, list[str]] = {}
    for kind, device, stage, status in zip(
        *(epochs[column] for column in ("device_kind", "device", "stage", "status")), strict=True
    ):
        if status == "ok":
            devices.setdefault(kind, []).append(device)
            stages.setdefault(kind, []).append(stage)
    memory = known(samples["device_memory_total_mib"])
    clock = known(samples["sm_clock_mhz"])
    plain: Iterable[Mapping[str, Any]] = facts
    described = {
        "machine": name,
        "note": note,
        "devices": {kind: unique(names) for kind, names in devices.items()},
        "device_memory_mib": max(memory, default=None),
        "sm_clock_mhz": {"median": median(clock), "most": max(clock)} if clock else None,
        **{key: unique(each.get(key) for each in plain) for key in KEYS},
        "libraries": versions(plain),
        "measured": sorted({str(each["started"])[:10] for each in plain if each.get("started")}),
        "stages": {kind: unique(names) for kind, names in stages.items()},
        **{
            column: unique(epochs[column])
            for column in ("dataset", "network", "batch_size", "repeat")
        },
    }
    return {key: value for key, value in described.items() if value not in (None, "", [], {})}


def known(values: Iterable[float]) -> list[float]:
    """The values that are not nan."""
    return [value for value in values if value == value]


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order in which they come; without None and the empty text."""
    return [value for value in dict.fromkeys(values) if value not in (None, "")]


def versions(facts: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Library -> its versions."""
    found: dict[str, list[str]] = {}
    for each in facts:
        for library, version in (each.get("libraries") or {}).items():
            found.setdefault(library, []).append(str(version))
    return {library: unique(each) for library, each in found.items()}
