"""Which measurements the page explains: one data set and network, of one machine.

The page is about the first network of the tables that a GPU stage was measured on. Where nothing
was measured on a GPU, it shows published measurements, and the reader's own beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from cnnlib.measuring.runs import usual_size
from workflow.plotting import ladder, wording

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Shown:
    """Tables of one data set and network; `own` are the reader's where `tables` are published."""

    dataset: str
    network: str
    tables: Tables
    own: Tables | None = None
    """None where `tables` are the reader's own."""

    @property
    def what(self) -> str:
        """`LeNet-5 on MNIST`."""
        return wording.what(self.dataset, self.network)

    def table(self, name: str) -> pd.DataFrame:
        """A table's rows of this data set and network, or an empty one if it was not given."""
        return of_network(self.tables, name, self.dataset, self.network)

    @property
    def lines(self) -> pd.DataFrame:
        """The ladder's lines that were measured: emulated stages have no times."""
        lines = self.table("ladder")
        return lines[(lines["device_kind"] != "emulated") & lines["epoch_seconds"].notna()]

    @property
    def sizes(self) -> list[int]:
        """The batch sizes, ascending."""
        return sorted(set(self.lines["batch_size"]))

    @property
    def size(self) -> int:
        """The batch size that the page opens with."""
        return usual_size(self.sizes)

    @property
    def own_stages(self) -> list[str]:
        """The stages that were measured and are no libraries, in the ladder's order."""
        return [name for name in self.stages if name not in ladder.NAMES_OF_PEERS]

    @property
    def stages(self) -> list[str]:
        """All stages and libraries that were measured, in the ladder's order."""
        return ladder.ordered(self.lines["stage"])

    def line(self, stage: str, size: int) -> pd.Series | None:
        """The ladder's line of a stage at a batch size."""
        lines = self.lines
        found = lines[(lines["stage"] == stage) & (lines["batch_size"] == size)]
        return None if found.empty else found.iloc[0]

    def epoch_images(self, size: int) -> int:
        """Images of an epoch: whole batches alone; 0 where no epoch was timed in full."""
        epochs = self.table("epochs")
        if epochs.empty:
            return 0
        whole = epochs[~epochs["extrapolated"] & (epochs["batch_size"] == size)]
        return int(whole["images"].max()) if len(whole) else 0

    def step_seconds(self, stage: str, size: int) -> float:
        """Seconds of a training step: those of an epoch over its steps; nan if not measured."""
        line, images = self.line(stage, size), self.epoch_images(size)
        return float("nan") if line is None or not images else line["epoch_seconds"] * size / images

    def limit(self, probe: str) -> float:
        """The median of a probe at its smallest size, in its unit; nan if it was not measured."""
        limits = self.tables.get("limits")
        found = (
            None if limits is None else limits[limits["probe"] == probe].sort_values("size_bytes")
        )
        return float("nan") if found is None or found.empty else float(found.iloc[0]["median"])

    def learns(self, size: int) -> bool:
        """Whether trainings at this batch size end near the best accuracy of any size."""
        lines = self.lines
        return bool(lines[lines["batch_size"] == size]["learns"].all())


def of_network(tables: Tables, name: str, dataset: str, network: str) -> pd.DataFrame:
    """The rows of a table that are of this data set and network."""
    table = tables.get(name)
    if table is None:
        return pd.DataFrame()
    found = table[table["dataset"] == dataset]
    return found[found["network"] == network] if "network" in found else found


def measured_on_gpu(tables: Tables) -> pd.DataFrame:
    """The lines of the ladder that were measured on a GPU."""
    lines = tables["ladder"]
    return lines[(lines["device_kind"] == "cuda") & lines["epoch_seconds"].notna()]


def choose(tables: Tables, published: Tables | None) -> Shown | None:
    """What the page shows of `tables` with a ladder; None where there is nothing with a time.

    The reader's own measurements come first if a GPU is among them; otherwise the published ones,
    if there are any.
    """
    if len(found := measured_on_gpu(tables)):
        return shown_of(found, tables)
    if published is not None and len(found := measured_on_gpu(published)):
        return shown_of(found, published, tables)
    found = tables["ladder"]
    found = found[(found["device_kind"] != "emulated") & found["epoch_seconds"].notna()]
    return shown_of(found, tables) if len(found) else None


def shown_of(lines: pd.DataFrame, tables: Tables, own: Tables | None = None) -> Shown:
    """What is shown of the data set and network of the first of `lines`."""
    first = lines.iloc[0]
    return Shown(str(first["dataset"]), str(first["network"]), tables, own)
