"""The experiment as the rules see it: what is asked for, and on which settings a job depends.

Patterns of files are in workflow/rules; here is what has to be computed.
"""

import functools
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cnnlib.datasets import FolderSpec, fingerprint
from cnnlib.errors import ConfigError
from cnnlib.files import write_whole
from cnnlib.measuring import runs, schema
from cnnlib.measuring.cards import card_of, names_of
from cnnlib.measuring.schema import RUN_TABLES
from workflow.glue import integrity, modules, overrides
from workflow.glue.integrity import MADE, Made
from workflow.glue.sources import stage_sources
from workflow.plotting import ladder
from workflow.report import NETWORKS, PAGE_TABLES, PUBLISHED, WEIGHTS

__all__ = ["BESIDE", "RUN_TABLES", "Experiment", "put_this_python_first"]

BESIDE = ("probes", "pictures", "features")
"""Raw tables that one job measures for the whole sweep."""

BESIDE_PAGE = ("ablation",)
"""Figures that the report also takes from a folder beside the results."""

POSTER = (
    "speedup",
    "discern",
    "race",
    "profile",
    "roofline",
    "memory",
    "learning",
    "energy",
    "memory_latency",
    "latency",
    "transfers",
    "push_pull",
    "filters",
)
"""Figures for the poster; where one is not wanted the next takes its place."""
POSTER_COUNT = 6


class Experiment:
    """The experiment of Snakemake's `config`, of which `given` was given by --config.

    Methods that take wildcards are Snakemake input functions or params. Raises UserError with one
    line for a config that cannot be run.
    """

    def __init__(self, config: dict[str, Any], given: Mapping[str, Any] | None = None) -> None:
        settings = overrides.laid_over(plain(config), plain(given or {}))
        self.config = runs.parse_experiment(settings)
        self.settings = in_order(self.config.model_dump(mode="json"))
        self.results = os.path.normpath(self.config.results)
        if os.path.exists(self.results) and not os.path.isdir(self.results):
            raise ConfigError(f"results: {self.results} is no folder")
        self.runs = runs.runs(self.config)
        self.order = {run: i for i, run in enumerate(self.runs)}
        self.usual_batch_size = runs.usual_batch_size(self.config)
        self.tables = modules.names("tables")
        self.figures = modules.names("figures")
        wanted = modules.chosen("figures", self.config.figures, "figures")
        for name in self.config.figures or []:
            if not self.tables_are_given and self.missing("figures", name):
                raise ConfigError(f"{name!r} in figures needs the section race, and there is none")
        self.wanted_figures = [name for name in wanted if self.can_make("figures", name)]
        self.wanted_tables = [name for name in self.tables if self.can_make("tables", name)]
        self.made: Made | None = None

    # what is there and what is asked for ----------------------------------------------------

    def located(self, *patterns: str) -> list[str]:
        """Paths of the rules as they are on the disk: `<results>` is the folder of the results."""
        return [str(path).replace("<results>", self.results) for path in patterns]

    @functools.cached_property
    def tables_are_given(self) -> bool:
        """Raw tables without the runs they came from: published results, drawn as they are."""
        made_here = Path(self.results, "runs").exists() or Path(self.results, MADE).exists()
        return Path(self.results, "tables", "epochs.csv").exists() and not made_here

    def can_make(self, folder: str, name: str) -> bool:
        """Whether there is, or will be, what a figure or table is made from.

        One that is about certain stages alone, its STAGES, needs one of them.
        """
        stages = modules.constant(folder, name, "STAGES")
        if stages and not set(stages) & self.measured_stages:
            return False
        return not self.missing(folder, name)

    @functools.cached_property
    def measured_stages(self) -> set[str]:
        """Names of the stages that have rows, or will have."""
        if self.tables_are_given:
            rows = schema.read_columns(Path(self.results, "tables", "epochs.csv"), "epochs")
            return set(rows["stage"])
        return set(names_of(self.config.sweep.stages, "sweep.stages"))

    def missing(self, folder: str, name: str) -> list[str]:
        """Raw tables that a figure or table needs and that given results lack; each is said once.

        Without given results it can only be the race, if the config has none.
        """
        raw = sorted(modules.raw_tables(folder, name))
        if not self.tables_are_given:
            return [table for table in raw if table == "race" and not self.config.race]
        tables = Path(self.results, "tables")
        lacking = [table for table in raw if not schema.find(tables, table).exists()]
        if lacking:
            print(
                f"left out: {folder.removesuffix('s')} {name}, since {tables} has no "
                f"{', '.join(f'{table}.csv' for table in lacking)}",
                file=sys.stderr,
            )
        return lacking

    def tables_read(self, folder: str, name: str) -> list[str]:
        """Names of the files of the tables that a figure or table is made from."""
        return self.file_names(modules.tables_read(folder, name))

    def file_names(self, tables: Iterable[str]) -> list[str]:
        """Names of the tables' files; given results may have some under a former name."""
        if not self.tables_are_given:
            return list(tables)
        folder = Path(self.results, "tables")
        return [schema.find(folder, name).stem for name in tables]

    @property
    def run_names(self) -> list[str]:
        """The folder of each run within runs/, in the order of the sweep."""
        return [run.folder.relative_to("runs").as_posix() for run in self.runs]

    @property
    def pairs(self) -> list[str]:
        """`DATA SET/NETWORK` for all that the sweep trains."""
        return [f"{dataset}/{network}" for dataset, network in self.config.pairs()]

    def stages_on(self, kind: str) -> list[str]:
        """The stages of the sweep that run on a `cpu`, or on `cuda`."""
        names = names_of(self.config.sweep.stages, "sweep.stages")
        return [name for name in names if card_of(name, "a rule").runs_on == kind]

    @property
    def raced(self) -> list[str]:
        """The stages of the race."""
        return names_of(self.config.race.stages, "race.stages") if self.config.race else []

    @functools.cached_property
    def own_stages(self) -> list[dict[str, Any]]:
        """What figures say of the stages from outside the repository: another title draws again."""
        race = self.config.race.stages if self.config.race else []
        cards = [card_of(entry, "a rule") for entry in (*self.config.sweep.stages, *race)]
        return [ladder.describe(card) for card in dict.fromkeys(cards) if card.file]

    @property
    def provenance(self) -> str:
        """Where one run, of the last stage, says by what it was measured.

        Published results keep that of one run.
        """
        if self.tables_are_given:
            return "<results>/provenance/run.json"
        return f"<results>/{self.runs[len(self.config.sweep.stages) - 1].folder}/run.json"

    @property
    def page_tables(self) -> list[str]:
        """Names of the files of the tables that the report explains, as far as there are any."""
        folder = Path(self.results, "tables")

        def there(name: str) -> bool:
            if name in self.tables:
                return name in self.wanted_tables
            # no rule makes a timeline
            made = not self.tables_are_given and name != "timeline"
            return made or schema.find(folder, name).exists()

        return self.file_names(filter(there, PAGE_TABLES))

    @property
    def published(self) -> list[str]:
        """Published files that the report shows: trained weights, the times of every machine and,
        for a machine without a GPU, the tables of one with it.
        """
        files = [Path(PUBLISHED, WEIGHTS), Path(PUBLISHED).parent / NETWORKS]
        files += sorted(Path(PUBLISHED).parent.glob("*/tables/epochs.csv"))
        if self.results != PUBLISHED:
            folder = Path(PUBLISHED, "tables")
            files += [schema.find(folder, name) for name in PAGE_TABLES]
            files += sorted(Path(PUBLISHED, "provenance").glob("*.json"))
        return [str(path) for path in dict.fromkeys(files) if path.exists()]

    @property
    def poster_figures(self) -> list[str]:
        """Names of the figures that the poster shows."""
        return [name for name in POSTER if name in self.wanted_figures][:POSTER_COUNT]

    @property
    def poster_tables(self) -> list[str]:
        """Names of the files that they are drawn from, the ladder's among them."""
        read = [modules.tables_read("figures", name) for name in self.poster_figures]
        return self.file_names(dict.fromkeys(["ladder", *itertools.chain(*read)]))

    def caption(self, wildcards: Any) -> str:
        """The caption of the figure in the report."""
        return modules.docstring("figures", wildcards.figure)

    @property
    def page_figures(self) -> list[str]:
        """The files of the report's figures: the results' own and, of published results, also those
        of folders beside them that have the same name and more, as nvidia-h100-ablation has.

        Of these only figures that the results themselves do not have.
        """
        own = [f"{self.results}/figures/{name}.svg" for name in self.wanted_figures]
        if not self.tables_are_given:
            return own
        beside = Path(self.results).parent.glob(f"{Path(self.results).name}-*/figures/*.svg")
        names = {name: str(path) for path in sorted(beside) if (name := path.stem) in BESIDE_PAGE}
        return own + [path for name, path in names.items() if name not in self.wanted_figures]

    @property
    def captions(self) -> list[str]:
        """The captions of all figures: a new wording makes the report again."""
        return [modules.docstring("figures", name) for name in self.wanted_figures]

    # what each job depends on ---------------------------------------------------------------

    def stage_sources(self, wildcards: Any) -> list[str]:
        """The files that the stage is made of."""
        return stage_sources(wildcards.stage)

    def sections(self, *names: str) -> dict[str, Any]:
        """Whole sections of the settings, for a job that is not about one run."""
        return {name: self.settings[name] for name in names}

    def dataset_files(self, wildcards: Any) -> dict[str, Any]:
        """Names and checksums of what is downloaded; nothing for a synthetic data set."""
        settings = self.settings["datasets"][wildcards.dataset]
        if settings.get("archive"):
            return {"archive": settings["archive"]}
        files = settings.get("files", {})
        return files if isinstance(files, dict) else {"files": files}

    def dataset_settings(self, wildcards: Any) -> dict[str, Any]:
        """Everything that decides what is in the data set's file; for a folder of pictures, which
        ones lie there now.
        """
        spec = self.config.dataset(wildcards.dataset, "a rule")
        settings: dict[str, Any] = json.loads(spec.specification())
        if isinstance(spec, FolderSpec):
            settings["pictures"] = fingerprint(spec)
        return settings

    def run_settings(self, wildcards: Any) -> dict[str, Any]:
        """The settings that can change what a run measures, at any batch size and repeat."""
        return self._run_settings(wildcards.dataset, wildcards.network, wildcards.stage)

    @functools.cache  # noqa: B019 - there is one Experiment
    def _run_settings(self, dataset: str, network: str, stage: str) -> dict[str, Any]:
        runs_on = card_of(stage, "a rule").runs_on
        settings = runs.run_settings(self.config, dataset, network, runs_on)
        return {key: in_order(settings[key]) for key in sorted(settings)}

    def race_settings(self, wildcards: Any) -> dict[str, Any]:
        """The settings that can change how this stage runs the race."""
        race = dict(self.settings["race"])
        del race["stages"]  # which other stages run
        layers = self.config.network(race["network"], race["dataset"], "a rule").layers
        return {
            "race": race,
            "network": [in_order({layer.kind: layer.model_dump(mode="json")}) for layer in layers],
            "device": self.settings["sweep"]["device"],
        }

    @property
    def first(self) -> int:
        """A priority above every run: what runs wait for is made before the first of them."""
        return len(self.runs) + 1

    def priority(self, wildcards: Any) -> int:
        """Higher for runs that come first in the sweep."""
        run = runs.Run(
            wildcards.dataset,
            wildcards.network,
            wildcards.stage,
            int(wildcards.batch_size),
            int(wildcards.repeat),
        )
        return len(self.runs) - self.order.get(run, len(self.runs))

    @property
    def may_use_gpu(self) -> bool:
        """Whether GPU stages run on a GPU if there is one, or always on the CPU, emulated."""
        return self.config.sweep.device != "emulated"

    def gpus(self, wildcards: Any) -> int:
        """GPUs that a run takes: none for a CPU stage, and none where kernels are emulated."""
        on_gpu = card_of(wildcards.stage, "a rule").runs_on != "cpu"
        return int(on_gpu and self.may_use_gpu)

    # before and after the jobs --------------------------------------------------------------

    def again(self, made: Sequence[str]) -> dict[str, str]:
        """Files that are missing, altered or stale and are to be made again -> what to say.

        `made` are all files made of runs or measured beside them. Nothing where tables are given:
        how they were made is not known.
        """
        if self.tables_are_given:
            return {}
        self.made = Made(self.results, made)
        return {
            **integrity.data_again(self.config, self.results),
            **integrity.runs_again(self.config, self.results),
            **self.made.again(),
        }

    @property
    def settings_file(self) -> str:
        """The whole config of the experiment, merged and with its defaults."""
        return f"{self.results}/config.yaml"

    def save_settings(self) -> None:
        """Write every setting, for the jobs to read and for readers of the results.

        As YAML: JSON writes 0.00001 in a way that YAML reads as text. Given tables keep their own.
        """
        if not self.tables_are_given:
            write_text(self.settings_file, yaml.safe_dump(self.settings, sort_keys=False))

    def save_own_stages(self) -> None:
        """Write what the programs that draw have to know of stages from outside the repository."""
        path = f"{self.results}/tables/{ladder.OWN_FILE}"
        if not self.tables_are_given and (self.own_stages or os.path.exists(path)):
            write_text(path, json.dumps(self.own_stages, indent=1) + "\n")

    def list_file(self, raw: str) -> str:
        """The file that names what a raw table is combined from, one path a line."""
        return f"{self.results}/tables/.{raw}.list"

    def save_lists(self, rows: Mapping[str, Sequence[str]]) -> None:
        """Write which files each raw table is combined from, for a command that takes thousands.

        Not rules: for each of its jobs without a program Snakemake starts another Snakemake.
        """
        if not self.tables_are_given:
            for raw, paths in rows.items():
                text = "".join(f"{path}\n" for path in self.located(*paths))
                write_text(self.list_file(raw), text)

    def begin(self) -> None:
        """Files are about to be made."""
        if self.made is not None:
            self.made.begin()

    def end(self) -> None:
        """All jobs have ended, some perhaps with a failure."""
        if self.made is not None:
            self.made.end()

    def say_where(self, figures: Iterable[str]) -> None:
        """At the end of a run: where to look."""
        found = [path for path in map(str, figures) if Path(path).exists()]
        if found:
            print(f"\nFigures: {Path(self.results, 'figures').resolve()}", file=sys.stderr)
            for path in found:
                print(f"  {path}", file=sys.stderr)
        ladder = f"{self.results}/tables/ladder.md"
        if Path(ladder).exists():
            print(f"Ladder:  {ladder}", file=sys.stderr)
        for what, name in (("Report: ", "report.html"), ("Poster: ", "poster.pdf")):
            if Path(self.results, name).exists():
                print(f"{what} {Path(self.results, name).resolve()}", file=sys.stderr)


def in_order(value: Any) -> Any:
    """`value` with the keys of all mappings sorted: their order in a config is no change."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(inner) for inner in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Snakemake's config as ordinary dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def write_text(path: str, text: str) -> None:
    """Write a few lines that need no program."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def put_this_python_first() -> None:
    """Let `python` in a rule mean the Python that runs Snakemake, activated environment or not."""
    here = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
