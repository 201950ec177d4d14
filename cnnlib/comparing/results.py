"""A folder of results as a comparison reads it: rows of epochs, provenance, clocks, settings.

Three kinds of folders are read: that of an experiment (runs/ or tables/), published ones
(results/reference/MACHINE) and plain folders of raw tables.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cnnlib.config_files import read_settings
from cnnlib.errors import DataError
from cnnlib.measuring import schema
from cnnlib.measuring.record import FACTS, RunFacts, read_facts_file
from cnnlib.measuring.runs import Run

SETTINGS = "config.yaml"
MACHINE = "machine.json"
"""The description of a submitted machine, which lies beside the provenance."""
STEADY = "train"
"""The phase of a run whose clocks are compared."""


class Key(NamedTuple):
    """What two runs must share to be compared."""

    dataset: str
    network: str
    stage: str
    device_kind: str
    batch_size: int


@dataclass
class Measured:
    """What a folder says of one run: the epochs of its repeats, or why there are none."""

    devices: set[str] = field(default_factory=set)
    seconds: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Repeat -> seconds of each of its epochs that counts: status ok, validated."""
    accuracy: float = math.nan
    """Median over the repeats of the test accuracy after the last epoch, as a share."""
    extrapolated: bool = False
    images: set[int] = field(default_factory=set)
    """Images of the epochs that were trained in full."""
    status: str = "ok"
    """`ok` if an epoch counts; otherwise the status of the first row, or `not validated`."""
    reason: str = ""

    @property
    def repeats(self) -> list[NDArray[np.float64]]:
        """The epochs of each repeat, in the order of the repeats."""
        return [self.seconds[repeat] for repeat in sorted(self.seconds)]

    @property
    def median(self) -> float:
        """Median of all epochs, in seconds, as in the table summary; nan without any."""
        return float(np.median(np.concatenate(self.repeats))) if self.seconds else math.nan


@dataclass(frozen=True)
class Results:
    """One folder."""

    folder: Path
    runs: Mapping[Key, Measured]
    facts: list[RunFacts]
    """The run.json files that there are: one for each run, or one for each stage published."""
    clocks: Mapping[str, float]
    """Stage -> median MHz of the multiprocessors while it was timed, where it is known."""
    settings: Mapping[str, Any] | None
    """The merged config, or None where the folder has none."""


def read(folder: Path) -> Results:
    """Read a folder of results.

    Raises DataError naming the folder if it is none, or the file in it that is damaged.
    """
    if not folder.is_dir():
        what = "no folder" if folder.exists() else "not there"
        raise DataError(f"{folder} is {what}; it must be a folder of results")
    files = tables(folder, "epochs")
    if not files:
        inside = sorted(str(path.parents[1]) for path in folder.glob("*/tables/epochs.csv"))
        raise DataError(
            f"{folder} is no folder of results: there is neither {folder}/runs nor "
            f"{folder}/tables/epochs.csv nor {folder}/epochs.csv"
            + (f"; in it are: {', '.join(inside)}" if inside else "")
        )
    settings = folder / SETTINGS
    return Results(
        folder,
        measured(files),
        [read_facts_file(path) for path in facts_files(folder)],
        clocks(tables(folder, "samples")),
        read_settings([settings]) if settings.is_file() else None,
    )


def tables(folder: Path, table: str) -> list[Path]:
    """The files with the rows of a raw table: each run's own where there are runs."""
    if runs := run_folders(folder):
        return [schema.find(run, table) for run in runs]
    candidates = (schema.find(place, table) for place in (folder / "tables", folder))
    return [path for path in candidates if path.exists()][:1]


def run_folders(folder: Path) -> list[Path]:
    """The folders of an experiment's runs, in a fixed order."""
    # runs/DATA SET/NETWORK/STAGE/b64/r1: see cnnlib.measuring.runs.Run
    return sorted(path.parent for path in (folder / "runs").glob(f"*/*/*/b*/r*/{FACTS}"))


def facts_files(folder: Path) -> list[Path]:
    """The files that say by what runs were measured."""
    beside = [folder / FACTS] if (folder / FACTS).exists() else []
    published = [path for path in (folder / "provenance").glob("*.json") if path.name != MACHINE]
    return [run / FACTS for run in run_folders(folder)] or [*beside, *sorted(published)]


def measured(files: Iterable[Path]) -> dict[Key, Measured]:
    """The runs in these tables of epochs; DataError naming a file that is damaged."""
    found: dict[Key, Measured] = {}
    times: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    last: dict[Key, dict[int, float]] = defaultdict(dict)
    for path in files:
        columns = schema.read_columns(path, "epochs")
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            key = Key(*(row[name] for name in Key._fields))
            run = found.setdefault(key, Measured(status=""))
            run.devices.add(row["device"])
            seconds = row["epoch_seconds"]
            if row["status"] == "ok" and row["validated"]:
                if not (math.isfinite(seconds) and seconds > 0):
                    raise DataError(
                        f"{path} is damaged: {seconds} is the time of an epoch of {name_of(key)}"
                    )
                times[key][row["repeat"]].append(seconds)
                last[key][row["repeat"]] = row["test_accuracy"]
                run.extrapolated |= row["extrapolated"]
                if not row["extrapolated"]:
                    run.images.add(row["images"])
                run.status = "ok"
            elif not run.status:
                run.status = "not validated" if row["status"] == "ok" else row["status"]
                run.reason = row["reason"]
    for key, repeats in times.items():
        found[key].seconds = {repeat: np.array(each) for repeat, each in repeats.items()}
        known = [value for value in last[key].values() if not math.isnan(value)]
        found[key].accuracy = median(known) if known else math.nan
    return found


def clocks(files: Iterable[Path]) -> dict[str, float]:
    """The clocks of `Results`, from tables of samples; what is not there is unknown."""
    seen: dict[str, list[float]] = defaultdict(list)
    for path in files:
        if not path.exists():
            continue
        columns = schema.read_columns(path, "samples")
        wanted = (columns[name] for name in ("stage", "phase", "sm_clock_mhz"))
        for stage, phase, clock in zip(*wanted, strict=True):
            if phase == STEADY and not math.isnan(clock):
                seen[stage].append(clock)
    return {stage: median(values) for stage, values in seen.items()}


def name_of(key: Key) -> str:
    """`tuned, batch 64 (mnist, lenet5)`."""
    return f"{key.stage}, batch {key.batch_size} ({key.dataset}, {key.network})"


def run_of(facts: RunFacts) -> Run | None:
    """The run that a run.json is about; None where it does not say so."""
    try:
        return Run(**facts.get("run", {}))  # type: ignore[arg-type]
    except TypeError:
        return None
