"""The experiment as typed settings: config.yaml read, checked and completed with defaults.

An unknown key, a wrong type or an impossible network is a ConfigError that names it; nothing is
ever executed or unpickled from a config file.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cnnlib import patterns
from cnnlib.config_errors import first_problem, worst_problem
from cnnlib.config_files import read_settings
from cnnlib.datasets import SPECS, DatasetSpec, SyntheticSpec, check_hard_images
from cnnlib.errors import ConfigError
from cnnlib.layers import DEFAULT_LOSS, LOSSES
from cnnlib.network import DEFAULT_SCHEME, SCHEMES, Network, parse_layers
from cnnlib.paths import CONFIG

MOST_RUNS = 1_000_000
"""More runs than could be measured in years, or than a list of them should hold in memory."""

# Counts are C ints in kernels.
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]


def _yaml_number(value: Any) -> Any:
    """Read 1e-3 and 1.5e3 as numbers; YAML 1.1 takes them for texts, lacking a point or a sign."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+", value):
        return float(value)
    return value


def _device(value: Any) -> Any:
    """Configs of earlier versions call the emulated device host."""
    return "emulated" if value == "host" else value


Number = Annotated[float, BeforeValidator(_yaml_number)]
Name = Annotated[str, Field(pattern=patterns.NAME, max_length=patterns.LONGEST_NAME)]
StageName = Annotated[str, Field(pattern=patterns.STAGE, max_length=patterns.LONGEST_PATH)]


class Section(BaseModel):
    """A part of the config: no unknown keys, no silent conversions, fixed once read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


if TYPE_CHECKING:
    LossName = str
    SchemeName = str
else:
    LossName = Literal[tuple(LOSSES)]
    SchemeName = Literal[tuple(SCHEMES)]


class Training(Section):
    """Plain mini-batch gradient descent: g <- gradient + weight_decay w, v <- momentum v + g,
    w <- w - learning_rate v.
    """

    learning_rate: Number = Field(gt=0)
    """The rate of every step, or the peak of a cycle."""
    momentum: Number = Field(default=0.0, ge=0, lt=1)
    """Share of the velocity that a step keeps."""
    schedule: Literal["constant", "one_cycle"] = "constant"
    """one_cycle: the learning rate rises from 0 in the first steps and falls to 0 in all others."""
    warmup: Number = Field(default=0.2, ge=0, le=1)
    """Share of the steps in which it rises."""
    epochs: PositiveInt
    """How often the training set is trained on."""
    seed: int = Field(default=1, ge=0, lt=2**32)
    """Initial weights, orders and dropout's masks; repeat r of a sweep has seed + r - 1."""
    loss: LossName = DEFAULT_LOSS
    """What is made small: the mean of it over a batch."""
    weight_decay: Number = Field(default=0.0, ge=0, lt=1)
    """Share of the parameters, biases included, that is added to their gradient."""
    initial_weights: SchemeName = DEFAULT_SCHEME
    """The variance of the initial weights, which are uniform: lecun 1 / inputs of a unit, glorot
    2 / (inputs + outputs), he 2 / inputs."""


class Sweep(Section):
    """What is measured: every combination of these."""

    datasets: list[Name] = Field(min_length=1)
    """Names of the section datasets."""
    networks: list[Name] = Field(min_length=1)
    """Names of the section networks."""
    stages: list[StageName] = Field(min_length=1)
    """Stages of the ladder, variants of them, or peers, which `python -m cnnlib stages` lists; or
    paths of Python files with stages of your own, such as `./my_stage.py`, relative to the working
    directory."""
    batch_sizes: list[PositiveInt] = Field(min_length=1)
    """Images of a training step."""
    repeats: PositiveInt
    """How often every combination is measured, each time with another seed."""
    device: Annotated[Literal["auto", "cuda", "emulated"], BeforeValidator(_device)] = "auto"
    """For stages that run on a GPU. auto: a GPU if there is one, or else emulated; cuda: a GPU or
    an error; emulated: the same kernels compiled for the CPU."""


class Measuring(Section):
    """How it is measured; see cnnlib.measuring.run."""

    warmup_seconds: Number = Field(default=0.5, gt=0)
    """Training before the clock starts, at least one step."""
    latency_steps: PositiveInt = 50
    """Steps timed one by one after the epochs."""
    budget_seconds: Number = Field(default=60.0, gt=0)
    """A run whose epochs would take longer is timed on a part and scaled (`extrapolated`)."""
    sample_seconds: Number = Field(default=5.0, gt=0)
    """The longest time for which such a run is timed."""
    emulated_seconds: Number = Field(default=3.0, gt=0)
    """budget_seconds for emulated kernels, and about the longest time for which such a run trains
    for its learning curve."""
    budget_images: PositiveInt = 8
    """Least number of images that are timed when a run is scaled."""
    full: bool = False
    """Run everything in full, however long it takes."""
    limit_seconds: Number = Field(default=1800.0, gt=0)
    """A run that takes longer counts as hung and is ended, unless everything is run in full."""
    resident_images: PositiveInt | Literal["auto"] = "auto"
    """Images that the GPU holds per load; auto: as many as fit."""
    autotune: bool = True
    """On a GPU, a stage that has several ways to train measures which is the fastest."""
    sample_interval: Number = Field(default=0.01, gt=0)
    """Seconds between two readings of memory, power and clocks."""
    energy_seconds: Number = Field(default=1.0, ge=0)
    """Seconds of training without a pause, for the energy of an epoch; 0 measures none."""
    learning_images: PositiveInt = 1000
    """Most test images that a learning curve's accuracy is measured on."""
    probe_seconds: Number = Field(default=20.0, gt=0)
    """Approximate time for all measurements of the machine's own limits."""

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, settings: Any) -> Any:
        """Configs of earlier versions have `host_seconds`, which overrides the shipped config's."""
        if isinstance(settings, Mapping) and "host_seconds" in settings:
            settings = dict(settings)
            settings["emulated_seconds"] = settings.pop("host_seconds")
        return settings


class Race(Section):
    """One recipe, trained from many seeds: how soon it recognises `target` of the test images."""

    dataset: Name
    """A name of the section datasets."""
    network: Name
    """A name of the section networks."""
    stages: list[StageName] = Field(min_length=1)
    """Stages that train it, as in `sweep`."""
    batch_size: PositiveInt
    """Images of a training step."""
    training: Training
    """The recipe of each training."""
    seeds: PositiveInt = 30
    """Trainings of each stage; the first has the seed of `training`, the next one more."""
    target: Number = Field(default=0.99, gt=0, le=1)
    """Mean test accuracy that counts as the finish."""


class NetworkSpec(Section):
    """A network, written as a list of layers or as a mapping with these keys."""

    source: str = ""
    """Where it comes from, for people: a paper, a program."""
    input_shape: list[PositiveInt] | None = Field(default=None, min_length=3, max_length=3)
    """Channels, height and width of the images that it is made for. A sweep trains it on these data
    sets alone; null: on all."""
    layers: Any
    """Its layers, from the images on."""


def _network(value: Any) -> Any:
    return value if isinstance(value, dict | NetworkSpec) else {"layers": value}


class Config(Section):
    """Everything a user can change."""

    results: str = Field(default="results", pattern=patterns.FOLDER)
    """Folder for everything that is made."""
    datasets: dict[Name, DatasetSpec]
    """Where images come from."""
    networks: dict[
        Name,
        Annotated[
            NetworkSpec, BeforeValidator(_network, json_schema_input_type=list[Any] | NetworkSpec)
        ],
    ]
    """Lists of layers, from the images on, or mappings of `source` and `layers`."""
    training: Training
    """How every stage trains."""
    sweep: Sweep
    """What is measured."""
    measuring: Measuring = Measuring()
    """How it is measured."""
    race: Race | None = None
    """One recipe from many seeds; null: none."""
    figures: list[Name] | None = None
    """Names of workflow/figures/NAME.py to draw; all of them if not given."""
    address: str | None = Field(default=None, pattern=patterns.ADDRESS)
    """Where readers of the poster find the experiment: printed on it, also as a QR code."""

    def dataset(self, name: str, where: str) -> DatasetSpec:
        """The data set's settings; ConfigError naming `where` and the choices if unknown."""
        return lookup(self.datasets, name, "data set", where)

    def pairs(self) -> list[tuple[str, str]]:
        """(data set, network) for all that the sweep trains.

        A network is left out where it is made for images of another shape than the data set's.
        Raises ConfigError for one that would be left out everywhere.
        """
        shapes = {
            name: list(self.dataset(name, "sweep.datasets").shape) for name in self.sweep.datasets
        }
        wanted = {
            name: lookup(self.networks, name, "network", "sweep.networks").input_shape
            for name in self.sweep.networks
        }
        for name, shape in wanted.items():
            if shape is not None and shape not in shapes.values():
                raise ConfigError(
                    f"networks.{name} is made for images of shape {shape}, which none of "
                    f"sweep.datasets has: {', '.join(f'{d} {s}' for d, s in shapes.items())}"
                )
        return [
            (dataset, name)
            for dataset, shape in shapes.items()
            for name, made_for in wanted.items()
            if made_for is None or made_for == shape
        ]

    def network(self, name: str, dataset: str, where: str) -> Network:
        """The network for the images of `dataset`; ConfigError if they do not go together."""
        spec = lookup(self.networks, name, "network", where)
        data = self.dataset(dataset, where)
        parsed = parse_layers(name, spec.layers)
        try:
            return Network(name, tuple(data.shape), data.classes, parsed)
        except ConfigError as error:
            both = f"networks.{name} and datasets.{dataset}, together in {where}"
            raise ConfigError(f"{error}: {both}") from None


T = TypeVar("T")


def lookup(choices: Mapping[str, T], name: str, what: str, where: str) -> T:
    """choices[name], or a ConfigError that names the thing, its location and the choices."""
    if name not in choices:
        raise ConfigError(f"unknown {what} {name!r} in {where}; known: {', '.join(choices)}")
    return choices[name]


def parse_config(settings: Any, where: str = "config") -> Config:
    """The Config in settings (nested dicts, as YAML gives them); ConfigError if they are wrong."""
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} must be a mapping of settings, not {type(settings).__name__}")
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(first_problem(error, where, _model_at(error))) from None
    _check_lists(config)
    _check_measuring(config.measuring)
    sweep = config.sweep
    lists: tuple[Sized, ...] = (sweep.datasets, sweep.networks, sweep.stages, sweep.batch_sizes)
    if (count := sweep.repeats * math.prod(len(each) for each in lists)) > MOST_RUNS:
        raise ConfigError(f"sweep asks for {count:,} runs; at most {MOST_RUNS:,}")
    for name, network in config.networks.items():
        parse_layers(name, network.layers)
    for name, images in config.datasets.items():
        if images.test_count is not None:
            key = "test_images" if isinstance(images, SyntheticSpec) else "test_limit"
            check_hard_images(name, images.hard_images, images.test_count, key)
    if (race := config.race) is not None:
        config.network(race.network, race.dataset, "race.network")
        spec = config.dataset(race.dataset, "race.dataset")
        what = f"race.batch_size {race.batch_size}"
        _check_batch(what, race.batch_size, race.dataset, spec, config.measuring)
    for dataset in sweep.datasets:
        spec = config.dataset(dataset, "sweep.datasets")
        for batch_size in sweep.batch_sizes:
            what = f"batch size {batch_size} in sweep.batch_sizes"
            _check_batch(what, batch_size, dataset, spec, config.measuring)
    for dataset, chosen in config.pairs():
        config.network(chosen, dataset, "sweep.networks")
    return config


def check_dataset(name: str, settings: Mapping[str, Any]) -> DatasetSpec:
    """The data set of an entry under `datasets`; ConfigError if it is wrong."""
    try:
        return _Datasets.model_validate({"datasets": {name: settings}}).datasets[name]
    except ValidationError as error:
        raise ConfigError(first_problem(error, "entry", _model_at(error))) from None


class _Datasets(Section):
    """One section of the config alone."""

    datasets: dict[Name, DatasetSpec]


def _check_lists(config: Config) -> None:
    """ConfigError for a name or a number that is listed twice."""
    sweep, race = config.sweep, config.race
    lists: dict[str, Sequence[Any]] = {
        "sweep.datasets": sweep.datasets,
        "sweep.networks": sweep.networks,
        "sweep.stages": sweep.stages,
        "sweep.batch_sizes": sweep.batch_sizes,
        "race.stages": race.stages if race else [],
        "figures": config.figures or [],
    }
    for key, values in lists.items():
        repeated = [value for i, value in enumerate(values) if value in values[:i]]
        if repeated:
            raise ConfigError(f"{repeated[0]!r} is listed twice in {key}")


def _check_measuring(measuring: Measuring) -> None:
    """ConfigError where a run that is in order would be ended because it seems to hang."""
    for key in (
        "warmup_seconds",
        "budget_seconds",
        "sample_seconds",
        "emulated_seconds",
        "energy_seconds",
    ):
        seconds, limit = getattr(measuring, key), measuring.limit_seconds
        if seconds >= limit and not measuring.full:
            raise ConfigError(
                f"measuring.{key}, {seconds:g} s, is not below measuring.limit_seconds, "
                f"{limit:g} s, after which a run is ended"
            )


def _check_batch(
    what: str, batch_size: int, dataset: str, spec: DatasetSpec, measuring: Measuring
) -> None:
    """ConfigError, beginning with `what`, for a batch that cannot be trained on.

    It may be larger than the data set, if that is known, or than what a GPU may hold.
    """
    if spec.train_count is not None and batch_size > spec.train_count:
        keys = "train_images" if isinstance(spec, SyntheticSpec) else "train_limit"
        keys += " and validation" if spec.validation else ""
        raise ConfigError(
            f"{what} is larger than data set '{dataset}' ({spec.train_count} training images, by "
            f"datasets.{dataset}.{keys})"
        )
    resident = measuring.resident_images
    if resident != "auto" and batch_size > resident:
        raise ConfigError(
            f"{what} is larger than measuring.resident_images, {resident}: a GPU holds a batch at "
            "the least"
        )


def load_config(paths: Iterable[Path | str]) -> Config:
    """The config in YAML files, later ones over earlier ones key by key."""
    files = list(paths)
    if not files:
        raise ConfigError("no config file is given")
    try:
        return parse_config(read_settings(files), str(files[-1]))
    except ConfigError as error:
        whole = "config.yaml" if Path("config.yaml").exists() else CONFIG
        if len(files) > 1 or not str(error).endswith("field required"):
            raise
        raise ConfigError(
            f"{error}; a file that holds differences alone comes after a whole one: "
            f"--config {whole} --config {files[0]}"
        ) from None


def _model_at(error: ValidationError) -> type[BaseModel] | None:
    """The section in which the first problem lies, so that its known keys can be listed."""
    path = worst_problem(error)["loc"][:-1]
    if len(path) == 3 and path[0] == "datasets":
        return SPECS.get(str(path[2]))
    sections: dict[str, type[BaseModel]] = {
        "training": Training,
        "sweep": Sweep,
        "measuring": Measuring,
        "race": Race,
    }
    if not path:
        return Config
    return sections.get(str(path[0])) if len(path) == 1 else None
