"""The experiment as the rules see it: its paths, what each job reads, what each run depends on."""

import functools
import itertools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cnnlib.errors import ConfigError
from cnnlib.files import write_whole
from cnnlib.measuring import runs, schema
from cnnlib.stages import find_stage
from workflow.glue import integrity, modules, overrides
from workflow.glue.integrity import MADE, Made
from workflow.glue.sources import stage_sources

# What is measured once a data set, network and stage, and by which stages.
EXAMINED = {"transfers": "cuda", "cpu_profile": "cpu"}
# Raw tables that one job measures for the whole sweep.
BESIDE = ("probes", "pictures", "features")

# The digits and six figures for the poster; where one is not wanted the next takes its place.
POSTER = (
    "discern", "speedup", "learning", "profile", "roofline", "memory", "energy", "memory_latency",
    "latency", "transfers", "push_pull", "filters",
)  # fmt: skip
POSTER_COUNT = 7


class Experiment:
    """What `config` (Snakemake's) asks for; `given` is the part of it that --config has given.

    Raises UserError with one line if it cannot be.

    Methods that take wildcards are Snakemake input functions or params.
    """

    def __init__(self, config: dict[str, Any], given: Mapping[str, Any] | None = None) -> None:
        settings = overrides.laid_over(plain(config), plain(given or {}))
        self.config = runs.parse_experiment(settings)
        self.settings = in_order(self.config.model_dump(mode="json"))
        self.results = os.path.normpath(self.config.results)
        if os.path.exists(self.results) and not os.path.isdir(self.results):
            raise ConfigError(f"results: {self.results} is no folder")
        self.runs = runs.runs(self.config)
        self.run_tables = schema.RUN_TABLES
        self.combined_tables = (*schema.RUN_TABLES, *EXAMINED, "race")
        self.tables = modules.names("tables")
        self.figures = modules.names("figures")
        wanted = modules.chosen("figures", self.config.figures, "figures")
        for name in self.config.figures or []:
            if not self.tables_are_given and self.missing("figures", name):
                raise ConfigError(f"{name!r} in figures needs the section race, and there is none")
        self.wanted_figures = [name for name in wanted if not self.missing("figures", name)]
        self.wanted_tables = [name for name in self.tables if not self.missing("tables", name)]

    # paths ----------------------------------------------------------------------------------

    @property
    def table_files(self) -> list[str]:
        """The tables made from the raw ones, for people and for programs."""
        return [self.table(name, kind) for name in self.wanted_tables for kind in ("csv", "md")]

    @property
    def figure_files(self) -> list[str]:
        return [
            f"{self.results}/figures/{name}.{kind}"
            for name in self.wanted_figures
            for kind in ("png", "svg")
        ]

    @property
    def figure_pictures(self) -> list[str]:
        """Of those, the ones that stay sharp at any size."""
        return [path for path in self.figure_files if path.endswith(".svg")]

    @property
    def poster_figures(self) -> list[str]:
        """Names of the figures that the poster shows."""
        return [name for name in POSTER if name in self.wanted_figures][:POSTER_COUNT]

    @property
    def poster_tables(self) -> list[str]:
        """What they are drawn from, and the summary."""
        read = [modules.tables_read("figures", name) for name in self.poster_figures]
        return [self.table(name) for name in dict.fromkeys(["summary", *itertools.chain(*read)])]

    @property
    def poster_sources(self) -> list[str]:
        return [str(modules.source("figures", name)) for name in self.poster_figures]

    @property
    def table_pages(self) -> list[str]:
        """Of the tables, the files for people."""
        return [path for path in self.table_files if path.endswith(".md")]

    @property
    def provenance(self) -> str:
        """Where one run says by what it was measured; the last stage of the ladder stands for all.

        Published results keep that of one run.
        """
        if self.tables_are_given:
            return f"{self.results}/provenance/run.json"
        return f"{self.results}/{self.runs[len(self.config.sweep.stages) - 1].folder}/run.json"

    @property
    def captions(self) -> list[str]:
        """What the figures say of themselves, so that a new wording makes the report anew."""
        return [modules.docstring("figures", name) for name in self.wanted_figures]

    @property
    def settings_file(self) -> str:
        """The whole config of the experiment, merged and with its defaults."""
        return f"{self.results}/config.yaml"

    def table(self, name: str, kind: str = "csv") -> str:
        """A table's file; published results may have it under the name of an earlier version."""
        if kind == "csv" and self.tables_are_given:
            return str(schema.find(Path(self.results, "tables"), name))
        return f"{self.results}/tables/{name}.{kind}"

    @functools.cached_property
    def tables_are_given(self) -> bool:
        """Raw tables without the runs they came from: published results, drawn as they are."""
        made_here = Path(self.results, "runs").exists() or Path(self.results, MADE).exists()
        return Path(self.results, "tables", "epochs.csv").exists() and not made_here

    def missing(self, folder: str, name: str) -> list[str]:
        """Raw tables that a figure or table needs and that given results lack; said once.

        Without results it is a race that the config may not have.
        """
        raw = sorted(modules.raw_tables(folder, name))
        if not self.tables_are_given:
            return [table for table in raw if table == "race" and not self.config.race]
        lacking = [table for table in raw if not Path(self.table(table)).exists()]
        if lacking:
            print(
                f"left out: {folder.removesuffix('s')} {name}, since {self.results}/tables has no "
                f"{', '.join(f'{table}.csv' for table in lacking)}",
                file=sys.stderr,
            )
        return lacking

    @property
    def made_files(self) -> list[str]:
        """All that is made of runs or measured beside them, but for the poster."""
        examined = [path for raw in (*EXAMINED, "race") for path in self.files_of(raw)]
        raw = [self.table(name) for name in (*self.combined_tables, *BESIDE)]
        return [*examined, *raw, *self.table_files, *self.figure_files, self.page]

    @property
    def page(self) -> str:
        return f"{self.results}/report.html"

    @functools.cached_property
    def made(self) -> Made | None:
        """What the last call made; None where tables are given whose making is not known."""
        return None if self.tables_are_given else Made(self.results, self.made_files)

    def again(self) -> dict[str, str]:
        """Files that are missing, altered or stale and are to be made again -> what to say."""
        if self.made is None:
            return {}
        return {
            **integrity.data_again(self.config, self.results),
            **integrity.runs_again(self.config, self.results),
            **self.made.again(),
        }

    # data -----------------------------------------------------------------------------------

    def dataset_files(self, wildcards: Any) -> dict[str, Any]:
        """Names and checksums of what is downloaded; nothing for a data set that is made up."""
        return self.settings["datasets"][wildcards.dataset].get("files", {})

    def dataset_settings(self, wildcards: Any) -> dict[str, Any]:
        """Everything that decides what is in the data set's file."""
        spec = dict(self.settings["datasets"][wildcards.dataset])
        spec.pop("mirrors", None)
        spec.pop("hard_images")
        return spec

    # measuring ------------------------------------------------------------------------------

    def stage_sources(self, wildcards: Any) -> list[str]:
        return stage_sources(wildcards.stage)

    def run_settings(self, wildcards: Any) -> dict[str, Any]:
        """Of all the settings, those that can change what this run measures."""
        return self._run_settings(wildcards.dataset, wildcards.network, wildcards.stage)

    @functools.cache  # noqa: B019 - there is one Experiment
    def _run_settings(self, dataset: str, network: str, stage: str) -> dict[str, Any]:
        """The same for every batch size and repeat."""
        runs_on = find_stage(stage, "a rule").runs_on
        settings = runs.run_settings(self.config, dataset, network, runs_on)
        return {key: in_order(settings[key]) for key in sorted(settings)}

    @functools.cache  # noqa: B019 - there is one Experiment
    def layers(self, network: str, dataset: str) -> list[dict[str, Any]]:
        """Every layer with all its settings, however they were written."""
        layers = self.config.network(network, dataset, "a rule").layers
        return [in_order({layer.kind: layer.model_dump(mode="json")}) for layer in layers]

    @property
    def first(self) -> int:
        """Above every run: what they wait for is made before the first of them starts."""
        return len(self.runs) + 1

    def priority(self, wildcards: Any) -> int:
        """Higher for runs that come first in the sweep."""
        run = runs.Run(
            wildcards.dataset, wildcards.network, wildcards.stage,
            int(wildcards.batch_size), int(wildcards.repeat),
        )  # fmt: skip
        return len(self.runs) - self.order.get(run, len(self.runs))

    @functools.cached_property
    def order(self) -> dict[runs.Run, int]:
        return {run: i for i, run in enumerate(self.runs)}

    def gpus(self, wildcards: Any) -> int:
        """GPUs that a run takes: none when its kernels are to be emulated."""
        gpu = find_stage(wildcards.stage, "a rule").runs_on != "cpu"
        return int(gpu and self.config.sweep.device != "emulated")

    # what is measured beside the runs ---------------------------------------------------------

    @property
    def dataset_arrays(self) -> list[str]:
        """The files of all data sets of the sweep."""
        return [f"{self.results}/data/{name}.npz" for name in self.config.sweep.datasets]

    @functools.cached_property
    def usual_batch_size(self) -> int:
        """The batch size for what is looked at with one only."""
        return runs.usual_batch_size(self.config)

    def examined_files(self, raw: str) -> list[str]:
        sweep = self.config.sweep
        return [
            f"{self.results}/{raw}/{dataset}/{network}/{stage}.csv"
            for dataset in sweep.datasets
            for network in sweep.networks
            for stage in sweep.stages
            if find_stage(stage, "a rule").runs_on == EXAMINED[raw]
        ]

    @property
    def race_data(self) -> str:
        """The race's images; a name that no rule makes where there is no race."""
        return f"{self.results}/data/{self.config.race.dataset if self.config.race else '-'}.npz"

    def race_settings(self, wildcards: Any) -> dict[str, Any]:
        """Of all the settings, those that can change how this stage runs the race."""
        race = dict(self.settings["race"])
        del race["stages"]  # who else runs
        return {
            "race": race,
            "network": self.layers(race["network"], race["dataset"]),
            "device": self.settings["sweep"]["device"],
        }

    def without_wildcards(self, *sections: str) -> dict[str, Any]:
        """Settings of a job that is not about one run."""
        return {section: self.settings[section] for section in sections}

    # tables and figures ---------------------------------------------------------------------

    def run_files(self, wildcards: Any) -> list[str]:
        """This table's rows of every run, in the order of the sweep."""
        return self.files_of(wildcards.raw)

    def files_of(self, raw: str) -> list[str]:
        """What a raw table is combined from."""
        if raw in EXAMINED:
            return self.examined_files(raw)
        if raw == "race":
            stages = self.config.race.stages if self.config.race else []
            return [f"{self.results}/race/{stage}.csv" for stage in stages]
        return [f"{self.results}/{run.folder}/{raw}.csv" for run in self.runs]

    def tables_of_table(self, wildcards: Any) -> list[str]:
        return [self.table(name) for name in modules.tables_read("tables", wildcards.table)]

    def tables_of_figure(self, wildcards: Any) -> list[str]:
        return [self.table(name) for name in modules.tables_read("figures", wildcards.figure)]

    def caption(self, wildcards: Any) -> str:
        """What the report says below the figure."""
        return modules.docstring("figures", wildcards.figure)

    def list_file(self, wildcards: Any) -> str:
        """The file that names them, one path a line."""
        return self.list_of(wildcards.raw)

    def list_of(self, raw: str) -> str:
        return f"{self.results}/tables/.{raw}.list"

    # writing --------------------------------------------------------------------------------

    def save_settings(self) -> None:
        """Write every setting for the jobs to read, and for whoever finds the results later.

        As YAML: JSON writes 0.00001 in a way that YAML reads as text. Given tables keep their own.
        """
        if not self.tables_are_given:
            write_text(self.settings_file, yaml.safe_dump(self.settings, sort_keys=False))

    def save_lists(self) -> None:
        """Write which files each table is combined from, for commands that take thousands of them.

        Not rules: for each of its jobs without a program Snakemake starts another Snakemake.
        """
        if not self.tables_are_given:
            for raw in self.combined_tables:
                text = "".join(f"{path}\n" for path in self.files_of(raw))
                write_text(self.list_of(raw), text)

    def begin(self) -> None:
        """Files are about to be made."""
        if self.made is not None:
            self.made.begin()

    def end(self) -> None:
        """Whatever was to be made has been made, or has failed."""
        if self.made is not None:
            self.made.end()

    def say_where(self) -> None:
        """At the end of a run: where to look."""
        found = [path for path in self.figure_files if Path(path).exists()]
        if found:
            print(f"\nFigures: {Path(self.results, 'figures').resolve()}", file=sys.stderr)
            for path in found:
                print(f"  {path}", file=sys.stderr)
        ladder = self.table("ladder", "md")
        if Path(ladder).exists():
            print(f"Ladder:  {ladder}", file=sys.stderr)


def in_order(value: Any) -> Any:
    """The same settings with their keys sorted: how a user orders them is no change."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(inner) for inner in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Snakemake's config, made of ordinary dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def write_text(path: str, text: str) -> None:
    """For a few lines that need no program."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def put_this_python_first() -> None:
    """Let `python` in a rule mean the Python that runs Snakemake, activated environment or not."""
    here = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
