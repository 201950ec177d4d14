"""Folders of published results, each of one machine: checked, and described in a line."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnlib.comparing.results import Key, Measured, facts_files, measured, tables
from cnnlib.errors import DataError
from cnnlib.measuring import schema
from cnnlib.measuring.record import read_facts_file
from cnnlib.peers import PEERS
from cnnlib.publishing.contents import Table, check_validated
from cnnlib.publishing.description import unique
from cnnlib.publishing.privacy import Scrubber

PEER_NAMES = {peer.name for peer in PEERS}


@dataclass(frozen=True)
class Machine:
    """What was measured on one machine."""

    name: str
    devices: dict[str, list[str]]
    """Kind of device -> names; the emulated ones are left out."""
    runs: dict[Key, Measured]
    """The runs with times that are no emulated kernels'."""
    dates: list[str]
    """The first and the last day of its run.json files, or the only one."""
    commits: list[str]

    @property
    def stages(self) -> list[str]:
        """Stages and libraries with a time."""
        return list(dict.fromkeys(key.stage for key in self.runs))

    def best(self, dataset: str, network: str, batch_size: int) -> tuple[str, float] | None:
        """The fastest stage that is no library, and the seconds of its epoch; None without one."""
        found = [
            (run.median, key.stage)
            for key, run in self.runs.items()
            if (key.dataset, key.network, key.batch_size) == (dataset, network, batch_size)
            and key.stage not in PEER_NAMES
        ]
        return (min(found)[1], min(found)[0]) if found else None


def machines(reference: Path) -> list[Machine]:
    """The machines in a folder such as results/reference, by name.

    Raises DataError naming what is damaged.
    """
    return [machine(path.parent) for path in sorted(reference.glob("*/tables"))]


def machine(folder: Path) -> Machine:
    """The machine whose published results are in `folder`."""
    runs = {
        key: run
        for key, run in measured(tables(folder, "epochs")).items()
        if run.seconds and key.device_kind != "emulated"
    }
    devices: dict[str, list[str]] = {}
    for key, run in runs.items():
        known = devices.setdefault(key.device_kind, [])
        known += sorted(run.devices - set(known))
    facts: list[Mapping[str, Any]] = [read_facts_file(path) for path in facts_files(folder)]
    dates = sorted(str(each["started"])[:10] for each in facts if each.get("started"))
    ends = list(dict.fromkeys([*dates[:1], *dates[-1:]]))
    return Machine(folder.name, devices, runs, ends, unique(each.get("commit") for each in facts))


def check(folder: Path) -> None:
    """DataError naming a table that is damaged or not validated, what is missing, or private.

    Names of users and hosts are not known here: `cnnlib submit` looks for them where they are.
    """
    if not (folder / "provenance/run.json").is_file():
        raise DataError(f"{folder} has no provenance/run.json: the report is made with it")
    for path in facts_files(folder):
        read_facts_file(path)
    if not tables(folder, "epochs"):
        raise DataError(f"{folder}/tables has no epochs.csv")
    for path in sorted((folder / "tables").glob("*.csv")):
        name = schema.current_name(path.stem)
        if name in schema.TABLES:
            check_validated(Table(name, schema.read_columns(path, name)))
    scrubber = Scrubber((), ())
    for part in ("tables", "provenance"):
        for path in sorted((folder / part).iterdir()):
            if found := scrubber.found_in(path.read_text(encoding="utf-8")):
                raise DataError(f"{path} holds a {found}")
