"""The rows of a submission: complete, valid, and no more of them than figures need."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cnnlib.comparing.results import SETTINGS, measured, run_folders, tables
from cnnlib.comparing.verdicts import is_copy
from cnnlib.config import Config, load_config
from cnnlib.errors import DataError
from cnnlib.measuring import schema
from cnnlib.measuring.freshness import MOST_LINES, damage
from cnnlib.measuring.runs import Run, runs, usual_size
from cnnlib.measuring.schema import RUN_TABLES, Row
from cnnlib.peers import PEERS

Columns = dict[str, list[Any]]

WITHOUT_VALUE = ("failed", "disturbed")
"""Statuses of runs that have to be measured again before they are published."""
BESIDE = ("transfers", "cpu_profile", "features", "pictures", "probes")
"""Raw tables that the workflow measures beside the runs. Any other one is optional."""
FREE = {"device", "reason", "function", "class_name"}
"""Columns whose texts come from the machine or the user; all others are chosen by the code."""
IDENTITY = tuple(schema.IDENTITY)
MEMORY = ("device_memory_mib", "process_memory_mib", "host_memory_mib")


class Table(NamedTuple):
    """One raw table of a submission."""

    name: str
    columns: Columns

    def rows(self) -> Iterable[Row]:
        """The rows, each a dict."""
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))


def settings_of(folder: Path) -> Config:
    """The config that the results were measured with; DataError where there is none."""
    path = folder / SETTINGS
    if not path.is_file():
        raise DataError(
            f"{path} is not there: the workflow writes it, and it says which runs are complete"
        )
    return load_config([path])


def read_tables(folder: Path, config: Config) -> list[Table]:
    """The raw tables in `folder`/tables, each checked.

    Raises DataError naming those that are missing, or the one that is damaged.
    """
    place = folder / "tables"
    # Where no stage runs on a GPU, or none on the CPU, the workflow writes a table without rows.
    required = {*RUN_TABLES, *BESIDE} | ({"race"} if config.race is not None else set())
    there = {name for name in schema.TABLES if schema.find(place, name).exists()}
    wanted = [name for name in schema.TABLES if name in required | there]
    missing = [name for name in wanted if name not in there]
    if missing:
        names = ", ".join(f"{name}.csv" for name in missing)
        raise DataError(f"{place} lacks {names}: these results are not finished; run `make run`")
    return [Table(name, schema.read_columns(schema.find(place, name), name)) for name in wanted]


def check_complete(folder: Path, config: Config, epochs: Table) -> None:
    """DataError naming the runs that are missing, damaged, failed or not validated."""
    status: dict[Run, list[str]] = defaultdict(list)
    for row in epochs.rows():
        valid = row["status"] != "ok" or row["validated"]
        status[run_of(row)].append(str(row["status"]) if valid else "not validated")
    expected = runs(config)
    refuse(folder, [(run, "is missing") for run in expected if run not in status])
    for bad in (*WITHOUT_VALUE, "not validated"):
        refuse(folder, [(run, f"is {bad}") for run, found in status.items() if bad in found])
    for path in run_folders(folder):
        if why := damage(path):
            raise DataError(f"{path}: {why}; measure this run again")
    check_combined(folder)


def without_times(epochs: Table) -> dict[Run, str]:
    """The runs that have no times, and the status that says why, such as `unavailable`."""
    status: dict[Run, list[str]] = defaultdict(list)
    for row in epochs.rows():
        status[run_of(row)].append(str(row["status"]))
    return {run: found[0] for run, found in status.items() if "ok" not in found}


def of_timed_runs(table: Table, untimed: Collection[Run]) -> Table:
    """A table without the samples of runs that have no times: nothing was trained in them."""
    if table.name != "samples":
        return table
    kept = [number for number, row in enumerate(table.rows()) if run_of(row) not in untimed]
    return chosen(table, kept)


def run_of(row: Row) -> Run:
    """The run that a row is of."""
    return Run(*(row[name] for name in Run.__dataclass_fields__))  # type: ignore[arg-type]


def chosen(table: Table, numbers: Sequence[int]) -> Table:
    """Some rows of a table, counted from 0."""
    columns = {name: [values[i] for i in numbers] for name, values in table.columns.items()}
    return Table(table.name, columns)


def check_combined(folder: Path) -> None:
    """DataError naming a run that was measured again after its rows were put into the table."""
    combined = schema.find(folder / "tables", "epochs")
    of_runs = measured(tables(folder, "epochs"))  # each run's own file, where there are any
    for key, run in measured([combined]).items():
        if key not in of_runs or not is_copy(run, of_runs[key]):
            raise DataError(
                f"{combined} has other times of {key.stage}, batch {key.batch_size}, than "
                f"{folder}/runs: run `make run`, which combines the tables anew"
            )


def refuse(folder: Path, wrong: Sequence[tuple[Run, str]]) -> None:
    """DataError naming the first runs that keep the results from being published, if any."""
    if not wrong:
        return
    named = [f"{name_of(run)} {why}" for run, why in wrong[:MOST_LINES]]
    more = len(wrong) - len(named)
    rest = f" and {more} more" if more else ""
    raise DataError(
        f"{folder} is not complete: {'; '.join(named)}{rest}. Measure again, or take them out of "
        "the sweep"
    )


def name_of(run: Run) -> str:
    """`tuned, batch 64, repeat 2 (lenet5 on mnist)`."""
    where = f"({run.network} on {run.dataset})"
    return f"{run.stage}, batch {run.batch_size}, repeat {run.repeat} {where}"


def check_validated(table: Table) -> None:
    """DataError naming the first row of a run's table that is `ok` and not validated."""
    if table.name not in RUN_TABLES:
        return
    for number, row in enumerate(table.rows(), 2):
        if row["status"] == "ok" and not row["validated"]:
            raise DataError(
                f"{table.name}.csv, row {number}: {row['stage']}, batch {row['batch_size']}, is ok "
                "but not validated"
            )


def thinned(table: Table) -> Table:
    """The samples and predictions that figures need; any other table as it is.

    A figure draws memory against time at one batch size, of the first repeat, and at all sizes the
    largest memory in each phase; comparisons take the median clock. All rows are kept of the first
    repeat at the largest batch size that all stages have and at the usual one, and of other runs
    those with these extremes. Predictions of libraries are drawn at the usual batch size alone,
    where those of stages stand beside them.
    """
    if table.name == "predictions":
        return chosen(table, drawn_predictions(table))
    if table.name != "samples":
        return table
    phases: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(table.rows()):
        phases[(*(row[name] for name in IDENTITY), row["phase"])].append(number)
    traced = traced_runs(table)
    kept: set[int] = set()
    for key, numbers in phases.items():
        kept.update(numbers if key[:-1] in traced else telling(table.columns, numbers))
    return chosen(table, sorted(kept))


def drawn_predictions(table: Table) -> list[int]:
    """The rows of predictions, counted from 0, of stages at all batch sizes and of libraries at
    the usual one: that of all, and that of the stages and the library alone.
    """
    libraries = {stage.name for stage in PEERS}
    sizes: dict[tuple[Any, ...], set[int]] = defaultdict(set)
    names = ("dataset", "network", "stage", "batch_size")
    cells = list(zip(*(table.columns[name] for name in names), strict=True))
    for *cell, stage, size in cells:
        sizes[*cell, stage if stage in libraries else ""].add(size)
        sizes[*cell, None].add(size)
    kept = []
    for number, (*cell, stage, size) in enumerate(cells):
        own = sizes[*cell, ""]
        usual = usual_size(sizes[*cell, None]), usual_size(own | sizes[*cell, stage] or {size})
        if stage not in libraries or not own or size in usual:
            kept.append(number)
    return kept


def traced_runs(table: Table) -> set[tuple[Any, ...]]:
    """The runs, by their IDENTITY, whose memory is drawn against time."""
    every_row = zip(*(table.columns[name] for name in IDENTITY), strict=True)
    runs: list[tuple[Any, ...]] = list(dict.fromkeys(every_row))
    place = {name: number for number, name in enumerate(IDENTITY)}
    sizes: dict[tuple[Any, ...], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    first: dict[tuple[Any, ...], int] = {}
    for run in runs:
        of_stage = sizes[run[: place["stage"]]][run[place["stage"]]]
        of_stage.add(run[place["batch_size"]])
        alike = run[: place["seed"]]
        first[alike] = min(first.get(alike, run[place["repeat"]]), run[place["repeat"]])
    drawn = {}
    for cell, stages in sizes.items():
        every = set.union(*stages.values())
        drawn[cell] = {max(set.intersection(*stages.values()) or every), usual_size(every)}
    return {
        run
        for run in runs
        if run[place["repeat"]] == first[run[: place["seed"]]]
        and run[place["batch_size"]] in drawn[run[: place["stage"]]]
    }


def telling(columns: Columns, numbers: Sequence[int]) -> set[int]:
    """Of the rows of one phase those with the largest memories, and the one with the median clock.

    The first row where nothing is known.
    """
    kept = set()
    for name in MEMORY:
        known = [i for i in numbers if columns[name][i] == columns[name][i]]
        if known:
            kept.add(max(known, key=columns[name].__getitem__))
    clocks = [i for i in numbers if columns["sm_clock_mhz"][i] == columns["sm_clock_mhz"][i]]
    if clocks:
        kept.add(sorted(clocks, key=columns["sm_clock_mhz"].__getitem__)[len(clocks) // 2])
    return kept or {numbers[0]}
