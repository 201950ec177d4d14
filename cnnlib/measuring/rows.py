"""The rows of one run: the only place where a row gets its identity and its standing."""

import math
from dataclasses import dataclass, field

from cnnlib.measuring import schema
from cnnlib.measuring.runs import Run
from cnnlib.measuring.schema import Row, Value

NOTHING: dict[type, Value] = {str: "", int: 0, float: math.nan, bool: False}
"""The value of a column without a measurement, by its type."""


def _run_tables() -> dict[str, list[Row]]:
    return {name: [] for name in schema.RUN_TABLES}


@dataclass
class RunRows:
    """Rows of one run, table by table, each complete with the run's identity and standing."""

    run: Run
    seed: int
    device: str = ""
    device_kind: str = "cpu"
    validated: bool = False
    """False until all checks have been passed: see `vouch`."""
    extrapolated: bool = False
    tables: dict[str, list[Row]] = field(default_factory=_run_tables)

    def __getitem__(self, table: str) -> list[Row]:
        return self.tables[table]

    def row(self, **values: Value) -> Row:
        """One complete row: identity, `values`, standing, which `values` may override."""
        return {
            "dataset": self.run.dataset,
            "network": self.run.network,
            "stage": self.run.stage,
            "device": self.device,
            "batch_size": self.run.batch_size,
            "seed": self.seed,
            "repeat": self.run.repeat,
            "device_kind": self.device_kind,
            "status": "ok",
            "validated": self.validated,
            "extrapolated": self.extrapolated,
            **values,
        }

    def blank(self, table: str, status: str, reason: str, **values: Value) -> Row:
        """A row of `table` without a measurement; the table's column `reason`, if any, says why."""
        columns = schema.TABLES[table]
        why: dict[str, Value] = {"reason": reason} if "reason" in columns else {}
        empty = {column: NOTHING[kind] for column, kind in columns.items()}
        return empty | self.row(status=status) | why | values

    def add(self, table: str, /, **values: Value) -> None:
        self[table].append(self.row(**values))

    def add_measured(self, table: str, /, **values: Value) -> None:
        """Add a row that is not extrapolated, even if the run's epochs are."""
        self.add(table, **values | {"extrapolated": False})

    def add_epoch(self, status: str = "ok", **values: Value) -> None:
        """Add a row of `epochs`; what is not among `values` is 0 or nan."""
        unknown: dict[str, Value] = {
            "epoch": len(self["epochs"]) + 1,
            "images": 0,
            "epoch_seconds": math.nan,
            "event_seconds": math.nan,
            "loss": math.nan,
            "test_accuracy": math.nan,
        }
        self.add("epochs", status=status, **unknown | values)

    def add_step(self, seconds: float) -> None:
        self.add("steps", step=len(self["steps"]) + 1, step_seconds=seconds)

    @property
    def trained(self) -> bool:
        """Whether the last timed epoch ended well."""
        return bool(self["epochs"]) and self["epochs"][-1]["status"] == "ok"

    def vouch(self) -> None:
        """Mark all rows, present and future, as validated: every check has been passed."""
        self.validated = True
        for table in self.tables.values():
            for row in table:
                row["validated"] = True

    def disturb(self, *tables: str) -> None:
        """Mark rows of `tables` as timed while another process was on the GPU.

        A batch that did not fit might have fitted without that process.
        """
        for table in tables:
            for row in self[table]:
                if row["status"] in ("ok", "does_not_fit"):
                    row["status"] = "disturbed"

    def discard(self, status: str, reason: str) -> None:
        """Replace all rows by one that is not validated, with this status and reason."""
        for table in self.tables.values():
            table.clear()
        self.validated = self.extrapolated = False
        self.add_epoch(status, reason=reason)
