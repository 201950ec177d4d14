"""Nested settings given by Snakemake's --config, as its own parser hands them over."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.cli import parse_config as snakemakes

from cnnlib.errors import ConfigError
from cnnlib.paths import ROOT
from workflow.glue.experiment import Experiment


def experiment(*entries: str) -> Experiment:
    """The tiny experiment after --config with `entries`, which Snakemake has merged already."""
    settings = yaml.safe_load(Path(ROOT, "tests/tiny.yaml").read_text())
    settings["training"]["learning_rate"] = 0.1
    given = snakemakes(list(entries))
    return Experiment(merged(settings, given), given)


def merged(settings: Any, given: Any) -> Any:
    """The settings as Snakemake merges them: texts take the places of numbers."""
    if not isinstance(given, dict) or not isinstance(settings, dict):
        return given
    return settings | {key: merged(settings.get(key), value) for key, value in given.items()}


def test_nested_settings_change_what_they_name_and_nothing_else() -> None:
    before = experiment().config
    config = experiment(
        'training={"epochs": 1, "learning_rate": 1e-3}',
        "sweep={batch_sizes: [4, 16]}",
        "measuring={full: true, resident_images: 64, limit_seconds: 2.5}",
        "race=null",
    ).config
    assert (config.training.epochs, config.training.learning_rate) == (1, 1e-3)
    assert config.sweep == before.sweep.model_copy(update={"batch_sizes": [4, 16]})
    changes = {"full": True, "resident_images": 64, "limit_seconds": 2.5}
    assert config.measuring == before.measuring.model_copy(update=changes)
    assert config.race is None
    assert (config.datasets, config.networks) == (before.datasets, before.networks)


def test_layers_and_data_sets() -> None:
    config = experiment(
        'networks={"007": [{conv: {maps: 2, kernel: 3}}, {activation: relu}, {dense: 3}]}',
        "datasets={blobs: {train_images: 64, hard_images: [3]}}",
    ).config
    assert config.networks["007"].layers[0] == {"conv": {"maps": 2, "kernel": 3}}
    assert "tiny" in config.networks
    assert config.datasets["blobs"].hard_images == [3]
    assert config.datasets["blobs"].train_count == 64


@pytest.mark.parametrize("name", ["007", "1e5", "nan", "null", "true", "1_000"])
def test_names_stay_names(name: str) -> None:
    config = experiment(
        f"networks={{{name}: [{{dense: 3}}]}}", f"sweep={{networks: [{name}]}}"
    ).config
    assert config.sweep.networks == [name]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ('training={"epochs": many}', r"config\.training\.epochs: .*integer, not 'many'"),
        ('training={"epochs": 1', r"config\.training: must be a mapping of settings, not '{"),
        ('training={"epohcs": 1}', r"unknown key 'epohcs' in config\.training; known: "),
        ("trainng={epochs: 1}", r"unknown key 'trainng' in config; known: "),
        ("sweep={batch_sizes: [4, four]}", r"config\.sweep\.batch_sizes\[1\]: .*'four'"),
        ("sweep={networks: [7]}", r"unknown network '7' in sweep\.networks; known: tiny"),
        ("measuring=", r"config\.measuring: must be a mapping of settings, not None"),
        ("datasets={blobs: {shape: [1, x, 9]}}", r"datasets\.blobs.*shape.*'x'"),
        ("results=007", r"results: Snakemake reads this name as 7; put \./ before it"),
    ],
)
def test_what_is_wrong_is_named(entry: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        experiment(entry)
