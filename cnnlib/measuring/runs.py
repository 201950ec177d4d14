"""The runs that a config asks for, and where the files of each one are."""

import hashlib
import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from cnnlib import datasets
from cnnlib.config import Config, load_config, parse_config
from cnnlib.datasets import Dataset
from cnnlib.errors import ConfigError
from cnnlib.layers import Conv
from cnnlib.measuring.cards import card_of, names_of
from cnnlib.stages import find_stage, is_shipped


@dataclass(frozen=True)
class Run:
    """One measurement: a stage trains a network at one batch size, for the `repeat`-th time."""

    dataset: str
    network: str
    stage: str
    batch_size: int
    repeat: int

    @property
    def folder(self) -> Path:
        """Where the run's files are, relative to the results folder."""
        batch, repeat = f"b{self.batch_size}", f"r{self.repeat}"
        return Path("runs", self.dataset, self.network, self.stage, batch, repeat)


def runs(config: Config) -> list[Run]:
    """Every run of the sweep; repeats are outermost, so that drift affects all runs alike."""
    sweep = config.sweep
    stages = names_of(sweep.stages, "sweep.stages")
    return [
        Run(dataset, network, stage, batch_size, repeat)
        for repeat in range(1, sweep.repeats + 1)
        for dataset, network in config.pairs()
        for batch_size in sweep.batch_sizes
        for stage in stages
    ]


def usual_batch_size(config: Config) -> int:
    """The batch size of the sweep for what is measured or shown at one batch size only."""
    return usual_size(config.sweep.batch_sizes)


def usual_size(sizes: Iterable[int]) -> int:
    """64 if it is one of the batch sizes, otherwise the middle one."""
    found = sorted(set(sizes))
    return 64 if 64 in found else found[(len(found) - 1) // 2]


def seed_of(config: Config, repeat: int) -> int:
    """The seed of a repeat, the same in every stage: repeats show the spread over seeds."""
    return config.training.seed + repeat - 1


def run_settings(config: Config, dataset: str, network: str, runs_on: str) -> dict[str, object]:
    """The settings that can change what a run measures, except those of its data.

    `runs_on` is that of its stage.
    """
    measuring = config.measuring.model_dump(mode="json")
    if runs_on != "cuda":
        del measuring["resident_images"], measuring["emulated_seconds"]
    layers = config.network(network, dataset, "sweep.networks").layers
    device = "cpu" if runs_on == "cpu" else config.sweep.device
    if "emulated_seconds" in measuring:
        # Earlier versions had other names, by which their results are still recognised.
        measuring["host_seconds"] = measuring.pop("emulated_seconds")
    return {
        "network": [{layer.kind: _settings(layer, LATER_LAYER)} for layer in layers],
        "training": _settings(config.training, LATER_TRAINING),
        "measuring": measuring,
        "hard_images": config.dataset(dataset, "sweep.datasets").hard_images,
        "device": "host" if device == "emulated" else device,
    }


LATER_LAYER = {"padding", "stride"}
LATER_TRAINING = {"loss", "weight_decay", "initial_weights"}
"""Settings that earlier versions did not have. Where they have their defaults they are left out, so
that earlier results are still recognised.
"""


def _settings(model: BaseModel, later: Set[str]) -> dict[str, object]:
    """All settings of a layer or a section, without those of `later` that have their defaults."""
    fields = type(model).model_fields
    if isinstance(model, Conv):
        later = later - {"stride"}
    unset = {key for key in later & fields.keys() if getattr(model, key) == fields[key].default}
    return model.model_dump(mode="json", exclude=unset)


def settings_digest(config: Config, run: Run, runs_on: str) -> str:
    """Hexadecimal SHA-256 of the settings and the data that decide what the run measures.

    `runs_on` is that of its stage.
    """
    content = run_settings(config, run.dataset, run.network, runs_on)
    content["data"] = config.dataset(run.dataset, "a run").digest()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sweep_dataset(config: Config, name: str) -> Dataset:
    """A data set of the sweep, loaded from where the workflow puts it."""
    spec = config.dataset(name, "sweep.datasets")
    return datasets.load(name, Path(config.results, "data", f"{name}.npz"), spec)


def check_experiment(config: Config) -> Config:
    """Check what config.py cannot: that the stages exist, and each is listed once.

    A stage that cannot serve a network is not an error: its rows are `unavailable`.
    """
    _check_stages(config.sweep.stages, "sweep.stages")
    if config.race is not None:
        _check_stages(config.race.stages, "race.stages")
    return config


def _check_stages(entries: Sequence[str], where: str) -> None:
    """ConfigError for a stage that does not exist or is listed twice.

    The module of one from outside the repository is imported when it is measured.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name = card_of(entry, where).name
        if name in found:
            raise ConfigError(f"{found[name]} and {entry} in {where} are the same stage, {name!r}")
        found[name] = entry
        if is_shipped(entry):
            find_stage(entry, where)


def load_experiment(paths: Iterable[Path | str]) -> Config:
    """Read config files, later over earlier, and check the whole experiment; ConfigError if bad."""
    return check_experiment(load_config(paths))


def parse_experiment(settings: object) -> Config:
    """Check settings that have been read already, such as Snakemake's `config`."""
    return check_experiment(parse_config(settings))


def digest(config: Config) -> str:
    """Short hash of all settings, for provenance."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
